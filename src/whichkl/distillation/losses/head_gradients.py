"""Autograd of a divergence of two heads: one function whose gradient is computed in its forward pass, eager or compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from whichkl._checks import InputError, cannot
from whichkl.distillation.losses.chunks import Gradients, accumulating, in_chunks
from whichkl.distillation.losses.heads import Head
from whichkl.divergences.divergence import RowDivergence
from whichkl.divergences.kinds import ROW_DIVERGENCES, parameters_of

Triple = tuple[Tensor, Tensor, Tensor | None]
Needs = tuple[bool, bool, bool]
Loss = Float[Tensor, "..."]


@dataclass(frozen=True)
class Settings:
    """All of a call that isn't a tensor: the divergence, how many columns are tokens, and what is done to logits."""

    divergence: RowDivergence
    tokens: int
    temperature: float
    chunk_size: int  # 0: by memory
    logit_scales: tuple[float, float]
    softcaps: tuple[float | None, float | None]

    def run(
        self, student: Triple, teacher: Triple, mask: Tensor | None, factors: Tensor | None, needs: Needs
    ) -> tuple[Float[Tensor, " n"], Gradients]:
        """Return values of rows, and the gradients of Σ factors · values; autocast, which would narrow products, is off."""
        heads = [
            Head(hidden, weight[: self.tokens], bias if bias is None else bias[: self.tokens], scale, cap)
            for (hidden, weight, bias), scale, cap in zip((student, teacher), self.logit_scales, self.softcaps, strict=True)
        ]
        with torch.no_grad(), torch.autocast(student[0].device.type, enabled=False):
            return in_chunks(
                self.divergence,
                student=heads[0],
                teacher=heads[1],
                temperature=self.temperature,
                rows=None if mask is None else mask.nonzero()[:, 0],
                factors=factors,
                needs=needs,
                chunk_size=self.chunk_size or None,
                padded_to=len(student[1]),
            )


def differentiable(settings: Settings, student: Triple, teacher: Triple, mask: Tensor | None, scale: Tensor | None) -> Loss:
    """Return scale · Σ values, or the values where scale is None, with gradients for the student's tensors that need them."""
    a, b, c = (torch.is_grad_enabled() and one is not None and one.requires_grad for one in student)
    if torch.compiler.is_compiling():
        return _compiled(settings, student, teacher, mask, scale, (a, b, c))
    if a or b or c:
        loss: Tensor = _Eager.apply(*student, teacher, mask, settings, scale, (a, b, c))
        return loss
    values, _ = settings.run(student, teacher, mask, None, (False, False, False))
    return values if scale is None else values.sum() * scale


def _at_once(scale: Tensor | None, needs: Needs) -> bool:
    """Whether gradients can be computed with the values: those by weight and bias add up rows, whose factors must be known."""
    return scale is not None or not (needs[1] or needs[2])


class _Eager(torch.autograd.Function):
    """The gradient's buffers are given to autograd and scaled in place, so that there is one of each."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Triple,
        mask: Tensor | None,
        settings: Settings,
        scale: Tensor | None,
        needs: Needs,
    ) -> Tensor:
        """Return values or their sum, and keep the gradients."""
        now = needs if _at_once(scale, needs) else (False, False, False)
        factors = None if scale is None else scale.expand(len(hidden))
        values, gradients = settings.run((hidden, weight, bias), teacher, mask, factors, now)
        ctx.save_for_backward(hidden, weight, bias, *teacher, mask, scale)
        ctx.settings, ctx.needs, ctx.ready = settings, needs, gradients if gradients else None
        return values if scale is None else values.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that are there, times the incoming one, or compute them again."""
        *tensors, mask, scale = ctx.saved_tensors
        student, teacher = (tensors[0], tensors[1], tensors[2]), (tensors[3], tensors[4], tensors[5])
        gradients, ctx.ready = ctx.ready, None
        if gradients is None:
            factors = grad if scale is None else (grad * scale).expand(len(tensors[0]))
            _, gradients = ctx.settings.run(student, teacher, mask, factors, ctx.needs)
        elif grad.device.type != "cpu" or scale is None or grad.item() != 1:
            for one in (gradients.hidden, gradients.weight, gradients.bias):
                if one is not None:
                    one.mul_(grad if scale is not None else grad[:, None])
        grads = (gradients.hidden, gradients.weight, gradients.bias)
        return (*(g if g is None else g.to(x.dtype) for g, x in zip(grads, student, strict=True)), *[None] * 5)


def _compiled(
    settings: Settings, student: Triple, teacher: Triple, mask: Tensor | None, scale: Tensor | None, needs: Needs
) -> Tensor:
    name = settings.divergence.name
    if type(settings.divergence) is not ROW_DIVERGENCES.get(name):
        because = "a compiled graph knows divergences by name"
        raise InputError(
            cannot(f"compile {type(settings.divergence).__name__}", because, f"Use one of {', '.join(ROW_DIVERGENCES)}")
        )
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
    """One node of a graph: scale · Σ values, or the values, and the gradients that can be had beside them, empty if not."""
    caps = [one or None for one in softcaps]
    scales = (logit_scales[0], logit_scales[1])
    settings = Settings(ROW_DIVERGENCES[divergence](*parameters), tokens, temperature, chunk_size, scales, (caps[0], caps[1]))
    student, teacher = (hidden, weight, bias), (hidden_teacher, weight_teacher, bias_teacher)
    now = (needs[0], needs[1], needs[2])
    if factors is None and not _at_once(scale, now):
        now = (False, False, False)
    row_factors = factors if scale is None else scale.expand(len(hidden))
    values, gradients = settings.run(student, teacher, mask, row_factors, now)
    loss = values if scale is None else values.sum() * scale

    def narrowed(gradient: Tensor | None, leaf: Tensor | None) -> Tensor:
        return values.new_empty(0) if gradient is None or leaf is None else gradient.to(leaf.dtype)

    return loss, narrowed(gradients.hidden, hidden), narrowed(gradients.weight, weight), narrowed(gradients.bias, bias)


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
    ready = factors is not None or _at_once(scale, (needs[0], needs[1], needs[2]))
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
