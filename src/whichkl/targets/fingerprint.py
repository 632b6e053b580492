"""Fingerprint: what distinguishes one target from another, and one version of the code from another."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whichkl.targets import Target

_DRAWS = 64
_POINTS = 16
"""Points at which functions are evaluated. Every second point is ten times as far out, where small changes show."""
_WITHOUT_NUMBERS = {
    *("cli.py", "__main__.py", "commands", "plots", "reporting", "demo", "distillation/audit", "sklearn.py", "arviz.py"),
    *("verifying.py", "printable.py", "process/held_signals.py", "process/memory.py"),
}
"""Files and folders on which no number of a fit or a study depends."""
_STUDY_FILES = ("cell.py", "coverage.py", "held_out.py", "measurements.py", "measures.py", "plan.py")
"""Files of the folder `study` on which the cells of a study depend."""


def target_fingerprint(target: Target) -> dict[str, Any]:
    """Describe a target as JSON holds it: its rows by their hash, its functions by their values at a few points.

    Values are rounded to nine digits, so that the same study resumes on another machine.
    """
    digest: dict[str, Any] = {"names": list(target.names), "support": target.bijection.describe(), "access": target.access.label}
    for name in ("samples", "context", "weights", "chains"):
        value = getattr(target, name)
        if value is not None:
            digest[name] = tensor_hash(value)
    if target.samples is not None:
        digest["rows"] = len(target.samples)
    if target.sampler is not None:
        digest["draws"] = _rounded_hash(target.draws(_DRAWS, seed=0))
    if target.density is not None and not target.bijection.is_discrete:
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(_POINTS, target.bijection.free_dim, generator=generator, dtype=torch.float64, device="cpu")
        u[1::2] *= 10
        x = target.bijection.forward(u).to(target.dtype).to(target.device)
        value, gradient, _ = target.density.trial(x)
        digest["log_prob"] = _rounded_hash(value)
        if target.score is not None:
            digest["score"] = _rounded_hash(gradient)
    elif target.density is not None and target.bijection.levels is not None:
        generator = torch.Generator().manual_seed(0)
        columns = [
            torch.randint(low, high + 1, (_POINTS,), generator=generator, device="cpu") for low, high in target.bijection.levels
        ]
        digest["log_prob"] = _rounded_hash(target.log_prob(torch.stack(columns, 1).to(target.device, target.dtype)).detach())
    return digest


def tensor_hash(value: Tensor) -> str:
    """Return the first 16 digits of the SHA-256 of a tensor's numbers."""
    return hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


@lru_cache(maxsize=1)
def code_version() -> str:
    """Return the versions of whichkl and torch, and a hash of every file on which numbers depend."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        is_read = _WITHOUT_NUMBERS.isdisjoint((parts[0], "/".join(parts[:2])))
        if is_read and (parts[0] != "study" or parts[-1] in _STUDY_FILES):
            digest.update("/".join(parts).encode() + b"\0" + path.read_bytes())
    return f"whichkl {version('whichkl')} ({digest.hexdigest()[:12]}), torch {torch.__version__.split('+')[0]}"


def _rounded_hash(value: Tensor) -> str:
    text = " ".join(f"{one:.9g}" for one in value.detach().cpu().to(torch.float64).flatten().tolist())
    return hashlib.sha256(text.encode()).hexdigest()[:16]
