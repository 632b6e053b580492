"""Subject: the audited loss, called on copies of seeded logits, with its gradient by the student's logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.audit.adapters import IGNORED, Adapter
from whichkl.distillation.audit.probes import VOCABULARY, Labels, Logits, Mask, pair_of_logits, some_labels
from whichkl.distillation.audit.signatures import parameters_of_call
from whichkl.distillation.networks import in_short
from whichkl.process.lock import without_warnings
from whichkl.process.memory import refuse_if_ran_out
from whichkl.process.seeds import seeded
from whichkl.user_code import kept_running, said_of

_LARGE_VOCABULARY = 4096
"""More tokens than any usual top-k."""
_LOSS_SCALE, _SMALL_GRADIENT = 2.0**15, 2.0**-7
_NARROW = (torch.bfloat16, torch.float16)
_HINT = (
    "Pass adapter=, the name of another way to call it (student_teacher, rows, labels, …) "
    "or a function `f(loss, *, teacher, student, mask)`"
)


@dataclass(frozen=True)
class Answer:
    """What a call returned.

    Attributes:
        value: the number; the sum, where there was one per token or per sequence.
        gradient: (b, t, v), by the student's logits.
        form: "number", "token" or "sequence": what the loss returns one number for.
        graph: whether a gradient reached the student's logits.
        dtype: of the result.
        teacher_gradient: the norm of the gradient by the teacher's logits, where it was requested.
    """

    value: float
    gradient: Logits
    form: str
    graph: bool
    dtype: torch.dtype
    teacher_gradient: float = 0.0

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
        unit: size of ordinary logits, the loss's own temperature: divided by it they are neither sure nor flat.
        unit_is_known: whether the unit was found, not assumed.
        narrow: whether the loss rounds to bfloat16 or float16, whatever it is given.
        mask_dtype: bool, or what the loss takes instead.
        written: names of the arguments into which a call wrote.
        assumed: what was assumed about the call, for the report.
    """

    loss: Callable[..., Any]
    adapter: Adapter
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    shift: int = 0
    unit: float = 1.0
    unit_is_known: bool = False
    narrow: bool = False
    mask_dtype: torch.dtype = torch.bool
    written: set[str] = field(default_factory=set)
    assumed: list[str] = field(default_factory=list)

    @property
    def tolerance(self) -> float:
        """Relative difference of two values that are the same up to rounding."""
        return 0.05 if self.narrow else 1e-5

    @property
    def called(self) -> str:
        """How it was called, in words."""
        flat = " of rows (n, v)" if self.adapter.rows and "rows" not in self.adapter.shape else ""
        mask = "" if self.mask_dtype == torch.bool else f"a mask of {self.mask_dtype}".replace("torch.", "")
        return "; ".join(one for one in (self.adapter.shape + flat, mask, *self.assumed) if one)

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
        return self.scaled(*pair_of_logits(self.generator(), b, t, v, gap))

    def scaled(self, teacher: Logits, student: Logits) -> tuple[Logits, Logits]:
        """Return logits in the loss's unit; for a loss that rounds to bfloat16, numbers that it needn't round."""
        teacher, student = self.unit * teacher, self.unit * student
        return (teacher.bfloat16().double(), student.bfloat16().double()) if self.narrow else (teacher, student)

    def settle(self) -> Answer:
        """Make the first calls, which find the dtype, the shape of the logits and the dtype of the mask that the loss takes."""
        answer = self._first(self._ways(), self.pair(2, 4, gap=1.0), None)
        if self.adapter.masks:
            mask = torch.ones(2, 4, dtype=torch.bool, device="cpu")
            mask[1, 2:] = False
            dtypes = dict.fromkeys((self.mask_dtype, torch.bool, torch.int64, self.dtype))
            self._first(({"mask_dtype": one} for one in dtypes), self.pair(2, 4, gap=1.0), mask)
        return answer

    def find_precision(self) -> None:
        """Find out whether the loss rounds its logits to bfloat16 or float16 whatever it is given, or returns such a number."""
        pair = self.pair(2, 4)
        answer = self(*pair)
        for dtype in _NARROW:
            rounded = self(*(x.to(dtype).double() for x in pair))
            same = rounded.value == answer.value and torch.equal(rounded.gradient, answer.gradient)
            self.narrow |= answer.dtype == dtype or same and bool(answer.gradient.any())

    def _ways(self) -> Iterator[dict[str, Any]]:
        flat = replace(self.adapter, rows=True, masks=self.adapter.masks and not self.adapter.labels)
        for adapter in (self.adapter,) if self.adapter.rows is not None else (self.adapter, flat):
            for dtype in (torch.float64, torch.float32):
                for mask_dtype in (torch.bool, torch.int64, dtype) if adapter.needs_mask else (torch.bool,):
                    yield {"adapter": adapter, "dtype": dtype, "mask_dtype": mask_dtype}

    def _first(self, ways: Iterator[dict[str, Any]], pair: tuple[Logits, Logits], mask: Mask | None) -> Answer:
        """Call the loss in the first of these ways that it takes; if it takes none, raise what the first one raised."""
        first: InputError | None = None
        for way in ways:
            for name, value in way.items():
                setattr(self, name, value)
            try:
                return self(*pair, mask)
            except InputError as error:
                first = first or error
        raise first or InputError("")

    def __call__(
        self,
        teacher: Logits,
        student: Logits,
        mask: Mask | None = None,
        *,
        labels: Labels | None = None,
        seed: int = 0,
        knobs: Mapping[str, Any] | None = None,
        ask_teacher: bool = False,
    ) -> Answer:
        """Call the loss; bfloat16 and other narrow logits keep their dtype, others get the dtype that the loss accepts."""
        dtypes = [self.dtype if x.dtype == torch.float64 else x.dtype for x in (teacher, student)]
        teacher, student = (x.to(self.device, dtype).detach() for x, dtype in zip((teacher, student), dtypes, strict=True))
        student = student.clone().requires_grad_()
        teacher = teacher.clone().requires_grad_(ask_teacher)
        slope, teacher_slope, has_graph = torch.zeros_like(student), 0.0, False
        with seeded(self.seed + seed), without_warnings():
            loss, form = self._value(
                teacher, student, mask, some_labels(student.shape) if labels is None else labels, knobs or {}
            )
            if loss.requires_grad:
                leaves = (student, teacher) if ask_teacher else (student,)
                found = self._gradients(loss, leaves)
                has_graph = found[0] is not None
                slope = slope if found[0] is None else found[0]
                teacher_slope = float(found[1].double().norm()) if ask_teacher and found[1] is not None else 0.0
        value = float(loss.detach().double().sum())
        return Answer(value, slope.detach().double().cpu(), form, has_graph, loss.dtype, teacher_slope)

    def _gradients(self, loss: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        try:
            with kept_running():
                found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True, retain_graph=self.narrow)
                if self.narrow and found[0] is not None and 0 <= float(found[0].abs().max()) < _SMALL_GRADIENT:
                    # float16 has no numbers below 6e-8: scaled, as when it is trained
                    scaled = torch.autograd.grad(loss.sum(), leaves, loss.new_tensor(_LOSS_SCALE), allow_unused=True)
                    found = tuple(x if x is None else x.double() / _LOSS_SCALE for x in scaled)
                return found
        except Exception as error:
            refuse_if_ran_out(error, "audit this loss")
            because = f"its backward pass raised {type(error).__name__}: {in_short(error)}"
            instead = "Make it differentiable by the student's logits"
            raise InputError(cannot("audit this loss", because, instead)) from error

    def _value(
        self, teacher: Logits, student: Logits, mask: Mask | None, labels: Labels, knobs: Mapping[str, Any]
    ) -> tuple[Tensor, str]:
        if mask is None and self.adapter.needs_mask:
            mask = torch.ones(student.shape[:2], dtype=torch.bool, device="cpu")
        if mask is not None and self.adapter.masks:
            labels = labels.masked_fill(~mask, IGNORED)
        keep = None if mask is None else (~mask if self.adapter.inverted else mask).to(self.device, self.mask_dtype)
        given = {"teacher": teacher, "student": student, "mask": keep, "labels": labels.to(self.device)}
        # copies, none of them a leaf: a loss may write into what it gets
        handed = {name: None if x is None else x.clone() for name, x in given.items()}
        called = {k: x.flatten(0, 1) if self.adapter.rows and x is not None else x for k, x in handed.items()}
        shape = tuple(student.shape)
        # knobs that are attributes of a module are set on a copy of it, the others are passed
        attributes = {name for name in knobs if isinstance(self.loss, torch.nn.Module) and hasattr(self.loss, name)}
        loss = copy.copy(self.loss) if attributes else self.loss
        for name in attributes:
            setattr(loss, name, knobs[name])
        arguments = {name: value for name, value in knobs.items() if name not in attributes}
        try:
            result = self.adapter.call(loss, knobs=arguments, **called)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: the loss is the user's code
            refuse_if_ran_out(error, "audit this loss")
            said = said_of(error) if isinstance(error, SystemExit) else f"it raised {type(error).__name__}: {in_short(error)}"
            because = f"called as {self.adapter.shape}, logits {shape}, {said}"
            raise InputError(cannot("audit this loss", because, _HINT)) from error
        for name, before in given.items():
            after = handed[name]
            if before is not None and after is not None and not _same_numbers(before.detach(), after.detach()):
                self.written.add(name)
        return self._tensor_of(result, shape)

    def _tensor_of(self, result: Any, shape: tuple[int, ...]) -> tuple[Tensor, str]:
        """Return the loss among what a call returned, and what it holds one number for."""
        value, which = _loss_among(result)
        if value is None:
            because = f"it returned {type(result).__name__}, not a tensor of floats"
            raise InputError(cannot("audit this loss", because, "Pass an adapter that returns the loss alone"))
        if which and which not in self.assumed:
            self.assumed.append(which)
        b, t = shape[:2]
        forms = {1: "number", b: "sequence", b * (t - 1): "token", b * t: "token"} | {1: "number"}
        if value.numel() not in forms:
            because = f"it returned shape {tuple(value.shape)} for logits {shape}, neither one number nor one per token"
            raise InputError(cannot("audit this loss", because, "Sum over the vocabulary, and return the rest"))
        return value, forms[value.numel()]

    def has_knob(self, name: str) -> bool:
        """Whether the loss has an argument or an attribute of that name."""
        return name in parameters_of_call(self.loss) or hasattr(self.loss, name)


def _loss_among(result: Any) -> tuple[Tensor | None, str]:
    """Return the loss in a result, and a clause on which part of it was taken; None if there is no tensor of floats."""
    if isinstance(result, Tensor):
        return (result, "") if result.is_floating_point() else (None, "")
    if isinstance(result, Mapping):
        parts = {f"the result's {key!r}": value for key, value in result.items()}
        parts = {name: parts[name] for name in sorted(parts, key=lambda name: name != "the result's 'loss'")}
    elif isinstance(result, tuple | list):
        parts = {f"number {i + 1} of {len(result)} results": value for i, value in enumerate(result)}
    elif isinstance(getattr(result, "loss", None), Tensor):
        parts = {"the result's `.loss`": result.loss}
    else:
        return None, ""
    floats = {name: x for name, x in parts.items() if isinstance(x, Tensor) and x.is_floating_point()}
    name = next((name for name, x in floats.items() if x.requires_grad), next(iter(floats), ""))
    return (floats[name], f"{name} taken as the loss") if name else (None, "")


def _same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are the same, NaN included."""
    return bool(((a == b) | ((a != a) & (b != b))).all())
