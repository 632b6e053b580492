"""Subject: the audited loss, called on seeded logits, with its gradient by the student's logits."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.audit import probes
from whichkl.distillation.audit.adapters import IGNORED, Adapter
from whichkl.distillation.audit.probes import VOCABULARY, WIDE
from whichkl.process.lock import without_warnings
from whichkl.process.memory import refuse_if_ran_out
from whichkl.process.seeds import seeded
from whichkl.user_code import kept_running, said_of

Logits = Float[Tensor, "b t v"]
Mask = Bool[Tensor, "b t"]
Labels = Int[Tensor, "b t"]


@dataclass(frozen=True)
class Answer:
    """What a call returned: a number (the sum, where it returned one per token), its gradient, and whether there was a graph."""

    value: float
    gradient: Logits
    rows: bool
    graph: bool

    @property
    def finite(self) -> bool:
        """Whether neither the value nor the gradient is NaN or infinite."""
        return abs(self.value) < float("inf") and bool(self.gradient.isfinite().all())


@dataclass
class Subject:
    """The loss that is audited.

    Attributes:
        dtype: float64, or float32 where the loss refuses that.
        shift: how many positions before its label a token's logits lie: 0, or 1 if the loss shifts labels itself.
    """

    loss: Callable[..., Any]
    adapter: Adapter
    seed: int = 0
    device: str = "cpu"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    shift: int = 0

    @property
    def wide(self) -> int:
        """Tokens of a large vocabulary; fewer where the heads are square matrices."""
        return WIDE if self.adapter.infinite else 4 * VOCABULARY

    @property
    def name(self) -> str:
        """What the loss is called."""
        return str(getattr(getattr(self.loss, "func", self.loss), "__name__", type(self.loss).__name__))

    def generator(self) -> torch.Generator:
        """Return a fresh generator under the audit's seed."""
        return torch.Generator().manual_seed(self.seed)

    def pair(self, b: int, t: int, v: int = VOCABULARY, gap: float | None = None) -> tuple[Logits, Logits]:
        """Return logits of a teacher and a student; the same ones for the same sizes (see `probes.pair`)."""
        return probes.pair(self.generator(), b, t, v, gap)

    def settle(self, teacher: Logits, student: Logits) -> Answer:
        """Make the first call, in float64 or else in float32.

        Raises:
            InputError: it can't be called this way, or what it returns isn't a loss.
        """
        try:
            return self(teacher, student)
        except InputError:
            self.dtype = torch.float32
            return self(teacher, student)

    def __call__(
        self,
        teacher: Logits,
        student: Logits,
        mask: Mask | None = None,
        *,
        labels: Labels | None = None,
        seed: int = 0,
        knobs: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Call the loss; bfloat16 logits keep their dtype, others get the dtype that the loss accepts.

        Raises:
            InputError: it raises, or what it returns isn't a loss.
        """
        teacher, student = (self._cast(x).detach() for x in (teacher, student))
        student = student.requires_grad_()
        with seeded(self.seed + seed), without_warnings():
            loss = self._value(teacher, student, mask, labels, knobs or {})
            graph = loss.requires_grad
            if graph:
                try:
                    with kept_running():
                        (gradient,) = torch.autograd.grad(loss.sum(), student, allow_unused=True)
                except Exception as error:
                    refuse_if_ran_out(error, "audit this loss")
                    because = f"its backward pass raised {type(error).__name__}: {_short(error)}"
                    raise InputError(
                        cannot("audit this loss", because, "Make it differentiable by the student's logits")
                    ) from error
                graph = gradient is not None
        if not graph:
            gradient = torch.zeros_like(student)
        value = float(loss.detach().double().sum())
        return Answer(value, gradient.detach().double().cpu(), loss.dim() > 0 and loss.numel() > 1, graph)

    def _value(
        self, teacher: Logits, student: Logits, mask: Mask | None, labels: Labels | None, knobs: Mapping[str, Any]
    ) -> Tensor:
        if labels is None:
            labels = some_labels(student.shape)
        labels = labels if mask is None else labels.masked_fill(~mask, IGNORED)
        loss, arguments = self._turned({**self.fixed, **knobs})
        where = {"mask": None if mask is None else mask.to(self.device), "labels": labels.to(self.device)}
        try:
            value = self.adapter.call(loss, teacher=teacher, student=student, knobs=arguments, **where)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            refuse_if_ran_out(error, "audit this loss")
            shape = tuple(student.shape)
            said = said_of(error) if isinstance(error, SystemExit) else f"it raised {type(error).__name__}: {_short(error)}"
            because = f"called as {self.adapter.shape}, logits {shape}, {said}"
            hint = "Pass adapter=, the name of another way to call it or a function `f(loss, *, teacher, student, mask)`"
            raise InputError(cannot("audit this loss", because, hint)) from error
        if not isinstance(value, Tensor) or not value.is_floating_point():
            because = f"it returned {type(value).__name__}, not a tensor of floats"
            raise InputError(cannot("audit this loss", because, "Pass an adapter that returns the loss alone"))
        if value.numel() not in (1, student.shape[0] * student.shape[1]):
            shapes = f"shape {tuple(value.shape)} for logits {tuple(student.shape)}"
            because = f"it returned {shapes}, neither one number nor one per token"
            raise InputError(cannot("audit this loss", because, "Sum over the vocabulary, and return the rest"))
        return value

    def has_knob(self, name: str) -> bool:
        """Whether the loss has an argument or an attribute of that name."""
        try:
            parameters = inspect.signature(self.loss).parameters
        except (TypeError, ValueError):
            return hasattr(self.loss, name)
        return name in parameters or hasattr(self.loss, name)

    def _turned(self, knobs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the loss, with the knobs that are attributes set on a copy, and the knobs that are arguments."""
        loss, arguments = self.loss, {}
        for name, value in knobs.items():
            if isinstance(loss, torch.nn.Module) and hasattr(loss, name):
                loss = copy.copy(loss)
                setattr(loss, name, value)
            else:
                arguments[name] = value
        return loss, arguments

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.device, x.dtype if x.dtype == torch.bfloat16 else self.dtype)


def some_labels(shape: torch.Size, step: int = 7) -> Labels:
    """Return labels that differ from place to place, none of them ignored."""
    b, t, v = shape
    return ((torch.arange(b * t, device="cpu") * step + step) % v).view(b, t)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"
