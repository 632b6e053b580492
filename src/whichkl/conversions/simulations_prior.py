"""Prior: the distribution of a simulator's parameters, as a target that can be sampled, of one law or of one per parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, Independent

from whichkl._checks import InputError, cannot, quoted
from whichkl.arrays import default_names
from whichkl.targets import Target


def read_prior(given: Any, what: str = "prior", *, samples: bool = True, names: Sequence[str] | None = None) -> Target:
    """Return a distribution of parameters as a target.

    Args:
        given: a `Distribution`, whose batch axis, if there is one, counts independent parameters; a `Target`; or independent
            laws, in a list or in a dict by their names.
        what: its argument.
        samples: whether it must have a sampler.
        names: the parameters; laws in a dict are brought into this order, and a `Target` with names of its own must have it.

    Raises:
        InputError: it is none of these, is discrete, or can't be sampled.

    >>> from torch.distributions import LogNormal, Uniform
    >>> read_prior({"rate": LogNormal(0.0, 1.0), "start": Uniform(-1.0, 1.0)})
    Target(dim=2, access: sampler, log_prob, normalized, differentiable)
    """
    do = f"use this `{what}`"
    if isinstance(given, Distribution) and len(given.batch_shape) == 1 and given.event_shape == ():
        given = Independent(given, 1)
    if isinstance(given, Mapping):
        target = _joint([*given.values()], [str(name) for name in given], do)
    elif isinstance(given, (list, tuple)) and given and all(isinstance(one, (Distribution, Target)) for one in given):
        target = _joint(given, None, do)
    elif isinstance(given, (Distribution, Target)):
        target = Target.of(given)
    else:
        found = "the class" if isinstance(given, type) else "a"
        because = f"{found} `{getattr(given, '__name__', type(given).__name__)}` is no distribution"
        instead = "Give a torch Distribution, a Target with `sampler=`, or a dict of one distribution per parameter"
        raise InputError(cannot(do, because, instead))
    is_named = isinstance(given, Mapping) or target.names != default_names(target.dim)
    if names is not None and is_named and target.names != tuple(names):
        order, laws = order_of(target.names, names, do), [*given.values()] if isinstance(given, Mapping) else []
        if len(laws) != target.dim:  # a law of several parameters can't be taken apart
            raise InputError(cannot(do, f"its parameters are {quoted(target.names)}", f"Give them as {quoted(names)}"))
        target = _joint([laws[i] for i in order], names, do)
    if target.bijection.is_discrete:
        instead = "Give continuous parameters, and draw discrete ones inside the simulator"
        raise InputError(cannot(do, "it is discrete, and posteriors are fitted as densities", instead))
    if samples and target.sampler is None:
        instead = "Give a torch Distribution, or a Target with `sampler=`"
        raise InputError(cannot(do, f"it has only {target.access.label}, and its draws are needed", instead))
    return target


def read_proposal(given: Any, prior: Any, names: Sequence[str], *, samples: bool = False) -> Target:
    """Return the distribution that parameters were drawn from.

    Args:
        given: as for `read_prior`; a dict may name some of the laws of a `prior` that is a dict, and the prior's are the others.
        prior: as the user gave it.
        names: the parameters.
        samples: whether it must have a sampler.

    Raises:
        InputError: see `read_prior`.

    >>> from torch.distributions import Normal
    >>> read_proposal({"b": Normal(0.0, 2.0)}, {"a": Normal(0.0, 1.0), "b": Normal(0.0, 1.0)}, ("a", "b")).names
    ('a', 'b')
    """
    if isinstance(given, Mapping) and isinstance(prior, Mapping) and given.keys() <= prior.keys():
        given = {**prior, **given}
    return read_prior(given, "proposal", samples=samples, names=names)


def order_of(found: Sequence[str], names: Sequence[str], do: str) -> list[int]:
    """Return the places of these names among those that were found.

    Raises:
        InputError: they aren't the same names.
    """
    if sorted(found) != sorted(names):
        because = f"the names are {quoted(found)}, and those of the parameters {quoted(names)}"
        raise InputError(cannot(do, because, "Give each parameter under its name"))
    return [list(found).index(name) for name in names]


def parameter_names(prior: Target) -> tuple[str, ...]:
    """Return the prior's own names, or theta1, theta2, … where it has none.

    >>> parameter_names(read_prior(torch.distributions.Normal(torch.zeros(2), 1.0)))
    ('theta1', 'theta2')
    """
    return default_names(prior.dim, "theta") if prior.names == default_names(prior.dim) else prior.names


def _joint(parts: Sequence[Any], names: Sequence[str] | None, do: str) -> Target:
    """Return the product of independent laws."""
    laws = [read_prior(one) for one in parts]
    ends = [*accumulate((law.dim for law in laws), initial=0)]
    if names is not None:
        wide = [(name, law.dim) for name, law in zip(names, laws, strict=True)]
        names = [name if dim == 1 else f"{name}{i + 1}" for name, dim in wide for i in range(dim)]
    whole = [law for law in laws if law.bijection.constraints[0].event_dim]
    if not laws or (whole and len(laws) > 1):
        because = f"{whole[0].bijection.constraints[0]} binds its columns together" if whole else "it holds no distribution"
        raise InputError(cannot(do, because, "Give one Distribution per parameter, each of a number"))
    if names is not None and len(set(names)) < len(names):
        raise InputError(cannot(do, f"a name appears twice in {quoted(names)}", "Give each parameter its own name"))
    support = [part for law in laws for part in law.bijection.constraints * (law.dim // len(law.bijection.constraints))]
    can_evaluate = all(law.density is not None for law in laws)

    def sampler(n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        seeds = np.random.SeedSequence(generator.initial_seed()).generate_state(len(laws))
        drawn = [law.draws(n, int(seed)).to(torch.float64) for law, seed in zip(laws, seeds, strict=True)]
        return torch.cat(drawn, 1)

    def log_prob(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        spans = zip(laws, ends, ends[1:], strict=False)
        return torch.stack([law.log_prob(x[:, a:b]) for law, a, b in spans]).sum(0)

    return Target(
        sampler=sampler,
        log_prob=log_prob if can_evaluate else None,
        normalized=all(law.normalized for law in laws),
        dim=ends[-1],
        support=support,
        names=names,
    )
