"""Stored teachers: the k likeliest tokens with the mass of the rest, or tokens sampled from the teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.divergences.divergence import LogProbs, RowDivergence, Rows

Mask = Bool[Tensor, "..."]


@dataclass(frozen=True)
class TopK:
    """The teacher's k likeliest tokens of each row; all others are one bucket that holds the rest, never renormalised.

    Every divergence that obeys the data-processing inequality is then a lower bound of the full one, at least 0, and sees mass
    that the student puts outside the k tokens.

    Args:
        log_probs: (…, k), the teacher's log-probabilities in nats, normalised over the whole vocabulary.
        indices: (…, k), which tokens; each once in a row.
        temperature: the one that the probabilities are for. The rest can't be taken to another one.
        log_rest: (…), log of the mass of the other tokens; computed from `log_probs` if it isn't given, which can't
            distinguish a rest below rounding from rounding.

    Raises:
        InputError: shapes or dtypes don't match.
    """

    log_probs: Float[Tensor, "... k"]
    indices: Int[Tensor, "... k"]
    temperature: float = 1.0
    log_rest: Rows | None = None

    def __post_init__(self) -> None:
        """Check the shapes."""
        _check_stored("top-k", self.log_probs, self.indices)
        if self.log_rest is not None and self.log_rest.shape != self.log_probs.shape[:-1]:
            because = f"log_rest has shape {tuple(self.log_rest.shape)}, log_probs {tuple(self.log_probs.shape)}"
            raise InputError(cannot("use this top-k", because, "Pass one log mass a row"))

    @classmethod
    def of(cls, logits: LogProbs, k: int, temperature: float = 1.0) -> Self:
        """Keep the k likeliest tokens of each row of logits, and the exact mass of the rest.

        >>> kept = TopK.of(torch.tensor([[2.0, 1.0, 0.0, 0.0]]), k=2)
        >>> kept.indices, kept.log_rest.exp()
        (tensor([[0, 1]]), tensor([0.1652]))
        """
        if not 0 < k <= logits.shape[-1]:
            raise InputError(cannot(f"keep k={k} tokens", f"there are {logits.shape[-1]}", "Pass 1 ≤ k ≤ the vocabulary"))
        log_p = torch.log_softmax(widened(logits) / temperature, -1)
        log_probs, indices = log_p.topk(k, -1)
        return cls(log_probs, indices, temperature, log_p.scatter(-1, indices, -math.inf).logsumexp(-1))

    def check(self, vocabulary: int, mask: Mask | None) -> None:
        """Refuse rows that count and can't be log-probabilities of `vocabulary` tokens, each once.

        Raises:
            InputError: a row that counts can't be used.
        """
        _check_rows("top-k", self.log_probs, self.indices, vocabulary, mask, distinct=True)

    def value(self, divergence: RowDivergence, log_q: LogProbs) -> Rows:
        """Return the divergence of each row between k + 1 buckets."""
        if not divergence.coarsens:
            because = "it needs the teacher's whole row, and merged tokens don't bound it"
            raise InputError(cannot(f"use {divergence.name} with a top-k teacher", because, "Use for example `forward_kl`"))
        log_probs = self.log_probs.to(log_q.dtype)
        indices = self.indices.long()
        rest = log_q.scatter(-1, indices, -math.inf)
        nothing = (rest == -math.inf).all(-1, keepdim=True)  # every token kept, or the others impossible
        log_left = rest.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True).masked_fill(nothing, -math.inf)
        teacher = torch.cat([log_probs, self._log_rest(log_probs, log_q.shape[-1])], -1)
        return divergence.value(teacher, torch.cat([log_q.gather(-1, indices), log_left], -1))

    def _log_rest(self, log_probs: LogProbs, vocabulary: int) -> LogProbs:
        if self.log_rest is not None:
            return self.log_rest.to(log_probs.dtype)[..., None]
        if log_probs.shape[-1] == vocabulary:
            return torch.full_like(log_probs[..., :1], -math.inf)
        mass = self.log_probs.exp().sum(-1, keepdim=True)
        return (1 - mass).clamp(min=torch.finfo(self.log_probs.dtype).eps).log().to(log_probs.dtype)


@dataclass(frozen=True)
class SampledTokens:
    """Tokens drawn for each row, from the teacher or from any proposal that covers it: an unbiased replacement for the row.

    A divergence that is a sum over tokens, Σ h, is estimated by the mean of h/r over tokens from r, without bias in value and
    gradient, since the student's normaliser is exact. Source: Anshumann et al., Sparse logit sampling (2025).

    Args:
        indices: (…, n), the tokens drawn, with repeats.
        log_probs: (…, n), the teacher's log-probabilities of them in nats, normalised over the whole vocabulary.
        temperature: the one that the teacher's probabilities are for.
        log_proposal: (…, n), log r of the tokens; None: they were drawn from the teacher itself, r = p.

    Raises:
        InputError: shapes or dtypes don't match.
    """

    indices: Int[Tensor, "... n"]
    log_probs: Float[Tensor, "... n"]
    temperature: float = 1.0
    log_proposal: Float[Tensor, "... n"] | None = None

    def __post_init__(self) -> None:
        """Check the shapes."""
        _check_stored("sample of tokens", self.log_probs, self.indices)
        if self.log_proposal is not None and self.log_proposal.shape != self.log_probs.shape:
            because = f"log_proposal has shape {tuple(self.log_proposal.shape)}, log_probs {tuple(self.log_probs.shape)}"
            raise InputError(cannot("use this sample of tokens", because, "Pass one log-probability for each token drawn"))

    def check(self, vocabulary: int, mask: Mask | None) -> None:
        """Refuse rows that count and can't be log-probabilities of `vocabulary` tokens.

        Raises:
            InputError: a row that counts can't be used.
        """
        _check_rows("sample of tokens", self.log_probs, self.indices, vocabulary, mask, distinct=False)

    def value(self, divergence: RowDivergence, log_q: LogProbs) -> Rows:
        """Return the estimate of each row, which may be below 0."""
        if not divergence.sums:
            because = "it isn't a sum over tokens, so that a sample would bias it"
            raise InputError(cannot(f"use {divergence.name} with sampled tokens", because, "Use for example `forward_kl`"))
        log_p = self.log_probs.to(log_q.dtype)
        weight = log_p if self.log_proposal is None else self.log_proposal.to(log_q.dtype)
        return (divergence.terms(log_p, log_q.gather(-1, self.indices.long())) * (-weight).exp()).mean(-1)


def widened(x: Tensor) -> Tensor:
    """float64 as it is, everything narrower as float32."""
    return x if x.dtype == torch.float64 else x.float()


def _check_stored(what: str, log_probs: Tensor, indices: Tensor) -> None:
    if indices.shape != log_probs.shape or indices.dtype not in (torch.int64, torch.int32):
        because = f"indices are {indices.dtype} {tuple(indices.shape)}, log_probs {tuple(log_probs.shape)}"
        raise InputError(cannot(f"use this {what}", because, "Pass integer tokens, one for each log-probability"))
    if not log_probs.is_floating_point() or log_probs.dim() == 0 or log_probs.shape[-1] == 0:
        raise InputError(cannot(f"use this {what}", "it holds no log-probabilities", "Pass floats of shape (…, k), k ≥ 1"))


def _check_rows(what: str, log_probs: Tensor, indices: Tensor, vocabulary: int, mask: Tensor | None, *, distinct: bool) -> None:
    """Check the numbers, which a compiled graph can't."""
    if torch.compiler.is_compiling():
        return
    if mask is not None:  # rows that don't count may hold anything
        log_probs, indices = log_probs[mask], indices[mask]
    if indices.numel() == 0:
        return
    low, high = (int(end) for end in indices.aminmax())
    if low < 0 or high >= vocabulary:
        because = f"it names token {low if low < 0 else high}, and the student has {vocabulary}, counted from 0"
        raise InputError(
            cannot(f"use this {what}", because, "Pass indices into the student's vocabulary; leave rows out by `mask`")
        )
    exact = log_probs.dtype in (torch.float32, torch.float64)
    most = (log_probs.detach().double().logsumexp(-1) if distinct else log_probs.detach().double()).exp().max().item()
    if most > 1 + (1e-3 if exact else 0.05):
        because = f"the tokens of a row hold a probability of {most:.3g}"
        raise InputError(
            cannot(f"use this {what}", because, "Pass log-probabilities: `log_softmax` of logits, the log of probabilities")
        )
    if distinct and bool((indices.sort(-1).values.diff(dim=-1) == 0).any()):
        because = "a row names a token twice, so that its probability would count twice"
        raise InputError(cannot(f"use this {what}", because, "Pass each token once a row; `SampledTokens` takes repeats"))
