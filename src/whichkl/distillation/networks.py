"""Networks: copies of the user's modules, their inputs, and the logits that they return."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whichkl._checks import InputError, cannot
from whichkl.files.saving import Saved
from whichkl.process.memory import refuse_if_ran_out
from whichkl.process.seeds import seeded
from whichkl.user_code import call_user, said_of


class Teacher:
    """A frozen copy of a module in evaluation mode: no dropout, no statistics of batches, no gradient."""

    def __init__(self, module: Any, seed: int = 0) -> None:
        """Copy the module."""
        self.module = copied(module, "teacher", seed).eval().requires_grad_(False)

    def __call__(self, x: Any) -> Float[Tensor, "n c"]:
        """Return logits without a graph."""
        with torch.no_grad():
            return checked(logits_of(self.module, x, "teacher"), "teacher")


def copied(module: Any, who: str, seed: int) -> nn.Module:
    """Return a deep copy of a module, or what a function without arguments makes under a seed."""
    if not isinstance(module, nn.Module) and callable(module):
        with seeded(seed):
            made: Any = call_user(module, f"make the {who}", "Correct the function that makes it")
        if not isinstance(made, nn.Module):
            because = f"the function made a `{type(made).__name__}`"
            raise InputError(cannot(f"use this {who}", because, "Return a torch.nn.Module"))
        return made
    if not isinstance(module, nn.Module):
        because = f"it is a `{type(module).__name__}`"
        raise InputError(cannot(f"use this {who}", because, "Pass a torch.nn.Module, or a function that makes one"))
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        because = f"it can't be copied ({in_short(error)})"
        raise InputError(cannot(f"use this {who}", because, "Compute what it derives from its weights in `forward`")) from error


def with_weights(module: nn.Module, tensors: Mapping[str, Tensor], saved: Saved, folder: Path, instead: str) -> nn.Module:
    """Return a module with the weights that were saved, in evaluation mode.

    Raises:
        InputError: the weights aren't those of such a module; `instead` says what to pass.
        IntegrityError: some are NaN.
    """
    broken = [name for name, value in tensors.items() if value.is_floating_point() and bool(value.isnan().any())]
    if broken:
        raise saved.damaged(folder, f"the weights `{broken[0][:80]}` are NaN")
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        because = f"its weights aren't those of such a `{type(module).__name__}` ({in_short(error)})"
        raise InputError(cannot(f"load `{folder}`", because, instead)) from error
    return module.eval()


def logits_of(module: nn.Module, x: Any, who: str) -> Float[Tensor, "n c"]:
    """Call a module on inputs, which are brought to its device and its floating-point type; take `.logits` where it has them."""
    like = next((one for one in module.parameters() if one.is_floating_point()), None)
    try:
        found: Any = module(_fed(x, like))
    except (KeyboardInterrupt, InputError):
        raise
    except BaseException as error:  # SystemExit too: a network's own code may raise it
        refuse_if_ran_out(error, f"call the {who}")
        why = said_of(error) if isinstance(error, SystemExit) else f"it fails ({in_short(error)})"
        raise InputError(cannot(f"call this {who}", why, "Correct it, or the shape of the inputs")) from error
    logits = getattr(found, "logits", found)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        what = f"{logits.dtype} of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a `{type(logits).__name__}`"
        raise InputError(cannot(f"use this {who}", f"it returns {what}", "Return logits, (n, classes), one row per example"))
    if logits.shape[1] < 2:
        because = f"it returns {'one logit' if logits.shape[1] else 'no logit'} per example, and the softmax of one logit is 1"
        instead = "Return two columns for a binary model with one logit z, torch.cat([z, torch.zeros_like(z)], -1)"
        raise InputError(cannot(f"use this {who}", because, instead))
    return logits


def checked(logits: Float[Tensor, "n c"], who: str) -> Float[Tensor, "n c"]:
    """Refuse NaN, +∞ and rows of −∞ only; some −∞ in a row is a class that is impossible."""
    bad = ~logits.amax(-1).isfinite() | logits.isnan().any(-1)
    if bool(bad.any()):
        because = (
            f"its logits are NaN or infinite in {int(bad.sum())} of {len(logits)} rows, first in row {int(bad.nonzero()[0])}"
        )
        raise InputError(cannot(f"use this {who}", because, "Look at its weights, and at the scale of the inputs"))
    return logits


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of names, types, shapes and bits."""
    found = hashlib.sha256()
    for name, value in tensors.items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _fed(x: Any, like: Tensor | None) -> Any:
    """Bring tensors in x, however nested, to a parameter's device; floating-point ones also to its type."""
    if like is None:
        return x
    if isinstance(x, Tensor):
        return x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)
    if isinstance(x, Mapping):
        return {name: _fed(one, like) for name, one in x.items()}
    return type(x)(_fed(one, like) for one in x) if type(x) in (list, tuple) else x


def in_short(error: BaseException) -> str:
    """Return the text of an error on one line, cut off where it's long."""
    return " ".join(str(error).split())[:200]
