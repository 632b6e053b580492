"""Logits on which a loss is called: pairs that differ much and little, and pairs made to show one mistake."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Logits = Float[Tensor, "b t v"]

VOCABULARY = 128
WIDE = 4096
"""Tokens of a large vocabulary: more than any usual top-k."""


def pair(generator: torch.Generator, b: int, t: int, v: int = VOCABULARY, gap: float | None = None) -> tuple[Logits, Logits]:
    """Return a teacher of scale 2, and a student: the teacher with noise of size `gap`, by default of a random size per row."""
    teacher = 2 * torch.randn(b, t, v, generator=generator, dtype=torch.float64, device="cpu")
    size = torch.empty(b, t, 1, dtype=torch.float64, device="cpu").uniform_(0.3, 3, generator=generator) if gap is None else gap
    return teacher, teacher + size * torch.randn(b, t, v, generator=generator, dtype=torch.float64, device="cpu")


def one_row(generator: torch.Generator, b: int, t: int, v: int = VOCABULARY) -> tuple[Logits, Logits]:
    """Return the same row everywhere, so that values show how rows are weighted and nothing else."""
    teacher, student = pair(generator, 1, 1, v, 1.0)
    return teacher.expand(b, t, v).clone(), student.expand(b, t, v).clone()


def leaked(teacher: Logits, kept: int, amount: float = 0.5) -> Logits:
    """Return a student that agrees with the teacher on its `kept` likeliest tokens, up to a factor, and has mass on the others.

    The ranks don't change, so that a choice by the student's ranks sees the same tokens.
    """
    order = teacher.argsort(-1, descending=True)
    inside = torch.zeros_like(teacher, dtype=torch.bool).scatter_(-1, order[..., :kept], True)
    floor = teacher.masked_fill(~inside, float("inf")).amin(-1, keepdim=True)
    return torch.where(inside, teacher, teacher + amount * (floor - teacher))


def grid(low: float, high: float, count: int, log: bool = False) -> list[float]:
    """Return numbers from low to high, evenly spaced, or with evenly spaced logarithms."""
    x = torch.linspace(0, 1, count, dtype=torch.float64, device="cpu")
    values = low * (high / low) ** x if log else low + (high - low) * x
    return [float(one) for one in values]
