"""Head: hidden states and the matrix that makes logits of them; its products, summed in float32 whatever the dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_NUMBERS_PER_TILE = 1 << 22
"""Numbers of a narrow weight that are widened at a time: 16 MB."""


@dataclass(frozen=True)
class Head:
    """Logits softcap · tanh(s (h Wᵀ + b) / softcap), or s (h Wᵀ + b) without a soft cap, s = `logit_scale`.

    Attributes:
        hidden: (n, h).
        weight: (v, h).
        bias: (v,) or None.
        logit_scale: multiplies the logits.
        softcap: bounds them after that.
    """

    hidden: Float[Tensor, "n h"]
    weight: Float[Tensor, "v h"]
    bias: Float[Tensor, " v"] | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def project(self, rows: slice | Tensor, out: Float[Tensor, "r v"]) -> None:
        """Write h Wᵀ + b of some rows."""
        hidden = self.hidden[rows]
        if _native(self.weight, out.dtype):
            torch.mm(hidden.to(self.weight.dtype), self.weight.T, out_dtype=out.dtype, out=out)
        else:
            hidden = hidden.to(out.dtype)
            for columns, tile in _tiles(self.weight, out.dtype):
                torch.mm(hidden, tile.T, out=out[:, columns])
        if self.bias is not None:
            out.add_(self.bias)

    def log_probs(self, product: Float[Tensor, "r v"], temperature: float) -> tuple[Float[Tensor, "r v"], Tensor | None]:
        """Return log-probabilities of projected rows, and tanh where there is a soft cap."""
        if self.softcap is None:
            factor = self.logit_scale / temperature
            return torch.log_softmax(product if factor == 1 else product * factor, -1), None
        bent = torch.tanh(product * (self.logit_scale / self.softcap))
        return torch.log_softmax(bent * (self.softcap / temperature), -1), bent

    def hidden_gradient(self, slope: Float[Tensor, "r v"], out: Float[Tensor, "r h"]) -> None:
        """Write the gradient by the hidden states of the rows whose gradient by the product is `slope`."""
        if _native(self.weight, out.dtype):
            torch.mm(slope.to(self.weight.dtype), self.weight, out_dtype=out.dtype, out=out)
            return
        for columns, tile in _tiles(self.weight, out.dtype):
            torch.addmm(out, slope[:, columns], tile, beta=0 if columns.start == 0 else 1, out=out)

    def add_weight_gradient(
        self, rows: slice | Tensor, slope: Float[Tensor, "r v"], total: Float[Tensor, "v h"], first: bool
    ) -> None:
        """Add the gradient by the weight that these rows contribute; the first ones write over what was there."""
        if not _native(self.weight, total.dtype):
            hidden = self.hidden[rows].to(total.dtype)
            torch.addmm(total, slope.T, hidden, beta=0 if first else 1, out=total)
            return
        narrow, hidden = slope.to(self.weight.dtype), self.hidden[rows].to(self.weight.dtype)
        for columns in _columns(len(total), hidden.shape[1]):
            tile = torch.mm(narrow[:, columns].T, hidden, out_dtype=total.dtype)
            total[columns] = tile if first else total[columns] + tile


def _native(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the device multiplies this dtype and sums in float32; float16 is too narrow for gradients of a mean."""
    return weight.is_cuda and weight.dtype == torch.bfloat16 and dtype == torch.float32


def _tiles(weight: Float[Tensor, "v h"], dtype: torch.dtype) -> Iterator[tuple[slice, Float[Tensor, "c h"]]]:
    """The weight itself, or some rows of it at a time in a wider dtype, so that no wide copy of the whole is made."""
    if weight.dtype == dtype:
        yield slice(0, len(weight)), weight
        return
    for columns in _columns(*weight.shape):
        yield columns, weight[columns].to(dtype)


def _columns(vocabulary: int, width: int) -> Iterator[slice]:
    step = max(1, _NUMBERS_PER_TILE // max(width, 1))
    return (slice(start, min(start + step, vocabulary)) for start in range(0, vocabulary, step))
