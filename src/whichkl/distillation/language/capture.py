"""Capture: a teacher is run once on fixed text, and its laws of the next token are stored in shards."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._arguments import typed
from whichkl._checks import InputError, cannot, check_seed, plain
from whichkl.distillation.language.causal import CausalModel, agree, evaluating
from whichkl.distillation.language.examples import Example, read_examples, together
from whichkl.distillation.language.stored_teacher import (
    FORMAT,
    MANIFEST,
    StoredTeacher,
    check_shard,
    key_of,
    text_digest,
    tokenizer_digest,
)
from whichkl.distillation.language.token_loss import Side, rows_of
from whichkl.distillation.losses import TopK
from whichkl.distillation.losses.heads import Head, accumulating
from whichkl.distillation.losses.reduction import check_temperature, widened
from whichkl.distillation.networks import digest
from whichkl.files.journal import Journal
from whichkl.files.locks import LOCK, locked
from whichkl.files.reading import read_file
from whichkl.files.saving import checksum
from whichkl.files.writing import TEMPORARY, remove_own, write_whole
from whichkl.process.torch_modes import plain_modes

_TOKENS_PER_SHARD = 1 << 17
"""About 33 MB of 32 likeliest tokens."""
_MAX_ROWS_PER_CALL = 64
_NUMBERS_PER_CALL = 1 << 25
"""Logits at a time: 128 MB in float32."""


@plain_modes()
@typed
def capture(
    *,
    teacher: Any,
    tokenizer: Any = None,
    data: Any,
    folder: str | os.PathLike[str],
    k: int | None = None,
    draws: int | None = None,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    seed: int = 0,
    tell: Callable[[str, float], None] | None = None,
) -> StoredTeacher:
    """Run a teacher once on fixed completions, and store its law of every next token; training then needs no teacher.

    Stored are the k likeliest tokens of each law with the exact mass of the rest, or independent draws of the next token. With
    the former every divergence that merging tokens can't raise is a lower bound of the full one, and equal to it at k = all
    tokens; with the latter the forward KL is unbiased, whatever the law's tail.

    Shards are safetensors files of about 131,000 tokens. If interrupted, run the same call again to resume.

    Args:
        teacher: p, a causal language model of transformers, or a module of `input_ids` (n, t) with logits (n, t, v).
        tokenizer: its tokenizer; None where the data are token ids.
        data: texts, {'prompt': …, 'completion': …}, {'messages': […]}, or token ids in their place. Each is stored once.
        folder: a new or empty one, or that of the same capture.
        k: how many tokens of each law; by default 32, or all if there are fewer.
        draws: how many draws of each next token, instead.
        temperature: divides the logits first; training has to use the same.
        vocabulary: the number of tokens where there is no tokenizer and the logits have padding.
        seed: fixes the draws.
        tell: called with the present step, and the fraction of it that is done.

    Returns:
        The stored teacher, opened.

    Raises:
        InputError: the teacher or the data can't be used, or the folder holds something else.
        ResourceError: the folder can't be written, or another process captures into it.
    """
    kept, seed = _kind(k, draws), check_seed(seed)
    check_temperature(temperature)
    p, path, say = CausalModel(teacher, "teacher"), Path(folder), tell or (lambda step, done: None)
    if not os.fspath(folder) or (path.exists() and not path.is_dir()):
        because = "it is a file" if os.fspath(folder) else "it has no name"
        raise InputError(cannot(f"capture into `{os.fspath(folder)}`", because, "Name a new or empty folder"))
    with evaluating(p):
        ends = agree(p, None, tokenizer, vocabulary)
        if kept["k"] is not None:
            kept["k"] = min(kept["k"], p.tokens) if k is None else kept["k"]
            if kept["k"] > p.tokens:
                raise InputError(cannot(f"keep `k={k}` tokens", f"there are {p.tokens:,}", f"Use `k={p.tokens}`, or fewer"))
        examples, merged = _examples(data, tokenizer, p.tokens, ends[0])
        described = {"format": FORMAT, **kept, "temperature": float(temperature), "vocabulary": p.tokens, "end_tokens": ends}
        described |= {"sequences": len(examples), "tokens": sum(len(one.completion or ()) for one in examples)}
        weights = {name: one for name, one in p.module.state_dict().items() if isinstance(one, Tensor)}
        described |= {"teacher": digest(weights), "tokenizer": tokenizer_digest(tokenizer)}
        described |= {"text": text_digest(key_of(one.prompt, one.completion or ()) for one in examples)}
        journal = Journal.of(path, {**described, "seed": seed * (draws is not None), "shard": _TOKENS_PER_SHARD})
        _refuse_other(path, journal.key)
        with locked(path, f"capture into `{path}`"):
            _refuse_other(path, journal.key)
            _write(p, examples, journal, described, seed, say)
    found = StoredTeacher.open(path, tokenizer=tokenizer)
    found.merged = merged
    return found


def _kind(k: int | None, draws: int | None) -> dict[str, Any]:
    """Return what is kept of each law."""
    if k is not None and draws is not None:
        raise InputError(cannot(f"keep `k={k}` tokens and `draws={draws}`", "a law is stored in one way", "Give one of them"))
    for name, value in (("k", k), ("draws", draws)):
        if value is not None and not 0 < value < 1 << 15:
            raise InputError(cannot(f"use `{name}={value}`", "it lies between 1 and 32,767", f"Give, say, {name}=32"))
    return {"k": 32 if k is None and draws is None else k, "draws": draws}


def _examples(data: Any, tokenizer: Any, tokens: int, end: int) -> tuple[list[Example], int]:
    """Read the examples, each once, the shortest first, so that a batch has little padding; and count those given again."""
    found, given = {}, read_examples(data, tokenizer, tokens, end)
    for one in given:
        if one.completion is None:
            because = f"{one.place} is a prompt without a completion"
            instead = "Add what the teacher is to be asked about, say its own continuation"
            raise InputError(cannot("capture the teacher on these data", because, instead))
        found[key_of(one.prompt, one.completion)] = one
    ordered = sorted(found.values(), key=lambda one: (len(one.prompt) + len(one.completion or ()), one.prompt, one.completion))
    return ordered, len(given) - len(ordered)


def _refuse_other(folder: Path, key: str) -> None:
    """Refuse a folder that holds anything but this capture."""
    own = re.compile(rf"{key}|{re.escape(MANIFEST)}|{re.escape(LOCK)}|{re.escape(TEMPORARY + MANIFEST)}-\w{{8}}")
    entries = folder.iterdir() if folder.exists() else ()
    other = sorted(one.name for one in entries if one.is_symlink() or not own.fullmatch(one.name))
    if other:
        is_capture = re.fullmatch(r"[0-9a-f]{16}", other[0]) is not None
        what = "the capture of another teacher, text or setting" if is_capture else f"something else, `{other[0]}`"
        raise InputError(cannot(f"capture into `{folder}`", f"the folder holds {what}", "Name a new or empty folder"))


def _write(
    p: CausalModel,
    examples: Sequence[Example],
    journal: Journal,
    described: dict[str, Any],
    seed: int,
    say: Callable[[str, float], None],
) -> None:
    """Compute the shards that aren't there, and the file that names them all."""
    side = Side.of(p, torch.tensor([examples[0].prompt], dtype=torch.int64, device="cpu"))
    shards, mass, done = [], [], 0

    def tell(more: int = 0) -> None:
        say("asking the teacher", (done + more) / described["tokens"])

    for number, part in enumerate(_parts(examples)):
        name, length = f"shard-{number:05d}", sum(len(one.completion or ()) for one in part)
        found = journal.load(name, partial(_known, described, length))
        if found is None:
            generator = torch.Generator(p.device).manual_seed(seed + 104_729 * number)
            tensors, found = _captured(p, side, part, described, generator, tell)
            journal.save(name, tensors, found)
        done += length
        tell()
        data, file = read_file(journal.path(name)), journal.path(name).relative_to(journal.folder).as_posix()
        shards.append({"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "tokens": length})
        mass.append(found)
    body = {**described, "shards": shards, "end_tokens": list(described["end_tokens"])}
    body["mass"] = {"mean": sum(one["mass"] for one in mass) / described["tokens"], "min": min(one["least"] for one in mass)}
    text = json.dumps({**plain(body), "checksum": checksum(plain(body))}, indent=1, allow_nan=False)
    write_whole(journal.folder / MANIFEST, text.encode())
    for left in journal.path("x").parent.glob(f"{TEMPORARY}*"):
        remove_own(left, lambda name: name.startswith(f"{TEMPORARY}shard-"))


def _parts(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Split the examples into shards."""
    part: list[Example] = []
    size = 0
    for one in examples:
        part.append(one)
        size += len(one.completion or ())
        if size >= _TOKENS_PER_SHARD:
            yield part
            part, size = [], 0
    if part:
        yield part


def _known(described: dict[str, Any], tokens: int, tensors: dict[str, Tensor], notes: dict[str, Any]) -> dict[str, float]:
    """Check a shard of an earlier call."""
    check_shard(tensors, described, tokens)
    return {"mass": float(notes["mass"]), "least": float(notes["least"])}


def _captured(
    p: CausalModel,
    side: Side,
    part: Sequence[Example],
    described: dict[str, Any],
    generator: torch.Generator,
    say: Callable[[int], None],
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Ask the teacher about a shard's sequences; return the tensors to store, and the probability of the stored tokens."""
    laws: list[dict[str, Tensor]] = []
    longest = max(len(one.prompt) + len(one.completion or ()) for one in part)
    step = _MAX_ROWS_PER_CALL if side.head else max(1, min(_MAX_ROWS_PER_CALL, _NUMBERS_PER_CALL // (longest * p.tokens)))
    done = 0
    for first in range(0, len(part), step):
        rollouts = together([one.to_dict() for one in part[first : first + step]])
        with torch.no_grad():
            rows = rows_of(p, p.module, side, rollouts)
            laws += [_kept(law, described, generator) for law in _laws(rows, side, p.tokens, described["temperature"])]
        done += len(rows)
        say(done)
    stored = {name: torch.cat([law[name] for law in laws]) for name in laws[0]}
    mass = stored.pop("mass")
    lengths = {"prompt": [len(one.prompt) for one in part], "completion": [len(one.completion or ()) for one in part]}
    lengths["ids"] = [token for one in part for token in (*one.prompt, *(one.completion or ()))]
    stored |= {name: torch.tensor(values, dtype=torch.int32, device="cpu") for name, values in lengths.items()}
    return stored, {"mass": float(mass.sum()), "least": float(mass.min())}


def _laws(rows: Tensor, side: Side, tokens: int, temperature: float) -> Iterator[Float[Tensor, "r v"]]:
    """Yield the log-probabilities of rows, some at a time; products are summed in float32 or float64, as in training."""
    if side.head is None:
        yield (widened(rows[:, :tokens]) / temperature).log_softmax(-1)
        return
    weight, bias = side.head.weight[:tokens], None if side.head.bias is None else side.head.bias[:tokens]
    head = Head(rows, weight, bias, side.head.scale, side.head.cap)
    for part in torch.arange(len(rows), device=rows.device).split(max(1, _NUMBERS_PER_CALL // tokens)):
        product = rows.new_empty((len(part), tokens), dtype=accumulating(rows, weight))
        with torch.autocast(rows.device.type, enabled=False):
            head.project(part, product)
            yield head.log_probs(product, temperature)[0]


def _kept(log_p: Float[Tensor, "r v"], described: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Return what is kept of some laws, and the probability of the kept tokens."""
    if bool(log_p.isnan().any()):
        because = "its logits are NaN, or infinite, for some of the data"
        raise InputError(cannot("capture this teacher", because, "Look at its weights and its dtype"))
    if described["draws"]:
        law, mass = _drawn(log_p, described["draws"], generator)
    else:
        kept = TopK.of(log_p, described["k"])
        rest = kept.log_rest.float()  # type: ignore[union-attr]
        law = {"log_probs": kept.log_probs.float(), "indices": kept.indices.int(), "log_rest": rest}
        mass = -torch.expm1(rest.double())
    return {name: one.cpu() for name, one in {**law, "mass": mass}.items()}


def _drawn(log_p: Float[Tensor, "r v"], draws: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Float[Tensor, " r"]]:
    """Draw tokens of each law with replacement; return the distinct ones with their counts, and their probability."""
    n, v = log_p.shape
    token = torch.multinomial(log_p.double().exp(), draws, replacement=True, generator=generator)
    row = torch.arange(n, device=log_p.device)
    cell, counts = torch.unique_consecutive((row[:, None] * v + token).sort(1).values.flatten(), return_counts=True)
    at, indices = cell // v, cell % v
    log_probs = log_p[at, indices]
    law = {"indices": indices.int(), "counts": counts.short(), "log_probs": log_probs.float()}
    law["distinct"] = torch.bincount(at, minlength=n).int()
    return law, torch.bincount(at, log_probs.double().exp(), n)
