"""Probes: the logits, masks and labels on which a loss is called."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Logits = Float[Tensor, "b t v"]
Mask = Bool[Tensor, "b t"]
Labels = Int[Tensor, "b t"]

VOCABULARY = 128
SURE_GAPS = (30.0, 115.0, 1000.0)
"""Logits by which a sure row prefers one token. exp(−30) is 0 next to 1 in float32, exp(−115) is 0 in float32 and bfloat16,
exp(−1000) in float64. Models reach the first two; a small temperature turns them into the third."""
_LOGIT_RANGE_OF_PADDING = 40.0


def pair_of_logits(
    generator: torch.Generator, b: int, t: int, v: int = VOCABULARY, gap: float | None = None
) -> tuple[Logits, Logits]:
    """Return a teacher of scale 2, and a student: the teacher with noise of size `gap`, by default of a random size per row."""
    teacher = 2 * torch.randn(b, t, v, generator=generator, dtype=torch.float64, device="cpu")
    size = torch.empty(b, t, 1, dtype=torch.float64, device="cpu").uniform_(0.3, 3, generator=generator) if gap is None else gap
    return teacher, teacher + size * torch.randn(b, t, v, generator=generator, dtype=torch.float64, device="cpu")


def sure_pairs(gap: float) -> dict[str, tuple[Logits, Logits]]:
    """Return pairs of which one side or both prefer one token by `gap`, by a name of each."""
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(2, 2, 4, VOCABULARY, generator=generator, dtype=torch.float64, device="cpu")
    sure, plain = rest[0].clone(), rest[1]
    sure[..., 0] = sure[..., 1:].amax(-1) + gap
    return {
        "both are sure of one token": (sure, sure.roll(0, -1) + 0.1 * plain),
        "both are sure, of different tokens": (sure, sure.roll(1, -1)),
        "the teacher is sure": (sure, plain),
        "the student is sure": (plain, sure),
    }


def tempered_pairs(teacher: Logits, student: Logits) -> list[tuple[Logits, Logits]]:
    """Return pairs in which both sides are sharpened and flattened, by different factors."""
    factors = [(a, b) for a in (1 / 3, 1, 3) for b in (1 / 3, 1, 3)]
    return [(a * teacher, b * other) for a, b in factors for other in (teacher, student) if a != b or other is student]


def leaked(teacher: Logits, kept: int) -> Logits:
    """Return a student that agrees with the teacher on its `kept` likeliest tokens, up to a factor, and has mass on the others.

    The ranks don't change, so that a choice by the student's ranks sees the same tokens.
    """
    order = teacher.argsort(-1, descending=True)
    inside = torch.zeros_like(teacher, dtype=torch.bool).scatter_(-1, order[..., :kept], True)
    floor = teacher.masked_fill(~inside, float("inf")).amin(-1, keepdim=True)
    return torch.where(inside, teacher, teacher + 0.5 * (floor - teacher))


def wider(logits: Logits, unit: float) -> Logits:
    """Add as many columns again whose probability counts for nothing, and doesn't underflow."""
    low = logits.amin(-1, keepdim=True) - _LOGIT_RANGE_OF_PADDING * unit
    return torch.cat([logits, low.expand_as(logits)], -1)


def some_labels(shape: torch.Size, step: int = 7) -> Labels:
    """Return labels that differ from place to place, none of them ignored."""
    b, t, v = shape
    return ((torch.arange(b * t, device="cpu") * step + step) % v).view(b, t)
