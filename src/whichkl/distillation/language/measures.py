"""Measures: what two language models say about drawn tokens, and how their continuations differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whichkl.distillation.language.clusters import ratio_of_sums
from whichkl.distillation.language.rollouts import Rollouts
from whichkl.distillation.losses import forward_kl
from whichkl.distillation.scores import BINS, Contrast
from whichkl.divergences import Estimate

_RESAMPLES = 200


@dataclass(frozen=True)
class Draws:
    """Continuations drawn from one model, a number per sequence, or a row per sequence and bin of confidence."""

    tokens: Int[Tensor, " n"]
    cut: Bool[Tensor, " n"]
    conditional: Float[Tensor, " n"]
    """Σₜ KL(drawing‖other) of the next token's laws."""
    log_ratio: Float[Tensor, " n"]
    """Σₜ log drawing − log other, at the drawn tokens."""
    entropy: Float[Tensor, " n"]
    """Σₜ of the drawing model's entropies."""
    agreed: Float[Tensor, " n"]
    """The number of tokens at which both find the same one likeliest."""
    distinct: Float[Tensor, " n"]
    """The share of distinct pairs of neighbouring tokens within the continuation; 1 without a pair."""
    log_prob: Float[Tensor, "n 2"]
    """Σₜ log probability of the drawn tokens, by the drawing model and by the other."""
    counts: Float[Tensor, "n 2 bins"]
    """The number of tokens by the confidence of the drawing model, and of the other."""
    excess: Float[Tensor, "n 2 bins"]
    """Hits less confidence, summed in those bins."""

    @classmethod
    def joined(cls, parts: Sequence[Draws]) -> Draws:
        """Put parts after each other."""
        return cls(*(torch.cat([getattr(part, one.name) for part in parts]) for one in fields(cls)))


def read_rows(own: Float[Tensor, "m v"], other: Float[Tensor, "m v"], rollouts: Rollouts, sequence: Int[Tensor, " m"]) -> Draws:
    """Sum over the drawn tokens of each sequence; `own` and `other` are logits of the drawing model and of the other."""
    n = len(rollouts.ids)
    token = rollouts.ids[rollouts.drawn]
    log_own, log_other = own.log_softmax(-1), other.log_softmax(-1)

    def summed(values: Tensor) -> Float[Tensor, " n"]:
        return torch.zeros(n, dtype=torch.float64, device="cpu").index_add_(0, sequence, values.double())

    at = [one.gather(1, token[:, None])[:, 0] for one in (log_own, log_other)]
    entropy = -torch.where(log_own > -math.inf, log_own.exp() * log_own, 0.0 * log_own.exp()).sum(-1)
    bins = [_binned(one, token, sequence, n) for one in (log_own, log_other)]
    return Draws(
        tokens=rollouts.end - rollouts.begin,
        cut=rollouts.cut,
        conditional=summed(forward_kl(teacher=own, student=other, reduction="none")),
        log_ratio=summed(at[0] - at[1]),
        entropy=summed(entropy),
        agreed=summed(own.argmax(-1) == other.argmax(-1)),
        distinct=_distinct(rollouts),
        log_prob=torch.stack([summed(one) for one in at], 1),
        counts=torch.stack([one[0] for one in bins], 1),
        excess=torch.stack([one[1] for one in bins], 1),
    )


def _binned(
    log_prob: Float[Tensor, "m v"], token: Int[Tensor, " m"], sequence: Int[Tensor, " m"], n: int
) -> tuple[Float[Tensor, "n bins"], Float[Tensor, "n bins"]]:
    """Return the number of tokens per sequence and bin of confidence, and hits less confidence."""
    confidence, chosen = log_prob.max(-1)
    confidence = confidence.double().exp()
    place = sequence * BINS + ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    gain = (chosen == token).double() - confidence
    return (
        torch.bincount(place, minlength=n * BINS).double().view(n, BINS),
        torch.bincount(place, gain, minlength=n * BINS).view(n, BINS),
    )


def _distinct(rollouts: Rollouts) -> Float[Tensor, " n"]:
    found = []
    for row, first, last in zip(rollouts.ids.tolist(), rollouts.begin.tolist(), rollouts.end.tolist(), strict=True):
        pairs = list(zip(row[first : last - 1], row[first + 1 : last], strict=True))
        found.append(len(set(pairs)) / len(pairs) if pairs else 1.0)
    return torch.tensor(found, dtype=torch.float64, device="cpu")


def measured(teacher: Draws, student: Draws, prompt: Int[Tensor, " n"]) -> tuple[dict[str, Contrast], Estimate]:
    """Compare the draws of both models, prompt by prompt, and both on the teacher's draws."""

    def summed(values: Tensor) -> Float[Tensor, " k"]:
        return torch.bincount(prompt, values.double())

    def contrast(name: str, of_teacher: Tensor, of_student: Tensor, unit: str) -> Contrast:
        p, q, count = summed(of_teacher), summed(of_student), torch.bincount(prompt).double()
        return Contrast(*(ratio_estimate(name, one, count, unit, "mean over prompts") for one in (q, p, q - p)))

    found = {
        "entropy": contrast("entropy", teacher.entropy, student.entropy, "nats"),
        "length": contrast("length", teacher.tokens, student.tokens, "none"),
        "distinct_2": contrast("distinct_2", teacher.distinct, student.distinct, "none"),
        "nll": nll_of("nll", teacher.log_prob, teacher.tokens, prompt),
        "ece": _ece(teacher, prompt),
    }
    return found, per_token("agreement", summed(teacher.agreed), summed(teacher.tokens), "none")


def nll_of(name: str, log_prob: Float[Tensor, "n 2"], tokens: Int[Tensor, " n"], prompt: Int[Tensor, " n"]) -> Contrast:
    """Compare −log probability per token, from those of every sequence by teacher and student, and its number of tokens."""
    teacher, student, count = (torch.bincount(prompt, one.double()) for one in (*log_prob.unbind(1), tokens))
    return Contrast(*(per_token(name, -one, count, "nats") for one in (student, teacher, student - teacher)))


def cut_note(share: float, who: str, most: int, name: str) -> str:
    """Return what cut draws mean for a KL."""
    return f"{share:.1%} of the {who}'s draws were cut at {most} tokens: {name} is a lower bound of that of whole ones"


def per_token(name: str, sums: Float[Tensor, " k"], tokens: Float[Tensor, " k"], unit: str) -> Estimate:
    """Return the ratio of sums to tokens, both a number per prompt, with its error by linearisation."""
    return ratio_estimate(name, sums, tokens, unit, "per token, clustered by prompt")


def ratio_estimate(name: str, sums: Float[Tensor, " k"], units: Float[Tensor, " k"], unit: str, method: str) -> Estimate:
    """Return the ratio of sums to units, such as tokens or sequences, both a number per prompt."""
    if not bool(sums.isfinite().all()):
        return Estimate(name, math.inf, finite="infinite", method=method, n=len(sums), unit=unit)  # type: ignore[arg-type]
    ratio, error = ratio_of_sums(sums, units)
    return Estimate(name, ratio, error, method=method, n=len(sums), unit=unit)  # type: ignore[arg-type]


def _ece(draws: Draws, prompt: Int[Tensor, " n"]) -> Contrast:
    """Compare the expected calibration errors on the teacher's draws, with errors by bootstrap samples of the prompts."""
    k = int(prompt.max()) + 1
    gaps = torch.zeros(k, 2, BINS, dtype=torch.float64, device="cpu").index_add_(0, prompt, draws.excess)
    total = torch.zeros(k, dtype=torch.float64, device="cpu").index_add_(0, prompt, draws.tokens.double())
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(k, (_RESAMPLES, k), generator=generator, device="cpu")
    weight = torch.zeros(_RESAMPLES, k, dtype=torch.float64, device="cpu")
    weight.scatter_add_(1, chosen, torch.ones_like(weight))
    resampled = (torch.einsum("rk,ksb->rsb", weight, gaps).abs().sum(-1)) / (weight @ total)[:, None]
    p, q = (gaps.sum(0).abs().sum(-1) / total.sum()).tolist()
    errors = [float(one.std()) for one in (resampled[:, 1], resampled[:, 0], resampled[:, 1] - resampled[:, 0])]
    method = f"{BINS} bins of equal width on the teacher's draws, error by bootstrap of prompts"
    return Contrast(
        *(Estimate("ece", one, e, method=method, n=k, unit="none") for one, e in zip((q, p, q - p), errors, strict=True))
    )
