"""Head: the last layer of a language model; with it, divergences need hidden states and no logits of every place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from whichkl.distillation.language.causal import inner_of

_MAX_DIFFERENCE = 1e-4
"""Largest difference between logits of the head and the model's own, as a share of their spread."""


@dataclass(frozen=True)
class Head:
    """logits = cap · tanh(scale · (h Wᵀ + b) / cap), or scale · (h Wᵀ + b) without a cap."""

    backbone: nn.Module
    """The part of the model whose `last_hidden_state` is h."""
    layer: nn.Module
    scale: float = 1.0
    cap: float | None = None

    @property
    def weight(self) -> Float[Tensor, "v h"]:
        """W, with its gradient."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Float[Tensor, " v"] | None:
        """The bias, if there is one."""
        bias: Tensor | None = getattr(self.layer, "bias", None)
        return bias

    def logits(self, hidden: Float[Tensor, "... h"]) -> Float[Tensor, "... v"]:
        """Return the logits of hidden states."""
        z = self.scale * nn.functional.linear(hidden, self.weight, self.bias)
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)


@contextlib.contextmanager
def capturing(head: Head) -> Iterator[list[Float[Tensor, "n t h"]]]:
    """Collect the hidden states of every call of the model inside the block; the call goes through wrappers such as DDP's."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        found.append(out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0])

    handle = head.backbone.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def head_of(model: nn.Module, ids: Int[Tensor, "n t"]) -> Head | None:
    """Return the head of a causal language model, if it reproduces the model's logits of these tokens; else None.

    The configuration's scale (`logit_scale`, or one over `logits_scaling`) and cap (`final_logit_softcapping`) are tried; what
    they don't explain, such as an adapter on the head, is no head: such a model's full logits are used.

    >>> head_of(nn.Linear(2, 2), torch.zeros(1, 1, dtype=torch.int64)) is None
    True
    """
    called, inner = model, inner_of(model)
    layer = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if not isinstance(layer, nn.Module) or not isinstance(getattr(layer, "weight", None), Tensor):
        return None
    plain = [layer.weight, getattr(layer, "bias", None)]
    if any(all(weight is not one for one in plain) for weight in layer.parameters() if weight.requires_grad):
        return None  # an adapter changes nothing before it is trained, so that the logits don't show it
    config = getattr(inner, "config", None)
    scaling = getattr(config, "logits_scaling", None)
    scale = getattr(config, "logit_scale", None) or (1 / scaling if scaling else 1.0)
    # OPT calls its decoder alone; Llama 4 calls itself its base
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    for backbone in (getattr(inner, "base_model", None), decoder, getattr(inner, "model", None)):
        if isinstance(backbone, nn.Module) and backbone is not inner:
            found = Head(backbone, layer, float(scale), getattr(config, "final_logit_softcapping", None))
            if _reproduces(found, called, ids):
                return found
    return None


def _reproduces(head: Head, model: nn.Module, ids: Int[Tensor, "n t"]) -> bool:
    with torch.no_grad():
        with capturing(head) as hidden:
            logits = model(input_ids=ids).logits
        if len(hidden) != 1 or hidden[0].shape[-1] != head.weight.shape[-1] or logits.shape[-1] != len(head.weight):
            return False
        known, ours = logits.float(), head.logits(hidden[0]).float()
    # Not relative: softmax knows differences of logits, and a model's own dtype rounds them
    rounding = torch.finfo(logits.dtype).eps * float(known.abs().amax()) * 8
    return float((known - ours).abs().amax()) <= max(_MAX_DIFFERENCE * float(known.std()), rounding)
