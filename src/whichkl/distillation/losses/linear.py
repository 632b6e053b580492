"""Divergences of two heads, hidden states times a matrix, without ever holding their logits for all rows.

Autograd sees one function, eager or compiled, whose gradient is computed in its forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from whichkl._checks import InputError, cannot
from whichkl.distillation.losses.heads import (
    Fixed,
    Gradients,
    HeadDivergence,
    Needs,
    Triple,
    accumulating,
    fixed_teacher,
    flat,
    floats,
)
from whichkl.distillation.losses.reduction import (
    check_flag,
    check_mask,
    check_reduction,
    check_tensors,
    checked_caps,
    checked_chunk_size,
    checked_scales,
    checked_vocabulary,
    constant_temperature,
    count,
    refuse_transforms,
)
from whichkl.distillation.losses.rows import divergence_named
from whichkl.distillation.losses.stored_rows import StoredRows
from whichkl.divergences.divergence import RowDivergence
from whichkl.divergences.kinds import ROW_DIVERGENCES, parameters_of

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
    hidden_teacher: Hidden | None = None,
    weight_teacher: Weight | None = None,
    bias_teacher: Bias | None = None,
    teacher: StoredRows | None = None,
    divergence: str | RowDivergence = "forward_kl",
    temperature: float | Tensor = 1.0,
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
        teacher: rows that were stored, `TopK` or `SampledTokens`, in place of the teacher's head.
        divergence: a name in `DIVERGENCES`, or a `RowDivergence`.
        temperature: divides both logits, after scale and soft cap; a number, or a tensor of one.
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
    student: Triple = (hidden_student, weight_student, bias_student)
    fixed = fixed_teacher(hidden_teacher, weight_teacher, bias_teacher, teacher)
    _check_rows(student, fixed, mask)
    check_reduction(reduction)
    check_flag("temperature_squared", temperature_squared)
    columns = {"student": len(weight_student)} | ({} if isinstance(fixed, StoredRows) else {"teacher": len(fixed[1])})
    settings = HeadDivergence(
        divergence_named(divergence, **parameters),
        checked_vocabulary("heads", columns, vocabulary),
        constant_temperature(temperature),
        checked_chunk_size(chunk_size),
        checked_scales(logit_scale_student=logit_scale_student, logit_scale_teacher=logit_scale_teacher),
        checked_caps(softcap_student=softcap_student, softcap_teacher=softcap_teacher),
    )
    if isinstance(fixed, StoredRows):
        fixed.check_temperature(settings.temperature)
        fixed.check(settings.tokens, mask)
    factor = settings.temperature**2 if temperature_squared else 1.0
    return _reduced(settings, student, fixed, mask, reduction, factor)


def _check_rows(student: Triple, teacher: Fixed, mask: Tensor | None) -> None:
    _check_heads(*student, "student")
    if not isinstance(teacher, StoredRows):
        _check_heads(*teacher, "teacher")
    shape, other = student[0].shape, (teacher.indices if isinstance(teacher, StoredRows) else teacher[0]).shape
    if shape[:-1] != other[:-1]:
        because = f"hidden states have shapes {tuple(shape)} and {tuple(other)}"
        raise InputError(cannot("compare these heads", because, "Pass the same rows of teacher and student"))
    check_mask(mask, shape[:-1])
    instead = "Call it on all rows at once: hidden states may have any number of axes, and reduction='none' keeps them"
    refuse_transforms("compute this divergence of heads", instead, *student[:2], *floats(teacher))


def _reduced(
    settings: HeadDivergence, student: Triple, teacher: Fixed, mask: Tensor | None, reduction: str, factor: float
) -> Tensor:
    """Return the loss of each row, or its sum or mean over the rows that count, times a factor."""
    hidden, weight, bias = student
    tensors = (hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    constant = flat(teacher)
    rows, scale = None if mask is None else mask.flatten(), None
    if reduction != "none":
        scale = hidden.new_ones((), dtype=accumulating(hidden, weight, *floats(constant))) * factor
        if reduction == "mean":
            scale = scale / count(hidden[..., 0], mask)
    loss = _differentiable(settings, tensors, constant, rows, scale)
    return loss if scale is not None else loss.reshape(hidden.shape[:-1]) * factor


def _check_heads(hidden: Tensor, weight: Tensor, bias: Tensor | None, who: str) -> None:
    others = {} if bias is None else {f"bias_{who}": bias}
    check_tensors(**{f"hidden_{who}": hidden, f"weight_{who}": weight}, **others)
    shapes = f"hidden states {tuple(hidden.shape)}, a weight {tuple(weight.shape)}"
    shapes += "" if bias is None else f" and a bias {tuple(bias.shape)}"
    fits = hidden.dim() >= 1 and weight.dim() == 2 and hidden.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        because = f"the {who} has {shapes}"
        raise InputError(cannot("use this head", because, "Pass hidden states (…, h), a weight (v, h), and a bias (v,) or None"))
    if not all(one.is_floating_point() for one in (hidden, weight, *(() if bias is None else (bias,)))):
        raise InputError(cannot("use this head", f"the {who} isn't in floating point", "Pass floats"))


def _differentiable(
    settings: HeadDivergence, student: Triple, teacher: Fixed, mask: Tensor | None, scale: Tensor | None
) -> Tensor:
    """Return scale · Σ values, or the values where scale is None, with gradients for the student's tensors that need them."""
    a, b, c = (torch.is_grad_enabled() and one is not None and one.requires_grad for one in student)
    if torch.compiler.is_compiling() and not isinstance(teacher, StoredRows):
        return _compiled(settings, student, teacher, mask, scale, (a, b, c))
    if a or b or c:
        loss: Tensor = _Eager.apply(*student, teacher, mask, settings, scale, (a, b, c))
        return loss
    return _computed(settings, student, teacher, mask, scale, None, (False, False, False))[0]


def _at_once(scale: Tensor | None, needs: Sequence[bool]) -> bool:
    """Whether gradients can be computed with the values: those by weight and bias add up rows, whose factors must be known."""
    return scale is not None or not (needs[1] or needs[2])


def _computed(
    settings: HeadDivergence,
    student: Triple,
    teacher: Fixed,
    mask: Tensor | None,
    scale: Tensor | None,
    factors: Tensor | None,
    needs: Needs,
) -> tuple[Tensor, Gradients]:
    """Return scale · Σ values, or the values, and the gradients that can be computed with them."""
    if factors is None and not _at_once(scale, needs):
        needs = (False, False, False)
    row_factors = factors if scale is None else scale.expand(len(student[0]))
    values, gradients = settings.run(student, teacher, mask, row_factors, needs)
    return values if scale is None else values.sum() * scale, gradients


class _Eager(torch.autograd.Function):
    """The gradient's buffers are given to autograd and scaled in place, so that there is one of each."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Fixed,
        mask: Tensor | None,
        settings: HeadDivergence,
        scale: Tensor | None,
        needs: Needs,
    ) -> Tensor:
        """Return values or their sum, and keep the gradients."""
        loss, gradients = _computed(settings, (hidden, weight, bias), teacher, mask, scale, None, needs)
        ctx.stored, head = (teacher, (None,) * 3) if isinstance(teacher, StoredRows) else (None, teacher)
        ctx.save_for_backward(hidden, weight, bias, *head, mask, scale)
        ctx.settings, ctx.needs, ctx.ready = settings, needs, gradients if any(g is not None for g in gradients) else None
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that are there, times the incoming one, or compute them again."""
        *tensors, mask, scale = ctx.saved_tensors
        student, head = (tensors[0], tensors[1], tensors[2]), (tensors[3], tensors[4], tensors[5])
        gradients, ctx.ready = ctx.ready, None
        if gradients is None:
            factors = grad if scale is None else (grad * scale).expand(len(tensors[0]))
            _, gradients = ctx.settings.run(student, ctx.stored or head, mask, factors, ctx.needs)
        elif grad.device.type != "cpu" or scale is None or grad.item() != 1:
            for one in gradients:
                if one is not None:
                    one.mul_(grad if scale is not None else grad[:, None])
        return (*(g if g is None else g.to(x.dtype) for g, x in zip(gradients, student, strict=True)), *[None] * 5)


def _compiled(
    settings: HeadDivergence, student: Triple, teacher: Triple, mask: Tensor | None, scale: Tensor | None, needs: Needs
) -> Tensor:
    name = settings.divergence.name
    if type(settings.divergence) is not ROW_DIVERGENCES.get(name):
        because = "a compiled graph knows divergences by name"
        instead = f"Use one of {', '.join(ROW_DIVERGENCES)}"
        raise InputError(cannot(f"compile {type(settings.divergence).__name__}", because, instead))
    plain = (
        list(needs),
        name,
        [float(getattr(settings.divergence, one)) for one in parameters_of(settings.divergence)],
        settings.tokens,
        settings.temperature,
        settings.chunk_size,
        [float(one) for one in settings.logit_scales],
        [float(one or 0.0) for one in settings.softcaps],
    )
    loss: Tensor = _op(*student, *teacher, mask, scale, None, *plain)[0]
    return loss


@torch.library.custom_op("whichkl::heads_in_chunks", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden_teacher: Tensor,
    weight_teacher: Tensor,
    bias_teacher: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    factors: Tensor | None,
    needs: list[bool],
    divergence: str,
    parameters: list[float],
    tokens: int,
    temperature: float,
    chunk_size: int,
    logit_scales: list[float],
    softcaps: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One node of a graph: scale · Σ values, or the values, and the gradients that can be computed with them, else empty."""
    caps, kind = [one or None for one in softcaps], ROW_DIVERGENCES[divergence](*parameters)
    scales = (logit_scales[0], logit_scales[1])
    settings = HeadDivergence(kind, tokens, temperature, chunk_size, scales, (caps[0], caps[1]))
    student, teacher = (hidden, weight, bias), (hidden_teacher, weight_teacher, bias_teacher)
    loss, found = _computed(settings, student, teacher, mask, scale, factors, (needs[0], needs[1], needs[2]))
    by_hidden, by_weight, by_bias = (
        loss.new_empty(0) if g is None or x is None else g.to(x.dtype) for g, x in zip(found, student, strict=True)
    )
    return loss, by_hidden, by_weight, by_bias


@_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden_teacher: Tensor,
    weight_teacher: Tensor,
    bias_teacher: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    factors: Tensor | None,
    needs: list[bool],
    *plain: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulating(hidden, weight, hidden_teacher, weight_teacher)
    ready = factors is not None or _at_once(scale, needs)
    loss = hidden.new_empty(() if scale is not None else (len(hidden),), dtype=dtype)

    def like(leaf: Tensor | None, need: bool) -> Tensor:
        return torch.empty_like(leaf) if ready and need and leaf is not None else hidden.new_empty(0, dtype=dtype)

    return loss, like(hidden, needs[0]), like(weight, needs[1]), like(bias, needs[2])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.needs, ctx.plain = inputs[:8], inputs[9], inputs[10:]
    ctx.save_for_backward(*tensors, *output[1:])


def _back(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, by_hidden, by_weight, by_bias = ctx.saved_tensors
    scale, grads = tensors[7], [by_hidden, by_weight, by_bias]
    if _at_once(scale, ctx.needs):
        grads = [
            g * (grad if scale is not None else grad[:, None]).to(g.dtype) if need else g
            for g, need in zip(grads, ctx.needs, strict=True)
        ]
    else:
        grads = list(_op(*tensors, grad, ctx.needs, *ctx.plain)[1:])
    return (*(g if need else None for g, need in zip(grads, ctx.needs, strict=True)), *[None] * 14)


_op.register_autograd(_back, setup_context=_keep)
