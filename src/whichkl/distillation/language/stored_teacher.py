"""Stored teacher: what `capture` wrote of a teacher's next-token laws on fixed text, checked before it is used."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Bool
from safetensors import safe_open
from torch import Tensor

from whichkl._arguments import typed
from whichkl._checks import InputError, IntegrityError, ResourceError, cannot, plain
from whichkl.distillation.language.examples import Example
from whichkl.distillation.language.rollouts import Rollouts
from whichkl.distillation.losses import SampledTokens, TopK
from whichkl.files.reading import checked, read_file, read_json, read_tensors
from whichkl.files.saving import checksum
from whichkl.printable import HTML

FORMAT = 1
MANIFEST = "teacher.json"
"""Name of the file that names the shards."""
_FILE = re.compile(r"([0-9a-f]{16})/shard-\d{5}\.\1\.safetensors")
_MAX_DIFFERENCE = 1e-3
"""Largest difference of a law's log probability from 0."""
Key = bytes
"""Digest of a prompt with its completion."""


class Shard(TypedDict):
    """One file of rows."""

    file: str
    bytes: int
    sha256: str
    tokens: int


class Manifest(TypedDict):
    """What `capture` writes last."""

    format: int
    k: int | None
    draws: int | None
    temperature: float
    vocabulary: int
    end_tokens: tuple[int, ...]
    sequences: int
    tokens: int
    mass: Mapping[str, float]
    teacher: str
    tokenizer: str | None
    text: str
    shards: tuple[Shard, ...]
    checksum: str


class StoredTeacher(HTML):
    """A teacher's laws of the next token after each token of fixed completions: its k likeliest tokens, or draws.

    `open` reads what `capture` wrote. It takes the teacher's place in `LanguageTrainer` and `language_model`, on prefixes of the
    same data alone.
    """

    who = "stored teacher"

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest, self.tokens = folder, manifest, manifest["vocabulary"]
        self.merged = 0
        """Number of examples that were given again to the `capture` that returned it."""
        self._first = [0, *accumulate(one["tokens"] for one in manifest["shards"])]
        self._files: dict[int, Any] = {}
        self._entries: dict[int, Tensor] = {}  # of draws: where the entries of each row of a shard begin
        self._places: dict[Key, int] = {}
        keys = []
        for number, shard in enumerate(manifest["shards"]):
            tensors = self._read(number, shard)
            place = self._first[number]
            for key, length in sequences_of(tensors):
                self._places[key] = place
                place += length
                keys.append(key)
        if text_digest(keys) != manifest["text"]:
            raise self._damaged("its text isn't the one that was captured")

    @classmethod
    @typed
    def open(cls, folder: str | os.PathLike[str], *, tokenizer: Any = None) -> StoredTeacher:
        """Read a folder that `capture` wrote; every shard is read once, and checked.

        Args:
            folder: where it was written.
            tokenizer: that of the teacher and the student; None where data are token ids.

        Raises:
            InputError: there is no stored teacher, or the tokenizer isn't the one whose text was captured.
            IntegrityError: a file is missing, was changed or cut short, or holds what is no law; the message names it.
            ResourceError: a file can't be read.
        """
        path = Path(folder)
        try:
            manifest = _read_manifest(path)
            found = cls(path, manifest)
        except OSError as error:
            because = error.strerror or str(error)
            raise ResourceError(cannot(f"read `{error.filename or path}`", because, "Check this path, and the disk")) from error
        found.check_tokenizer(tokenizer)
        return found

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a sequence."""
        return frozenset(self.manifest["end_tokens"])

    def width(self) -> int:
        """Return the number of tokens."""
        return self.manifest["vocabulary"]

    @property
    def temperature(self) -> float:
        """What divided the logits."""
        return self.manifest["temperature"]

    @property
    def has_draws(self) -> bool:
        """Whether draws are stored; else the likeliest tokens."""
        return self.manifest["draws"] is not None

    @property
    def what(self) -> str:
        """What is stored of each law."""
        k, draws = self.manifest["k"], self.manifest["draws"]
        return f"the {k:,} likeliest of {self.tokens:,} tokens, and the rest's mass" if k else f"{draws:,} draws"

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse another tokenizer than the one that made the ids."""
        known = self.manifest["tokenizer"]
        if tokenizer is None or known == tokenizer_digest(tokenizer):
            return
        because = "its text was captured with another tokenizer" if known else "it was captured as token ids, without a tokenizer"
        instead = "Pass the tokenizer that `capture` had" if known else "Give the data as token ids, and no tokenizer"
        raise InputError(cannot("use this stored teacher", because, instead))

    def lookup(self, examples: Iterable[Example], most: int | None) -> dict[Key, int]:
        """Return the first row of each example, by its prompt and its completion as it is cut to `most` tokens.

        Raises:
            InputError: one wasn't captured.
        """
        found = {}
        for number, one in enumerate(examples):
            whole = one.completion or []
            place = self._places.get(key_of(one.prompt, whole))
            if place is None:
                where = one.place or f"example {number}"
                because = f"{where} isn't one of the {self.manifest['sequences']:,} sequences that were captured"
                raise InputError(cannot("use this stored teacher", because, "Capture these data with `capture`, or leave it out"))
            found[key_of(one.prompt, whole[:most])] = place
        return found

    def rows(self, rollouts: Rollouts, places: Mapping[Key, int]) -> TopK | SampledTokens:
        """Return the stored laws of completions' tokens, one after another; `places` is that of `lookup`."""
        parts = []
        for ids, first, last in zip(rollouts.ids.tolist(), rollouts.begin.tolist(), rollouts.end.tolist(), strict=True):
            place = places.get(key_of(ids[:first], ids[first:last]))
            if place is None:
                because = "a sequence of this batch isn't one of the examples that it was opened for"
                raise InputError(cannot("use this stored teacher", because, "Pass it in `train_dataset=` or `eval_dataset=`"))
            number = bisect.bisect_right(self._first, place) - 1
            begin = place - self._first[number]
            parts.append(self._slice(number, begin, begin + last - first))
        stored = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        kind: type[TopK | SampledTokens] = SampledTokens if self.has_draws else TopK
        return kind(temperature=self.temperature, **stored)

    def _slice(self, number: int, begin: int, end: int) -> dict[str, Tensor]:
        """Return some rows of a shard."""
        if number not in self._files:
            path = self.folder / self.manifest["shards"][number]["file"]
            self._files[number] = safe_open(path, framework="pt")
        file = self._files[number]
        if not self.has_draws:
            return {name: file.get_slice(name)[begin:end] for name in ("log_probs", "indices", "log_rest")}
        first, last = self._entries[number][[begin, end]].tolist()
        log_probs, indices, counts = (file.get_slice(name)[first:last] for name in ("log_probs", "indices", "counts"))
        draws = int(self.manifest["draws"] or 0)
        both = {"log_probs": log_probs, "indices": indices}
        return {name: one.repeat_interleave(counts.long()).view(-1, draws) for name, one in both.items()}

    def _read(self, number: int, shard: Shard) -> dict[str, Tensor]:
        """Read a whole shard and check it."""
        path = self.folder / shard["file"]
        try:
            data = read_file(path)
        except FileNotFoundError:
            raise self._damaged(f"`{path.name}` is missing") from None
        if len(data) != shard["bytes"]:
            how = "cut short" if len(data) < shard["bytes"] else "changed"
            raise self._damaged(f"`{path.name}` was {how}: it has {len(data):,} bytes, and {shard['bytes']:,} were written")
        if hashlib.sha256(data).hexdigest() != shard["sha256"]:
            raise self._damaged(f"`{path.name}` was changed: its SHA-256 differs")
        try:
            tensors = read_tensors(data)
            check_shard(tensors, self.manifest, shard["tokens"])
        except ValueError as error:
            raise self._damaged(f"`{path.name}`: {error}") from error
        if self.has_draws:
            self._entries[number] = torch.nn.functional.pad(tensors["distinct"].long().cumsum(0), (1, 0))
        return tensors

    def _damaged(self, why: str) -> IntegrityError:
        instead = "Run the same `capture` into this folder again: it computes only what is missing"
        return IntegrityError(cannot(f"open `{self.folder}`", f"it isn't what was captured: {why}", instead))

    def to_dict(self) -> dict[str, Any]:
        """Return what the file that names the shards holds."""
        fields: dict[str, Any] = plain(dict(self.manifest))
        return fields

    def __repr__(self) -> str:
        return f"StoredTeacher({self.what}, {self.manifest['tokens']:,} tokens of {self.manifest['sequences']:,} sequences)"

    def __str__(self) -> str:
        """What is stored, of how much text, and how much of the laws' mass it holds."""
        mass = self.manifest["mass"]
        head = f"{self.what} at temperature {self.temperature:g}, after each of {self.manifest['tokens']:,} tokens"
        count = len(self.manifest["shards"])
        shards = "1 shard" if count == 1 else f"{count} shards"
        again = f"\n  {self.merged:,} more were given again: each is stored once" if self.merged else ""
        return (
            f"{head} of {self.manifest['sequences']:,} sequences, in {shards}{again}\n"
            f"  probability of the stored tokens: {mass['mean']:.4f} on average, {mass['min']:.4f} at least"
        )


def key_of(prompt: Sequence[int], completion: Sequence[int]) -> Key:
    """Return the digest of a prompt and a completion."""
    numbers = torch.tensor([len(prompt), *prompt, *completion], dtype=torch.int32, device="cpu")
    return hashlib.blake2b(numbers.numpy().tobytes(), digest_size=16).digest()


def text_digest(keys: Iterable[Key]) -> str:
    """Return the digest of a set of sequences."""
    return hashlib.sha256(b"".join(sorted(keys))).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Return the digest of the map from tokens to ids and of the special tokens; None without a tokenizer."""
    if tokenizer is None:
        return None
    if not hasattr(tokenizer, "get_vocab"):
        because = f"the `{type(tokenizer).__name__}` has no `get_vocab()`, which maps tokens to ids"
        raise InputError(cannot("compare this tokenizer", because, "Pass one of transformers, or None where data are token ids"))
    special = getattr(tokenizer, "special_tokens_map", {})
    content = {"tokens": tokenizer.get_vocab(), "special": {name: str(token) for name, token in special.items()}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sequences_of(tensors: Mapping[str, Tensor]) -> Iterable[tuple[Key, int]]:
    """Yield the key of each sequence of a shard, and the number of its completion's tokens."""
    place, ids = 0, tensors["ids"].tolist()
    for prompt, completion in zip(tensors["prompt"].tolist(), tensors["completion"].tolist(), strict=True):
        middle, end = place + prompt, place + prompt + completion
        yield key_of(ids[place:middle], ids[middle:end]), completion
        place = end


def check_shard(tensors: Mapping[str, Tensor], kind: Mapping[str, Any], tokens: int) -> None:
    """Refuse tensors that can't be the laws of this many tokens; `kind` has `k`, `draws` and `vocabulary`."""
    names = {"ids", "prompt", "completion", "log_probs", "indices", *(["log_rest"] if kind["k"] else ["counts", "distinct"])}
    if set(tensors) != names:
        raise ValueError(f"it holds {', '.join(sorted(tensors))}, not {', '.join(sorted(names))}")
    log_probs, indices = tensors["log_probs"], tensors["indices"]
    lengths = tensors["prompt"] + tensors["completion"]
    of_text = int(tensors["completion"].sum()) == tokens and int(lengths.sum()) == len(tensors["ids"])
    if not of_text or indices.shape != log_probs.shape:
        raise ValueError("its tensors don't fit each other")
    if bool(log_probs.isnan().any()):
        raise ValueError("it holds NaN")
    if bool((log_probs > _MAX_DIFFERENCE).any()):
        raise ValueError("it holds a probability above 1")
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= kind["vocabulary"]):
        raise ValueError(f"it names a token that isn't one of {kind['vocabulary']:,}")
    is_law = _with_rest(tensors, (tokens, kind["k"])) if kind["k"] else _with_counts(tensors, tokens, kind["draws"])
    if not bool(is_law.all()):
        raise ValueError(f"row {int((~is_law).nonzero()[0])} is no law of the next token")


def _with_rest(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Bool[Tensor, " n"]:
    """Whether the likeliest tokens and the rest have a probability of 1, row by row."""
    log_probs, log_rest = tensors["log_probs"], tensors["log_rest"]
    if log_probs.shape != shape or log_rest.shape != shape[:1]:
        raise ValueError(f"it has {tuple(log_probs.shape)} numbers, not {shape}")
    return torch.cat([log_probs, log_rest[:, None]], 1).double().logsumexp(1).abs() < _MAX_DIFFERENCE


def _with_counts(tensors: Mapping[str, Tensor], tokens: int, draws: int) -> Bool[Tensor, " n"]:
    """Whether as many tokens were drawn as was asked for, row by row."""
    distinct, counts = tensors["distinct"].long(), tensors["counts"].long()
    if distinct.shape != (tokens,) or not int(distinct.sum()) == len(counts) == len(tensors["log_probs"]):
        raise ValueError(f"it has the draws of {len(distinct):,} tokens, not {tokens:,}")
    row = torch.arange(tokens, device="cpu").repeat_interleave(distinct)
    return torch.bincount(row, counts.double(), tokens) == draws


def _read_manifest(folder: Path) -> Manifest:
    path, again = folder / MANIFEST, "Run the same `capture` into this folder again"
    if not path.exists():
        because = f"there is no `{MANIFEST}` in it" if folder.is_dir() else "there is no such folder"
        raise InputError(cannot(f"open `{folder}`", because, "Name a folder that `capture` completed"))
    try:
        fields = read_json(read_file(path))
        if isinstance(fields, dict) and type(fields.get("format")) is int and fields["format"] > FORMAT:
            raise IntegrityError(cannot(f"open `{folder}`", "a newer version wrote it", "Upgrade whichkl"))
        if not isinstance(fields, dict) or checksum(fields) != fields.get("checksum"):
            raise ValueError("its checksum differs")
        found: Manifest = checked(Manifest, fields)
        if not all(_FILE.fullmatch(one["file"]) for one in found["shards"]):
            raise ValueError("it names a file that is no shard")
    except IntegrityError:
        raise
    except ValueError as error:
        raise IntegrityError(cannot(f"open `{folder}`", f"`{MANIFEST}` isn't what was captured: {error}", again)) from error
    return found
