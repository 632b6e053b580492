"""From logits to a loss: temperature, masks, padding and reductions, for full rows and for stored parts of a teacher's rows."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.losses.reduction import (
    check_flag,
    check_mask,
    check_reduction,
    check_temperature,
    checked_vocabulary,
    reduce,
    widened,
)
from whichkl.distillation.losses.stored_rows import StoredRows
from whichkl.divergences.divergence import RowDivergence

Logits = Float[Tensor, "... v"]
Mask = Bool[Tensor, "..."]
Loss = Float[Tensor, "..."]


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
    if isinstance(teacher, StoredRows):
        teacher.check_temperature(temperature)
