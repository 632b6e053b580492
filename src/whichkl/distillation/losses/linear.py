"""Divergences of two heads, hidden states times a matrix, without ever holding their logits for all rows."""

from __future__ import annotations

import math

from jaxtyping import Bool, Float
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.losses.chunks import accumulating
from whichkl.distillation.losses.head_gradients import Settings, differentiable
from whichkl.distillation.losses.reduction import check_mask, check_reduction, check_temperature, checked_vocabulary, count
from whichkl.distillation.losses.rows import divergence_named
from whichkl.divergences.divergence import RowDivergence

Hidden = Float[Tensor, "... h"]
Weight = Float[Tensor, "v h"]
Bias = Float[Tensor, " v"]
Mask = Bool[Tensor, "..."]
Loss = Float[Tensor, "..."]


def linear_divergence(
    *,
    hidden_student: Hidden,
    weight_student: Weight,
    bias_student: Bias | None = None,
    hidden_teacher: Hidden,
    weight_teacher: Weight,
    bias_teacher: Bias | None = None,
    divergence: str | RowDivergence = "forward_kl",
    temperature: float = 1.0,
    chunk_size: int | None = None,
    mask: Mask | None = None,
    reduction: str = "mean",
    vocabulary: int | None = None,
    logit_scale_student: float = 1.0,
    logit_scale_teacher: float = 1.0,
    softcap_student: float | None = None,
    softcap_teacher: float | None = None,
    temperature_squared: bool = False,
    **parameters: float,
) -> Loss:
    """Divergence of the rows softmax(h Wᵀ + b) of a teacher and a student, in chunks of rows.

    The same number and gradients as `forward_kl(teacher=h Wᵀ + b, student=…)` and the other functions, in the memory of
    two buffers of at most 192 MiB together, however many rows there are. The gradient is computed together with the value, so
    that no product is done twice. Only what is needed is computed: no gradient under `torch.no_grad()`, by a frozen weight, or
    for the teacher, which is a constant; no product of rows that the mask leaves out. Products and sums
    are float32 for narrower dtypes. With reduction="none" and a weight that needs a gradient, the products are repeated
    in the backward pass, since the factors of the rows aren't known before; a second backward pass repeats them too.

    Args:
        hidden_student: (…, h), what the student's head sees.
        weight_student: (v, h).
        bias_student: (v,).
        hidden_teacher: (…, g), the same rows; the width may differ.
        weight_teacher: (v, g).
        bias_teacher: (v,).
        divergence: a name in `DIVERGENCES`, or a `RowDivergence`.
        temperature: divides both logits, after scale and soft cap.
        chunk_size: rows at a time; None chooses by memory. More than that hardly helps on a CPU; a large GPU may want more.
        mask: (…), True for rows that count.
        reduction: "mean" over rows that count (0 if there is none), "sum" or "none".
        vocabulary: how many columns are tokens; must be given where the two heads have different numbers of them.
        logit_scale_student: multiplies the student's logits.
        logit_scale_teacher: multiplies the teacher's logits.
        softcap_student: the student's logits z become c tanh(z/c), after the scale.
        softcap_teacher: the same for the teacher.
        temperature_squared: multiply by temperature², as in `of_logits`.
        parameters: of the divergence: `weight_on_forward`, `weight`, `order`, `head_mass`, `weight_on_teacher`.

    Returns:
        The divergence in nats: a scalar, or (…) for "none".

    Raises:
        InputError: shapes, dtypes or parameters can't be used.

    >>> import torch
    >>> h, w = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.eye(2)
    >>> linear_divergence(hidden_student=h, weight_student=w, hidden_teacher=h, weight_teacher=2 * w, divergence="reverse_kl")
    tensor(0.0826)
    """
    check_temperature(temperature)
    check_reduction(reduction)
    caps = (softcap_student, softcap_teacher)
    if any(cap is not None and not 0 < cap < math.inf for cap in caps):
        raise InputError(cannot(f"cap logits at {caps}", "a soft cap is positive", "Pass None for no cap"))
    _check_heads(hidden_student, weight_student, bias_student, "student")
    _check_heads(hidden_teacher, weight_teacher, bias_teacher, "teacher")
    if hidden_student.shape[:-1] != hidden_teacher.shape[:-1]:
        because = f"hidden states have shapes {tuple(hidden_student.shape)} and {tuple(hidden_teacher.shape)}"
        raise InputError(cannot("compare these heads", because, "Pass the same rows of teacher and student"))
    check_mask(mask, hidden_student.shape[:-1])
    if chunk_size is not None and chunk_size < 1:
        raise InputError(cannot(f"use chunk_size={chunk_size}", "a chunk is at least one row", "Pass None to choose by memory"))
    settings = Settings(
        divergence_named(divergence, **parameters),
        checked_vocabulary("heads", {"teacher": len(weight_teacher), "student": len(weight_student)}, vocabulary),
        temperature,
        0 if chunk_size is None else chunk_size,
        (logit_scale_student, logit_scale_teacher),
        caps,
    )
    tensors = (hidden_student.reshape(-1, hidden_student.shape[-1]), weight_student, bias_student)
    teacher = (
        hidden_teacher.detach().reshape(-1, hidden_teacher.shape[-1]),
        weight_teacher.detach(),
        None if bias_teacher is None else bias_teacher.detach(),
    )
    rows, scale = None if mask is None else mask.flatten(), None
    if reduction != "none":
        dtype = accumulating(hidden_student, weight_student, hidden_teacher, weight_teacher)
        scale = hidden_student.new_ones((), dtype=dtype)
        if reduction == "mean":
            scale = scale / count(hidden_student[..., 0], mask)
    if scale is not None and temperature_squared:
        scale = scale * temperature**2
    loss = differentiable(settings, tensors, teacher, rows, scale)
    if scale is not None:
        return loss
    return loss.reshape(hidden_student.shape[:-1]) * (temperature**2 if temperature_squared else 1)


def _check_heads(hidden: Tensor, weight: Tensor, bias: Tensor | None, who: str) -> None:
    shapes = f"hidden states {tuple(hidden.shape)}, a weight {tuple(weight.shape)}"
    shapes += "" if bias is None else f" and a bias {tuple(bias.shape)}"
    fits = hidden.dim() >= 1 and weight.dim() == 2 and hidden.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        because = f"the {who} has {shapes}"
        raise InputError(cannot("use this head", because, "Pass hidden states (…, h), a weight (v, h), and a bias (v,) or None"))
    if not all(one.is_floating_point() for one in (hidden, weight, *(() if bias is None else (bias,)))):
        raise InputError(cannot("use this head", f"the {who} isn't in floating point", "Pass floats"))
