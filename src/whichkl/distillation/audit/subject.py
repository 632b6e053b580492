"""Subject: the audited loss, called on seeded logits, with its gradient by the student's logits."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.audit.adapters import IGNORED, Adapter
from whichkl.distillation.networks import in_short
from whichkl.process.lock import without_warnings
from whichkl.process.memory import refuse_if_ran_out
from whichkl.process.seeds import seeded
from whichkl.user_code import kept_running, said_of

Logits = Float[Tensor, "b t v"]
Mask = Bool[Tensor, "b t"]
Labels = Int[Tensor, "b t"]

VOCABULARY = 128
_LARGE_VOCABULARY = 4096
"""More tokens than any usual top-k."""


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
    dtype: torch.dtype = torch.float64
    shift: int = 0

    @property
    def large_vocabulary(self) -> int:
        """Tokens of a large vocabulary; fewer where the heads are square matrices."""
        return _LARGE_VOCABULARY if self.adapter.infinite else 4 * VOCABULARY

    @property
    def name(self) -> str:
        """What the loss is called."""
        return str(getattr(getattr(self.loss, "func", self.loss), "__name__", type(self.loss).__name__))

    def generator(self) -> torch.Generator:
        """Return a fresh generator under the audit's seed."""
        return torch.Generator().manual_seed(self.seed)

    def pair(self, b: int, t: int, v: int = VOCABULARY, gap: float | None = None) -> tuple[Logits, Logits]:
        """Return logits of a teacher and a student; the same ones for the same sizes (see `pair_of_logits`)."""
        return pair_of_logits(self.generator(), b, t, v, gap)

    def settle(self, teacher: Logits, student: Logits) -> Answer:
        """Make the first call, in float64 or else in float32."""
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
        """Call the loss; bfloat16 logits keep their dtype, others get the dtype that the loss accepts."""
        dtypes = [x.dtype if x.dtype == torch.bfloat16 else self.dtype for x in (teacher, student)]
        teacher, student = (x.to(self.device, dtype).detach() for x, dtype in zip((teacher, student), dtypes, strict=True))
        student = student.requires_grad_()
        gradient = None
        with seeded(self.seed + seed), without_warnings():
            loss = self._value(teacher, student, mask, some_labels(student.shape) if labels is None else labels, knobs or {})
            if loss.requires_grad:
                try:
                    with kept_running():
                        (gradient,) = torch.autograd.grad(loss.sum(), student, allow_unused=True)
                except Exception as error:
                    refuse_if_ran_out(error, "audit this loss")
                    because = f"its backward pass raised {type(error).__name__}: {in_short(error)}"
                    instead = "Make it differentiable by the student's logits"
                    raise InputError(cannot("audit this loss", because, instead)) from error
        has_graph = gradient is not None
        slope = torch.zeros_like(student) if gradient is None else gradient
        value = float(loss.detach().double().sum())
        return Answer(value, slope.detach().double().cpu(), loss.dim() > 0 and loss.numel() > 1, has_graph)

    def _value(self, teacher: Logits, student: Logits, mask: Mask | None, labels: Labels, knobs: Mapping[str, Any]) -> Tensor:
        labels = labels if mask is None else labels.masked_fill(~mask, IGNORED)
        where = {"mask": None if mask is None else mask.to(self.device), "labels": labels.to(self.device)}
        shape = tuple(student.shape)
        # knobs that are attributes of a module are set on a copy of it, the others are passed
        attributes = {name for name in knobs if isinstance(self.loss, torch.nn.Module) and hasattr(self.loss, name)}
        loss = copy.copy(self.loss) if attributes else self.loss
        for name in attributes:
            setattr(loss, name, knobs[name])
        arguments = {name: value for name, value in knobs.items() if name not in attributes}
        try:
            value = self.adapter.call(loss, teacher=teacher, student=student, knobs=arguments, **where)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: the loss is the user's code
            refuse_if_ran_out(error, "audit this loss")
            said = said_of(error) if isinstance(error, SystemExit) else f"it raised {type(error).__name__}: {in_short(error)}"
            because = f"called as {self.adapter.shape}, logits {shape}, {said}"
            hint = "Pass adapter=, the name of another way to call it or a function `f(loss, *, teacher, student, mask)`"
            raise InputError(cannot("audit this loss", because, hint)) from error
        if not isinstance(value, Tensor) or not value.is_floating_point():
            because = f"it returned {type(value).__name__}, not a tensor of floats"
            raise InputError(cannot("audit this loss", because, "Pass an adapter that returns the loss alone"))
        if value.numel() not in (1, shape[0] * shape[1]):
            because = f"it returned shape {tuple(value.shape)} for logits {shape}, neither one number nor one per token"
            raise InputError(cannot("audit this loss", because, "Sum over the vocabulary, and return the rest"))
        return value

    def has_knob(self, name: str) -> bool:
        """Whether the loss has an argument or an attribute of that name."""
        try:
            parameters = inspect.signature(self.loss).parameters
        except (TypeError, ValueError):
            return hasattr(self.loss, name)
        return name in parameters or hasattr(self.loss, name)


def pair_of_logits(
    generator: torch.Generator, b: int, t: int, v: int = VOCABULARY, gap: float | None = None
) -> tuple[Logits, Logits]:
    """Return a teacher of scale 2, and a student: the teacher with noise of size `gap`, by default of a random size per row."""
    teacher = 2 * torch.randn(b, t, v, generator=generator, dtype=torch.float64, device="cpu")
    size = torch.empty(b, t, 1, dtype=torch.float64, device="cpu").uniform_(0.3, 3, generator=generator) if gap is None else gap
    return teacher, teacher + size * torch.randn(b, t, v, generator=generator, dtype=torch.float64, device="cpu")


def some_labels(shape: torch.Size, step: int = 7) -> Labels:
    """Return labels that differ from place to place, none of them ignored."""
    b, t, v = shape
    return ((torch.arange(b * t, device="cpu") * step + step) % v).view(b, t)
