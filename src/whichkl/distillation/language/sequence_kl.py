"""Sequence KL: how far two language models are from each other over whole continuations, both ways, with errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._arguments import typed
from whichkl._checks import InputError, as_int, cannot, check_seed, plain
from whichkl.distillation.language.causal import CausalModel, agree, evaluating, taught_by
from whichkl.distillation.language.clusters import clusters_of, notes_on
from whichkl.distillation.language.control_variate import PromptSums
from whichkl.distillation.language.examples import read_examples, together
from whichkl.distillation.language.measures import Draws, measured, nll_of, read_rows
from whichkl.distillation.language.prompts import WANTED, all_of, read_prompts
from whichkl.distillation.language.rollouts import Rollouts, continued
from whichkl.distillation.networks import digest
from whichkl.distillation.scores import Contrast
from whichkl.divergences import Estimate
from whichkl.files.reading import rebuilt
from whichkl.printable import HTML
from whichkl.process.torch_modes import plain_modes
from whichkl.solvers.descent import state_of

_NUMBERS_PER_CALL = 1 << 25
"""Logits of one model per call: 128 MB in float32."""
_MAX_ROWS_PER_CALL = 64
_MIN_PROMPTS = 2
MIN_CUT = 0.01
"""Share of cut draws from which on the KL of whole sequences may be noticeably larger."""
_ROUNDING = 2.0**-23
"""Of one token's log probability in float32."""


@dataclass(frozen=True)
class SequenceKL(HTML):
    """KL between two language models over continuations of the same prompts, in nats, and what goes with it."""

    forward_kl: Estimate
    """KL(teacher‖student) of a sequence, the mean over prompts."""
    reverse_kl: Estimate
    """KL(student‖teacher) of a sequence."""
    forward_kl_per_token: Estimate
    """The same divided by the mean length of the teacher's continuations."""
    reverse_kl_per_token: Estimate
    """Divided by the mean length of the student's continuations."""
    cut: dict[str, float]
    """The share of each model's continuations that reached the largest length before an end token."""
    measures: dict[str, Contrast]
    """Of both models: entropy and length of a sequence, distinct bigrams; on the teacher's draws nll and ece; and data_nll, on
    the data's completions, where these were given."""
    agreement: Estimate
    """Share of tokens of the teacher's draws at which both find the same token likeliest."""
    prompts: int
    samples: int
    max_new_tokens: int

    @property
    def per(self) -> str:
        """What the KLs are of."""
        return "sequence"

    @property
    def clusters(self) -> int:
        """The number of independent units: distinct prompts, or draws where there is one prompt."""
        return self.agreement.n or self.prompts

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        fields: dict[str, Any] = plain(asdict(self))
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SequenceKL:
        """Rebuild it from `to_dict`."""
        return rebuilt(cls, fields)

    def __repr__(self) -> str:
        return f"SequenceKL(forward_kl={self.forward_kl.number}, reverse_kl={self.reverse_kl.number}, prompts={self.prompts})"

    def __str__(self) -> str:
        """The divergences, then the measures as a table of both models."""
        lines = [f"{self.prompts:,} prompts × {self.samples}, at most {self.max_new_tokens} new tokens"]
        for one, per in ((self.forward_kl, self.forward_kl_per_token), (self.reverse_kl, self.reverse_kl_per_token)):
            direction = "teacher‖student" if one is self.forward_kl else "student‖teacher"
            lines.append(f"  {one.quantity} KL({direction})   {one.number} nats a sequence, {per.number} a token")
        lines.append(f"  same likeliest token   {self.agreement.number} of the tokens of the teacher's draws")
        lines.append(f"  {'':<22}{'teacher':>22}{'student':>22}{'student − teacher':>22}")
        for name, both in self.measures.items():
            difference = "–" if both.difference is None else both.difference.number
            lines.append(f"  {name.replace('_', ' '):<22}{both.teacher.number:>22}{both.student.number:>22}{difference:>22}")
        lines += [f"  {note}" for note in dict.fromkeys((*self.forward_kl.notes, *self.reverse_kl.notes))]
        return "\n".join(lines)


@plain_modes()
@typed
def sequence_kl(
    *,
    teacher: Any,
    student: Any,
    tokenizer: Any = None,
    prompts: Any,
    max_new_tokens: int = 64,
    samples: int = 1,
    vocabulary: int | None = None,
    seed: int = 0,
    memo: dict[Any, Any] | None = None,
    tell: Callable[[str, float], None] | None = None,
) -> SequenceKL:
    """Estimate KL(teacher‖student) and KL(student‖teacher) over whole continuations, with errors that hold.

    KL(p‖q) = E_{y∼p} Σₜ KL(pₜ‖qₜ), pₜ the law of token t after the drawn ones, until the end token or `max_new_tokens`. The
    mean over draws is Rao-Blackwellised; M = Σₜ (log pₜ(yₜ)/qₜ(yₜ) − KLₜ) has mean 0, and b M is added with the b that makes the
    variance least, from other draws; b is 0 where these are few. Errors take distinct prompts as the independent units. Draws
    are untempered, from the whole softmax, whatever a model's generation configuration says. Dropout is off meanwhile; modules
    and global seeds are as before afterwards.

    Args:
        teacher: p, a causal language model of transformers, or a module of `input_ids` (n, t) with logits (n, t, v).
        student: q, the same; its number of logits may differ by padding.
        tokenizer: that of both models; None where prompts are token ids and both have as many logits.
        prompts: texts, conversations or lists of token ids, two at least; some hundred give an error of a few per cent. Or
            examples, {'prompt': …, 'completion': …}: then `measures` has ``"data_nll"``, of the completions.
        max_new_tokens: where continuations are cut. The KL of cut sequences is a lower bound of that of whole ones.
        samples: continuations of every prompt, from each model.
        vocabulary: the number of tokens, where there is no tokenizer and widths differ by padding.
        seed: fixes the draws.
        memo: a dict that several calls share, {} in the first. The teacher's continuations of the same prompts are drawn once,
            and students of the same weights are compared once.
        tell: called with the present step, and the fraction of it that is done.

    Raises:
        InputError: the models can't be compared (other tokens, other end tokens), or prompts can't be read.

    Source: Amini, Vieira & Cotterell (2025), "Better estimation of the KL divergence between language models"; control variates
    as in Owen (2013), chapter 8.

    >>> class Unigram(torch.nn.Module):
    ...     def __init__(self, *chances):
    ...         super().__init__()
    ...         self.row = torch.tensor(chances).log()
    ...         self.config = type("Config", (), {"eos_token_id": 0})
    ...     def forward(self, input_ids):
    ...         return self.row.expand(*input_ids.shape, -1)
    >>> found = sequence_kl(teacher=Unigram(0.5, 0.5), student=Unigram(0.75, 0.25), prompts=[[1]] * 200, max_new_tokens=30)
    >>> truth = 2 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))  # a KL a token, two tokens a sequence
    >>> abs(found.forward_kl.value - truth) < 4 * found.forward_kl.stderr
    True
    """
    most, times, seed = _positive("max_new_tokens", max_new_tokens), _positive("samples", samples), check_seed(seed)
    q = CausalModel(student, "student")
    p = taught_by(teacher, q)
    say, kept = tell or (lambda step, done: None), {} if memo is None else memo
    with evaluating(p, q):
        ends = agree(p, q, tokenizer, vocabulary)
        ids, completions = _read(prompts, tokenizer, p.tokens, ends[0])
        # an id is another object's once its own is gone: the memo holds the teacher
        key = (id(kept.setdefault(id(p.module), p.module)), tuple(map(tuple, ids)), ends, most, times, seed)
        whole = (*key, completions is not None, None if memo is None else digest(state_of(q.module)))
        if whole not in kept:
            found = _compared(p, q, ids, ends, most, times, seed, kept.setdefault(key, {}), say)
            if completions is not None:
                found.measures["data_nll"] = _of_data(p, q, ids, completions, most)
            kept[whole] = found
        compared: SequenceKL = kept[whole]
        return compared


def _read(prompts: Any, tokenizer: Any, tokens: int, end: int) -> tuple[list[list[int]], list[list[int]] | None]:
    """Return the prompts, and what followed them where all are examples."""
    given = all_of(prompts, "read the prompts", WANTED)
    if not given or not all(isinstance(one, Mapping) for one in given):
        return read_prompts(given, tokenizer, tokens), None
    examples = read_examples(given, tokenizer, tokens, end)
    completions = [one.completion for one in examples if one.completion is not None]
    return [one.prompt for one in examples], completions if len(completions) == len(examples) else None


def _of_data(
    p: CausalModel, q: CausalModel, ids: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], most: int
) -> Contrast:
    """Compare what both models say about the data's completions."""
    pairs = [{"prompt": prompt, "completion": completion} for prompt, completion in zip(ids, completions, strict=True)]
    step = _rows_per_call(p, max(map(len, ids)) + most)
    found = Draws.joined([evaluated(p, q, together(pairs[first : first + step], most)) for first in range(0, len(pairs), step)])
    return nll_of("data_nll", found.log_prob, found.tokens, clusters_of(ids))


def _rows_per_call(model: CausalModel, length: int) -> int:
    return max(1, min(_MAX_ROWS_PER_CALL, _NUMBERS_PER_CALL // (length * max(1, model.tokens))))


def _compared(
    p: CausalModel,
    q: CausalModel,
    ids: Sequence[Sequence[int]],
    ends: Sequence[int],
    most: int,
    times: int,
    seed: int,
    drawn: dict[int, Rollouts],
    say: Callable[[str, float], None],
) -> SequenceKL:
    """Draw from both models, evaluate both on all draws, and average; `drawn` keeps the teacher's."""
    if len(ids) < _MIN_PROMPTS:
        raise InputError(cannot("estimate a sequence KL", "an error needs two prompts", "Give some hundred"))
    draws = {}
    for side, (one, other, kept) in enumerate(((p, q, drawn), (q, p, {}))):
        tell = partial(say, f"continuations of the {one.who}")
        draws[one.who] = _drawn(one, other, [*ids] * times, ends, most, seed + side, kept, tell)
    prompt = clusters_of([*ids] * times)
    (forward, forward_token), (reverse, reverse_token) = (
        _estimates(name, draws[who], prompt, most) for name, who in (("forward_kl", "teacher"), ("reverse_kl", "student"))
    )
    cut = {who: float(one.cut.double().mean()) for who, one in draws.items()}
    measures, agreement = measured(draws["teacher"], draws["student"], prompt)
    return SequenceKL(forward, reverse, forward_token, reverse_token, cut, measures, agreement, len(ids), times, most)


def _positive(name: str, value: Any) -> int:
    found: Any = as_int(value)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        because = "it must be a whole number of at least 1"
        raise InputError(cannot(f"use `{name}={value!r}`", because, f"Give, say, {name}=64"))
    return found


def _drawn(
    drawing: CausalModel,
    other: CausalModel,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    most: int,
    seed: int,
    kept: dict[int, Rollouts],
    say: Callable[[float], None],
) -> Draws:
    """Draw continuations from one model, and evaluate both on them, part by part."""
    step = _rows_per_call(drawing, max(map(len, prompts)) + most)
    parts = []
    for number, first in enumerate(range(0, len(prompts), step)):
        # a seed of its own for each part, so that what the first ones drew has no part in the next
        if first not in kept:
            kept[first] = continued(drawing, prompts[first : first + step], ends, most, _mixed(seed, number))
        parts.append(evaluated(drawing, other, kept[first]))
        say(min(1.0, (first + step) / len(prompts)))
    return Draws.joined(parts)


def _mixed(seed: int, number: int) -> int:
    return int(torch.randint(2**31, (number + 1,), generator=torch.Generator().manual_seed(seed), device="cpu")[-1])


def evaluated(drawing: CausalModel, other: CausalModel, rollouts: Rollouts) -> Draws:
    """Return what both models say about drawn tokens; the logits of a place are those of the token after it."""
    where = rollouts.drawn[:, 1:].nonzero()
    sides: list[Float[Tensor, "m v"]] = []
    for one in (drawing, other):
        logits = one.logits(rollouts.ids, rollouts.mask)
        sides.append(logits[where[:, 0], where[:, 1]].float().cpu())
    return read_rows(sides[0], sides[1], rollouts, where[:, 0])


def _estimates(name: str, draws: Draws, prompt: Tensor, most: int) -> tuple[Estimate, Estimate]:
    """Return the KL per sequence and per token."""
    method = "Rao-Blackwellised, with a cross-fitted control variate, clustered by prompt"
    side = "teacher" if name == "forward_kl" else "student"
    n, notes, share = len(draws.tokens), [], float(draws.cut.double().mean())
    if share > 0:
        notes.append(
            f"{share:.1%} of the {side}'s draws were cut at {most} tokens: {name} is a lower bound of that of whole ones"
        )
    if not bool(draws.conditional.isfinite().all()):
        places = int((~draws.conditional.isfinite()).sum())
        notes.append(f"infinite in {places} of {n} draws, where the other model gives a possible token no chance")
        one = Estimate(name, math.inf, finite="infinite", method=method, n=n, notes=tuple(notes))
        return one, one
    notes += notes_on(int(prompt.max()) + 1)
    sums = PromptSums(prompt, draws.conditional, draws.log_ratio, draws.tokens)
    found = []
    rounding = _ROUNDING * float(draws.tokens.double().mean())
    for value, error in (sums.per_sequence(), sums.per_token()):
        fields: dict[str, Any] = {"method": method, "n": n, "notes": tuple(notes), "reliable": share < MIN_CUT}
        found.append(Estimate(name, value, math.hypot(error, rounding), **fields))
    return found[0], found[1]
