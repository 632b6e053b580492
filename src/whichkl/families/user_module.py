"""User module: any `nn.Module` whose `forward()`, or `forward(x)`, returns a `Distribution`, as a family."""

from __future__ import annotations

import copy
import hashlib
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from whichkl._checks import InputError, cannot
from whichkl.families.family import Family
from whichkl.families.layers import Shape, Summary
from whichkl.families.named import family_named
from whichkl.families.network_family import NetworkFamily, state_of


@dataclass(frozen=True, eq=False, repr=False)
class Module(NetworkFamily):
    """The models that a module can be with other weights; the module itself is copied, and never changed.

    `forward()` returns one distribution over rows; `forward(x)`, with (n, c) contexts, returns n of them (batch shape (n,)).
    The law has its own support and scale: nothing is standardised, and no weight decays.

    Args:
        module: training starts at its weights; weights that need no gradient stay fixed.

    Raises:
        InputError: it isn't a module, or none of its weights needs a gradient.

    >>> import torch
    >>> class Bell(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.centre = torch.nn.Parameter(torch.zeros(2))
    ...     def forward(self):
    ...         return torch.distributions.Independent(torch.distributions.Normal(self.centre, 1.0), 1)
    >>> Module(Bell())
    Module(Bell)
    """

    carried: ClassVar[bool] = False
    decays: ClassVar[bool] = False
    has_own_dtype: ClassVar[bool] = True

    module: nn.Module

    def __post_init__(self) -> None:
        """Check the module, and read from its signature whether it takes contexts."""
        given: Any = self.module
        if not isinstance(given, nn.Module):
            because = f"it is the module of a user ({given}), which isn't saved with a fit"
            raise InputError(cannot("rebuild this family", because, "Pass `family=` with such a module"))
        name = type(self.module).__name__
        if not any(one.requires_grad for one in self.module.parameters()):
            because = "none of its parameters asks for a gradient"
            raise InputError(cannot(f"fit the module `{name}`", because, "Make them `nn.Parameter`s"))
        taken, needed = _arguments(self.module)
        if needed > 1:
            because = f"its `forward` takes {needed} arguments"
            raise InputError(cannot(f"fit the module `{name}`", because, "Write `forward()`, or `forward(x)` for pairs (x, y)"))
        object.__setattr__(self, "conditional", taken > 0)
        object.__setattr__(self, "optional_context", needed == 0)

    def __repr__(self) -> str:
        return f"Module({type(self.module).__name__})"

    __str__ = __repr__

    @property
    def label(self) -> str:
        """Such as ``"the module Bell"``."""
        return f"the module {type(self.module).__name__}"

    def network(self, shape: Shape) -> nn.Module:
        """Return a deep copy of the module."""
        try:
            return copy.deepcopy(self.module)
        except (RuntimeError, TypeError) as error:
            because = f"it can't be copied ({' '.join(str(error).split())[:200]})"
            instead = "Compute what it derives from its weights in `forward`"
            raise InputError(cannot(f"fit `{self}`", because, instead)) from error

    def start(self, summary: Summary, shape: Shape) -> nn.Module:
        """Return a copy in its own dtype."""
        return self.network(shape)

    def config(self) -> dict[str, Any]:
        """Return the class's name, and a digest of the starting weights; the module itself isn't saved."""
        digest = hashlib.sha256(repr(self.module).encode())
        for name, value in state_of(self.module).items():
            digest.update(name.encode() + value.detach().cpu().double().contiguous().numpy().tobytes())
        return {"family": "Module", "module": f"{type(self.module).__qualname__}, start {digest.hexdigest()[:16]}"}


def family_of(obj: Any) -> Family:
    """Return the family of an object: a family itself, a text that names one, or a user's module.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(obj, Family):
        return obj
    if isinstance(obj, str):
        return family_named(obj)
    if isinstance(obj, nn.Module):
        return Module(obj)
    known = sorted(name for name, kind in Family.kinds.items() if not inspect.isabstract(kind) and name != "Module")
    name = obj.__name__ if isinstance(obj, type) else type(obj).__name__
    if isinstance(obj, type) and issubclass(obj, Family):
        raise InputError(cannot("fit this family", f"`{name}` is the class", f"Make one of it, say {name}()"))
    because = f"it is a `{name}`, and this version fits {', '.join(known)}, and modules of your own"
    raise InputError(cannot("fit this family", because, "Use, say, whichkl.families.Gaussian()"))


def _arguments(module: nn.Module) -> tuple[int, int]:
    """Count the positional arguments that `forward` takes, and those that it needs."""
    try:
        every = inspect.signature(module.forward).parameters.values()
    except (ValueError, TypeError):
        return 1, 0
    positional = [p for p in every if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    starred = any(p.kind == p.VAR_POSITIONAL for p in every)
    return len(positional) + starred, sum(p.default is p.empty for p in positional)
