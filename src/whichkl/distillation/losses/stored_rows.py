"""Stored rows: a part of a teacher's rows that was kept, its likeliest tokens with the rest, or a sample of tokens."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.losses.reduction import Mask, refuse_transforms, widened
from whichkl.divergences.divergence import LogProbs, RowDivergence, Rows


class StoredRows(ABC):
    """Some tokens of each row, and the teacher's log-probabilities of them."""

    what: ClassVar[str]
    is_distinct: ClassVar[bool] = False
    """Whether a row must name each token once."""

    log_probs: Float[Tensor, "... k"]
    indices: Int[Tensor, "... k"]
    temperature: float

    @abstractmethod
    def value(self, divergence: RowDivergence, log_q: LogProbs) -> Rows:
        """Return the divergence of each row, from what is stored."""

    @abstractmethod
    def gradient(self, divergence: RowDivergence, log_q: LogProbs) -> tuple[Rows, LogProbs]:
        """Return the divergence of each row, and its gradient with respect to the student's logits (at temperature 1)."""

    def flat(self) -> Self:
        """Return it with one axis of rows."""
        axes = self.indices.dim() - 1
        return self._with(lambda one: one.reshape(-1, *one.shape[axes:]))

    def part(self, rows: slice | Tensor, like: Tensor) -> Self:
        """Return some rows, on the device of `like`."""
        return self._with(lambda one: one[rows].to(like.device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with changed tensors."""
        tensors = {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]
        changed = {name: change(one) for name, one in tensors.items() if isinstance(one, Tensor)}
        found: Self = replace(self, **changed)  # type: ignore[type-var]
        return found

    def __post_init__(self) -> None:
        """Check the shapes."""
        log_probs, indices = self.log_probs, self.indices
        if indices.shape != log_probs.shape or indices.dtype not in (torch.int64, torch.int32):
            because = f"indices are {indices.dtype} {tuple(indices.shape)}, log_probs {tuple(log_probs.shape)}"
            raise InputError(cannot(f"use this {self.what}", because, "Pass integer tokens, one for each log-probability"))
        if not log_probs.is_floating_point() or log_probs.dim() == 0 or log_probs.shape[-1] == 0:
            instead = "Pass floats of shape (…, k), k ≥ 1"
            raise InputError(cannot(f"use this {self.what}", "it holds no log-probabilities", instead))

    def check_temperature(self, temperature: float | Tensor) -> None:
        """Refuse another temperature than the stored one."""
        if self.temperature != temperature:
            because = f"its probabilities are for temperature {self.temperature}, and the tokens left out are needed for another"
            instead = f"Store it with `temperature={temperature}`"
            raise InputError(cannot(f"use this stored teacher at temperature {temperature}", because, instead))

    @property
    def entries(self) -> Bool[Tensor, "... k"]:
        """Which places hold a token; by default all."""
        return torch.ones_like(self.indices, dtype=torch.bool)

    @abstractmethod
    def check_rows(self, counts: Mask, row: Callable[[Tensor], str]) -> None:
        """Refuse rows that count and stand for no distribution; `row` names the first of them that is True."""

    def check(self, vocabulary: int, mask: Mask | None) -> None:
        """Refuse rows that count and can't be log-probabilities of `vocabulary` tokens."""
        if torch.compiler.is_compiling():  # a compiled graph can't look at numbers
            return
        refuse_transforms(f"use this {self.what}", "Call the loss on all rows at once", self.log_probs, self.indices)
        counts = torch.ones(self.indices.shape[:-1], dtype=torch.bool, device=self.indices.device) if mask is None else mask
        entries = self.entries[counts]
        # rows that don't count may hold anything
        log_probs, indices = self.log_probs.detach()[counts].masked_fill(~entries, -math.inf), self.indices[counts]
        if indices.numel() == 0:
            return

        def row(wrong: Bool[Tensor, " n"]) -> str:
            place = counts.nonzero()[int(wrong.nonzero()[0])].tolist()
            return f"row {place[0] if len(place) == 1 else tuple(place)}" if place else "the row"

        if bool(log_probs.isnan().any()):
            because = f"{row(log_probs.isnan().any(-1))} holds NaN"
            raise InputError(cannot(f"use this {self.what}", because, "Leave that row out by `mask`"))
        self.check_rows(counts, row)
        tokens = indices[entries]
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high >= vocabulary:
            because = f"it names token {low if low < 0 else high}, and the student has {vocabulary}, counted from 0"
            instead = "Pass indices into the student's vocabulary; leave rows out by `mask`"
            raise InputError(cannot(f"use this {self.what}", because, instead))
        exact, wide = log_probs.dtype in (torch.float32, torch.float64), log_probs.double()
        most = (wide.logsumexp(-1) if self.is_distinct else wide).exp().max().item()
        if most > 1 + (1e-3 if exact else 0.05):
            because = f"the tokens of a row hold a probability of {most:.3g}"
            instead = "Pass log-probabilities: `log_softmax` of logits, the log of probabilities"
            raise InputError(cannot(f"use this {self.what}", because, instead))
        k = indices.shape[-1]
        distinct = torch.where(entries, indices.long(), -1 - torch.arange(k, device=indices.device))
        if self.is_distinct and bool((distinct.sort(-1).values.diff(dim=-1) == 0).any()):
            because = "a row names a token twice, so that its probability would count twice"
            instead = "Pass each token once a row; `SampledTokens` takes repeats"
            raise InputError(cannot(f"use this {self.what}", because, instead))


@dataclass(frozen=True)
class TopK(StoredRows):
    """The teacher's k likeliest tokens of each row; all others are one bucket that holds the rest, never renormalised.

    Every divergence that obeys the data-processing inequality is then a lower bound of the full one, at least 0, and sees mass
    that the student puts outside the k tokens.

    Rows may keep different numbers of tokens, as a top-p does: a place with the index −1, or the log-probability −∞, is empty.
    The token that it may name belongs to the others.

    Args:
        log_probs: (…, k), the teacher's log-probabilities in nats, normalised over the whole vocabulary; −∞: no entry.
        indices: (…, k), which tokens; each once in a row; −1: no entry.
        temperature: the one that the probabilities are for. The rest can't be taken to another one.
        log_rest: (…), log of the mass of the other tokens; computed from `log_probs` if it isn't given, which can't
            distinguish a rest below rounding from rounding.

    Raises:
        InputError: shapes or dtypes don't match.
    """

    what: ClassVar[str] = "top-k"
    is_distinct: ClassVar[bool] = True

    log_probs: Float[Tensor, "... k"]
    indices: Int[Tensor, "... k"]
    temperature: float = 1.0
    log_rest: Rows | None = None

    def __post_init__(self) -> None:
        """Check the shapes."""
        super().__post_init__()
        if self.log_rest is not None and self.log_rest.shape != self.log_probs.shape[:-1]:
            because = f"log_rest has shape {tuple(self.log_rest.shape)}, log_probs {tuple(self.log_probs.shape)}"
            raise InputError(cannot("use this top-k", because, "Pass one log mass a row"))

    @property
    def entries(self) -> Bool[Tensor, "... k"]:
        """Which places hold a token: not −1, and of a probability above 0."""
        return (self.indices != -1) & (self.log_probs != -math.inf)

    def check_rows(self, counts: Mask, row: Callable[[Tensor], str]) -> None:
        """Refuse rows without an entry."""
        empty = ~self.entries[counts].any(-1)
        if bool(empty.any()):
            because = f"{row(empty)} has no entry: its log-probabilities are −∞ or its indices −1"
            raise InputError(cannot(f"use this {self.what}", because, "Leave that row out by `mask`"))

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

    def value(self, divergence: RowDivergence, log_q: LogProbs) -> Rows:
        """Return the divergence of each row between k + 1 buckets."""
        teacher, student, _ = self._buckets(divergence, log_q)
        return divergence.value(teacher, student).masked_fill(~self.entries.any(-1), math.nan)

    def gradient(self, divergence: RowDivergence, log_q: LogProbs) -> tuple[Rows, LogProbs]:
        """Return the divergence of each row between k + 1 buckets, and its gradient: the rest's is shared by chance."""
        teacher, student, indices = self._buckets(divergence, log_q)
        values, slope = divergence.gradient(teacher, student)
        left = student[..., -1:]
        shared = (log_q - left.masked_fill(left == -math.inf, 0.0)).exp() * slope[..., -1:]
        # an empty place repeats a token of its row
        own = slope[..., :-1].masked_fill(~self.entries, 0.0)
        return values, shared.scatter(-1, indices, 0.0).scatter_add(-1, indices, own)

    def _buckets(self, divergence: RowDivergence, log_q: LogProbs) -> tuple[LogProbs, LogProbs, Int[Tensor, "... k"]]:
        """Return the teacher's and the student's log-probabilities of k tokens and the rest, and which tokens those are."""
        if not divergence.coarsens:
            because = "it needs the teacher's whole row, and merged tokens don't bound it"
            raise InputError(cannot(f"use {divergence.name} with a top-k teacher", because, "Use for example `forward_kl`"))
        entries = self.entries
        log_probs = self.log_probs.to(log_q.dtype).masked_fill(~entries, -math.inf)
        # an empty place repeats a token of its row, so that nothing else leaves the rest
        first = self.indices.gather(-1, entries.long().argmax(-1, keepdim=True))
        indices = torch.where(entries, self.indices, first).clamp(min=0).long()
        rest = log_q.scatter(-1, indices, -math.inf)
        nothing = (rest == -math.inf).all(-1, keepdim=True)  # every token kept, or the others impossible
        log_left = rest.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True).masked_fill(nothing, -math.inf)
        if self.log_rest is not None:
            log_rest = self.log_rest.to(log_q.dtype)[..., None]
        else:
            mass = self.log_probs.exp().masked_fill(~entries, 0.0).sum(-1, keepdim=True)
            log_rest = (1 - mass).clamp(min=torch.finfo(self.log_probs.dtype).eps).log().to(log_q.dtype)
            if log_probs.shape[-1] == log_q.shape[-1]:
                log_rest = log_rest.masked_fill(entries.all(-1, keepdim=True), -math.inf)
        kept = log_q.gather(-1, indices).masked_fill(~entries, -math.inf)
        return torch.cat([log_probs, log_rest], -1), torch.cat([kept, log_left], -1), indices


@dataclass(frozen=True)
class SampledTokens(StoredRows):
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

    what: ClassVar[str] = "sample of tokens"

    indices: Int[Tensor, "... n"]
    log_probs: Float[Tensor, "... n"]
    temperature: float = 1.0
    log_proposal: Float[Tensor, "... n"] | None = None

    def __post_init__(self) -> None:
        """Check the shapes."""
        super().__post_init__()
        if self.log_proposal is not None and self.log_proposal.shape != self.log_probs.shape:
            because = f"log_proposal has shape {tuple(self.log_proposal.shape)}, log_probs {tuple(self.log_probs.shape)}"
            raise InputError(cannot("use this sample of tokens", because, "Pass one log-probability for each token drawn"))

    def check_rows(self, counts: Mask, row: Callable[[Tensor], str]) -> None:
        """Refuse tokens that can't have been drawn."""
        drawn_by, whose = (self.log_probs, "teacher's") if self.log_proposal is None else (self.log_proposal, "proposal's")
        never = (drawn_by.detach()[counts] == -math.inf).any(-1)
        if bool(never.any()):
            because = f"{row(never)} holds a token whose log-probability, the {whose}, is −∞, so that it can't have been drawn"
            raise InputError(cannot(f"use this {self.what}", because, "Leave that row out by `mask`"))

    def value(self, divergence: RowDivergence, log_q: LogProbs) -> Rows:
        """Return the estimate of each row, which may be below 0."""
        return self._mean(divergence, log_q.gather(-1, self.indices.long()))

    def gradient(self, divergence: RowDivergence, log_q: LogProbs) -> tuple[Rows, LogProbs]:
        """Return the estimate of each row, and its gradient: that by the drawn tokens' log-probabilities, through the softmax."""
        indices = self.indices.long()
        with torch.enable_grad():
            drawn = log_q.detach().gather(-1, indices).requires_grad_()
            values = self._mean(divergence, drawn)
            (slope,) = torch.autograd.grad(values.sum(), drawn)
        return values.detach(), (log_q.exp() * -slope.sum(-1, keepdim=True)).scatter_add(-1, indices, slope)

    def _mean(self, divergence: RowDivergence, log_q: LogProbs) -> Rows:
        """Return the mean over the drawn tokens, of which `log_q` are the student's log-probabilities."""
        if not divergence.sums:
            because = "it isn't a sum over tokens, so that a sample would bias it"
            raise InputError(cannot(f"use {divergence.name} with sampled tokens", because, "Use for example `forward_kl`"))
        log_p = self.log_probs.to(log_q.dtype)
        weight = log_p if self.log_proposal is None else self.log_proposal.to(log_q.dtype)
        return (divergence.terms(log_p, log_q) * (-weight).exp()).mean(-1)
