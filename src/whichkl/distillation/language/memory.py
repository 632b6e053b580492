"""Memory: what a training of a language model will take beyond the loaded models, before its first step."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from whichkl.distillation.language.causal import CausalModel, evaluating
from whichkl.distillation.language.rollouts import Rollouts
from whichkl.distillation.language.token_loss import Side, rows_of
from whichkl.process.memory import check_memory, shown_bytes
from whichkl.process.seeds import seeded

_MAX_TOKENS_TRIED = 32
"""Length of the longest sequence whose activations are measured; those of longer ones follow from it."""
_MAX_BUFFER_BYTES = 192 << 20
"""Of the buffers of `linear_divergence`."""
_LOGITS_HELD = 12
"""Tensors of the size of the logits that a divergence of full logits holds at once."""
_LOGITS_DRAWN = 4
"""The same, of one drawn token of every sequence."""
_WEIGHTS_IN_FLIGHT = 2.0
"""Gradients of the largest weight that a backward pass holds before they are added up."""
_STATES = {"sgd": 0.0, "adafactor": 0.0, "lion": 1.0, "adagrad": 1.0, "rmsprop": 1.0}
"""Numbers that an optimizer keeps per weight, by the beginning of its name; the others keep two."""
_SURE = 1.5
"""Factor within which the forecast is right: what is refused doesn't fit even if it is too high by that much."""


@dataclass(frozen=True)
class Forecast:
    """Bytes that training takes beyond the loaded models, at the widest micro-batch.

    It is right within a factor of about 1.5 where a student of a megabyte or more is trained without sharding.
    """

    device: torch.device
    gradients: float
    optimizer: float
    activations: float
    """What the student's forward pass keeps for its backward pass."""
    backward: float
    """What the backward pass makes on its way: gradients of one layer's activations, and of the largest weight."""
    logits: float
    """The largest buffers of the divergence, and what the teacher holds meanwhile."""
    drawing: float
    """Keys and values of the sequences that are drawn for one step, and their logits."""
    batch: tuple[int, int]
    """Sequences of a micro-batch, and tokens of the longest."""

    @property
    def total(self) -> float:
        """The largest sum: gradients aren't there yet while sequences are drawn."""
        return self.optimizer + max(self.gradients + self.activations + self.backward + self.logits, self.drawing)

    def __str__(self) -> str:
        """One line."""
        names = ("gradients", "optimizer", "activations", "backward", "logits", "drawing")
        parts = ", ".join(f"{name} {shown_bytes(getattr(self, name))}" for name in names if getattr(self, name))
        rows = f"{self.batch[0]:,} × {self.batch[1]:,} tokens"
        return f"about {shown_bytes(self.total)} beyond the loaded models, at {rows} ({parts})"

    def check(self) -> None:
        """Refuse a training that can't fit.

        Raises:
            ResourceError: more memory is needed than is free.
        """
        free = None
        if self.device.type == "cuda":
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free = float(torch.cuda.mem_get_info(self.device)[0] + cached)
        do = f"train on micro-batches of {self.batch[0]:,} sequences of {self.batch[1]:,} tokens"
        instead = "Lower `per_device_train_batch_size`, with more `gradient_accumulation_steps`, or lower `max_new_tokens`"
        check_memory(self.total / _SURE, do, instead, free=free)


def forecast(
    student: CausalModel, teacher: Any, sides: tuple[Side, Side], args: Any, examples: Any, most: int, draws: bool
) -> Forecast | None:
    """Forecast the memory of a training; None where the examples are a stream.

    Args:
        student: whose activations are measured on a few tokens.
        teacher: a model, or what stands for one.
        sides: the heads of teacher and student.
        args: the training arguments.
        examples: token ids of prompts and completions.
        most: where completions are cut.
        draws: whether sequences are drawn, which may become as long as that.
    """
    if not isinstance(examples, list) or not examples:
        return None
    lengths = [(len(one["prompt"]), most if draws else min(most, len(one["completion"]))) for one in examples]
    longest, drawn = max(a + b for a, b in lengths), max(b for _, b in lengths)
    rows = args.per_device_train_batch_size
    free = [one for one in student.module.parameters() if one.requires_grad]
    sizes = [float(one.numel() * one.element_size()) for one in free]
    gradients = sum(sizes)
    optimizer = str(getattr(args.optim, "value", args.optim))
    states = next((kept for name, kept in _STATES.items() if optimizer.startswith(name)), 2.0)
    states *= 0.25 if "8bit" in optimizer else 1.0
    models = [one for one in (teacher, student) if isinstance(one, CausalModel)]
    width = sum(_logit_bytes(one, side) for one, side in zip((teacher, student), sides, strict=True) if one in models)
    if sides[1].head is not None:  # without it, whole rows of logits are there, those of the prompt too
        logits = min(float(_MAX_BUFFER_BYTES), rows * drawn * width) + _head_bytes(sides[1])
    else:
        logits = rows * longest * width + _LOGITS_HELD * rows * drawn * width / max(1, len(models))
    kept = _kept_bytes(student, sides[1], args, longest)
    drawing = max((_cache_bytes(one, longest) + _LOGITS_DRAWN * _logit_bytes(one, None) for one in models), default=0.0)
    drawing *= draws * rows * args.gradient_accumulation_steps
    layers = getattr(getattr(student.module, "config", None), "num_hidden_layers", None) or 1
    backward = _WEIGHTS_IN_FLIGHT * max(sizes, default=0.0) + rows * kept / layers
    batch = (rows, longest)
    return Forecast(student.device, gradients, states * gradients, rows * kept, backward, logits, drawing, batch)


def _kept_bytes(student: CausalModel, side: Side, args: Any, longest: int) -> float:
    """Return the bytes that a forward pass keeps of one sequence of the longest kind: c + a t + b t² through three lengths."""
    tokens = min(_MAX_TOKENS_TRIED, longest)
    tried = sorted({max(2, tokens // 4), max(2, tokens // 2), max(2, tokens)})
    kept = [_tried_bytes(student, side, args, t) for t in tried]
    if len(tried) < 3:
        return kept[-1] * longest / tried[-1]
    (t, u, v), (x, y, z) = tried, kept
    slope = (y - x) / (u - t)
    bend = max(0.0, ((z - y) / (v - u) - slope) / (v - t))
    return x + slope * (longest - t) + bend * (longest - t) * (longest - u)


def _tried_bytes(student: CausalModel, side: Side, args: Any, tokens: int) -> float:
    """Return the bytes that one forward pass keeps for its backward pass, those of the weights left out."""
    own = {one.untyped_storage().data_ptr() for one in (*student.module.parameters(), *student.module.buffers())}
    kept: dict[int, int] = {}

    def keep(one: torch.Tensor) -> torch.Tensor:
        storage = one.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return one

    counts = (torch.tensor([count], dtype=torch.int64, device="cpu") for count in (1, tokens))
    begin, end = counts
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="cpu")
    rollouts = Rollouts(ids, begin, end, torch.zeros(1, dtype=torch.bool, device="cpu"))
    narrow = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    mixed = contextlib.nullcontext() if narrow is None else torch.autocast(student.device.type, narrow)
    with evaluating(student), seeded(0), torch.enable_grad(), mixed:
        student.module.train()  # dropout keeps its masks
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
            rows = rows_of(student, student.module, side, rollouts)
        del rows
    return float(sum(kept.values()))


def _logit_bytes(model: Any, side: Side | None) -> float:
    """Return the bytes of one row of logits in float32."""
    if not isinstance(model, CausalModel):
        return 0.0
    head = None if side is None else side.head
    return 4.0 * (model.tokens if head is None else len(head.weight))


def _head_bytes(side: Side) -> float:
    """Return the bytes of a head's gradient, which is made in float32 before it is added to the others."""
    weight = None if side.head is None else side.head.weight
    return 4.0 * weight.numel() if weight is not None and weight.requires_grad else 0.0


def _cache_bytes(model: CausalModel, tokens: int) -> float:
    """Return the bytes of keys and values of one sequence."""
    config: Any = getattr(model.module, "config", None)
    layers, hidden = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if not layers or not hidden:
        return 0.0
    heads = getattr(config, "num_attention_heads", None) or 1
    each = getattr(config, "head_dim", None) or hidden // heads
    width = each * (getattr(config, "num_key_value_heads", None) or heads)
    return float(2 * layers * width * tokens * _element_size(model.module))


def _element_size(module: nn.Module) -> int:
    weight = next(module.parameters(), None)
    return 4 if weight is None else weight.element_size()
