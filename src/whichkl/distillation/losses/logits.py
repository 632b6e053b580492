"""From logits to a loss: temperature, masks, padding and reductions, for full rows and for stored parts of a teacher's rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.losses.reduction import (
    check_flag,
    check_mask,
    check_reduction,
    check_temperature,
    checked_vocabulary,
    reduce,
    refuse_transforms,
)
from whichkl.divergences.divergence import LogProbs, RowDivergence, Rows

Logits = Float[Tensor, "... v"]
Mask = Bool[Tensor, "..."]
Loss = Float[Tensor, "..."]


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

    def __post_init__(self) -> None:
        """Check the shapes."""
        log_probs, indices = self.log_probs, self.indices
        if indices.shape != log_probs.shape or indices.dtype not in (torch.int64, torch.int32):
            because = f"indices are {indices.dtype} {tuple(indices.shape)}, log_probs {tuple(log_probs.shape)}"
            raise InputError(cannot(f"use this {self.what}", because, "Pass integer tokens, one for each log-probability"))
        if not log_probs.is_floating_point() or log_probs.dim() == 0 or log_probs.shape[-1] == 0:
            instead = "Pass floats of shape (…, k), k ≥ 1"
            raise InputError(cannot(f"use this {self.what}", "it holds no log-probabilities", instead))

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
        teacher = torch.cat([log_probs, log_rest], -1)
        kept = log_q.gather(-1, indices).masked_fill(~entries, -math.inf)
        values = divergence.value(teacher, torch.cat([kept, log_left], -1))
        return values.masked_fill(~entries.any(-1), math.nan)


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
        if not divergence.sums:
            because = "it isn't a sum over tokens, so that a sample would bias it"
            raise InputError(cannot(f"use {divergence.name} with sampled tokens", because, "Use for example `forward_kl`"))
        log_p = self.log_probs.to(log_q.dtype)
        weight = log_p if self.log_proposal is None else self.log_proposal.to(log_q.dtype)
        return (divergence.terms(log_p, log_q.gather(-1, self.indices.long())) * (-weight).exp()).mean(-1)


Teacher = Logits | StoredRows


def of_logits(
    divergence: RowDivergence,
    *,
    teacher: Teacher,
    student: Logits,
    temperature: float | Tensor = 1.0,
    mask: Mask | None = None,
    reduction: str = "mean",
    vocabulary: int | None = None,
    temperature_squared: bool = False,
) -> Loss:
    """Compute a `RowDivergence` of logits; `forward_kl` and the other named functions call this one with their divergence.

    Sums are taken in float32, or in float64 if one side is float64. 0·log 0 is 0, and logits may be −inf. A row whose divergence
    is infinite has the value ∞ and a gradient of 0. Gradients reach the teacher too, unless it is detached.

    Args:
        divergence: which one, with its parameters.
        teacher: logits (…, v), or a part of them that was stored: `TopK`, `SampledTokens`.
        student: logits (…, v).
        temperature: divides both logits first; a number, or a tensor of one, which gets a gradient.
        mask: (…), True for rows that count, for example `labels != -100`; other rows may hold anything, even NaN.
        reduction: "mean" over rows that count (0, with a gradient of 0, if there is none), "sum", or "none" (0 at rows that
            don't count). To accumulate over batches, take the sum and divide by the rows of all batches.
        vocabulary: how many columns are tokens; those after them are padding and count as −inf. It must be given where the
            widths differ.
        temperature_squared: multiply by temperature². The gradient by the logits, which falls like 1/T², then keeps its size
            as T grows (Hinton et al., 2015); the value is no longer a divergence in nats.

    Returns:
        The divergence in nats: a scalar, or (…) for "none".

    Raises:
        InputError: shapes, dtypes, the temperature, the mask or the widths can't be used.

    >>> from whichkl.losses import RowForwardKL
    >>> of_logits(RowForwardKL(), teacher=torch.tensor([[1.0, 0.0]]), student=torch.tensor([[0.0, 0.0]]))
    tensor(0.1109)
    """
    _check_divergence(divergence)
    check_temperature(temperature)
    check_reduction(reduction)
    check_flag("temperature_squared", temperature_squared)
    _check_logits(teacher, student, vocabulary, temperature)
    check_mask(mask, student.shape[:-1])
    dtype = torch.float64 if torch.float64 in (student.dtype, _dtype(teacher)) else torch.float32
    log_q = _log_probs(student, temperature, mask, vocabulary, dtype)
    if isinstance(teacher, StoredRows):
        teacher.check(student.shape[-1] if vocabulary is None else vocabulary, mask)
        values = teacher.value(divergence, log_q)
    else:
        values = divergence.value(_log_probs(teacher, temperature, mask, vocabulary, dtype), log_q)
    loss = reduce(values, mask, reduction)
    return loss * temperature**2 if temperature_squared else loss


def _check_divergence(divergence: Any) -> None:
    if not isinstance(divergence, RowDivergence):
        because = f"it is a `{type(divergence).__name__}`, not a row divergence"
        raise InputError(cannot("compute this divergence", because, "Give one, such as `divergence_named('forward_kl')`"))


def _log_probs(
    logits: Logits, temperature: float | Tensor, mask: Mask | None, vocabulary: int | None, dtype: torch.dtype
) -> Logits:
    logits = logits[..., :vocabulary]
    if mask is not None:  # before anything else, so that NaN in a row that doesn't count can't reach a gradient
        logits = logits.masked_fill(~mask[..., None], 0.0)
    return torch.log_softmax(logits if temperature == 1 else widened(logits) / temperature, -1, dtype=dtype)


def _dtype(teacher: Teacher) -> torch.dtype:
    return teacher.dtype if isinstance(teacher, Tensor) else teacher.log_probs.dtype


def _check_logits(teacher: Teacher, student: Tensor, vocabulary: int | None, temperature: float | Tensor) -> None:
    partial = isinstance(teacher, StoredRows)
    if not isinstance(student, Tensor) or not (partial or isinstance(teacher, Tensor)):
        because = f"the teacher is a {type(teacher).__name__}, the student a {type(student).__name__}"
        raise InputError(cannot("compare these logits", because, "Pass torch tensors of logits, or a stored teacher (`TopK`)"))
    if not student.is_floating_point() or not _dtype(teacher).is_floating_point:
        because = f"they are {_dtype(teacher)} and {student.dtype}"
        raise InputError(cannot("compare these logits", because, "Pass floating-point logits, not token numbers"))
    shape = teacher.log_probs.shape if isinstance(teacher, StoredRows) else teacher.shape
    if student.dim() == 0 or len(shape) == 0 or shape[:-1] != student.shape[:-1]:
        because = f"the teacher has shape {tuple(shape)}, the student {tuple(student.shape)}"
        raise InputError(cannot("compare these logits", because, "Pass the same rows of both, the vocabulary on the last axis"))
    columns = {"student": student.shape[-1]} if partial else {"teacher": shape[-1], "student": student.shape[-1]}
    checked_vocabulary("logits", columns, vocabulary)
    if isinstance(teacher, StoredRows) and teacher.temperature != temperature:
        because = f"its probabilities are for temperature {teacher.temperature}, and the tokens left out are needed for another"
        raise InputError(
            cannot(f"use this stored teacher at temperature {temperature}", because, f"Store it with `temperature={temperature}`")
        )


def widened(x: Tensor) -> Tensor:
    """float64 as it is, everything narrower as float32."""
    return x if x.dtype == torch.float64 else x.float()
