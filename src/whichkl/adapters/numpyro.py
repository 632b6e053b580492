"""NumPyro: the posterior of a model in unconstrained coordinates, and the map back to the model's own names and shapes."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot, require
from whichkl.adapters.jax import FOLDERS, Rows, log_density
from whichkl.adapters.pairs import Paired
from whichkl.user_code import kept_running, place_of, said_of


class NumPyroModel:
    """The posterior p(u | data) of a NumPyro model, u ∈ ℝᵈ: its latent sites, unconstrained, in the order of the model.

    log p(u) = log joint density at T(u) + log|∂T/∂u|, up to the log evidence. T is NumPyro's `biject_to` of each site's support.
    The data are what the model passes to `obs=`, or what `numpyro.handlers.condition` fixes.

    Args:
        model: a function with `numpyro.sample` statements; `functools.partial` and handlers may wrap it.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        TargetError: the model raised, or it has no latent site, a discrete one, a delta, or a subsampled plate.

    >>> import torch, numpyro, numpyro.distributions as dist
    >>> model = NumPyroModel(lambda: numpyro.sample("s", dist.HalfNormal(1.0)))
    >>> model.names, model.dim
    (('s, free',), 1)
    >>> model.constrain(torch.zeros(2, 1))
    {'s': array([1., 1.])}
    """

    def __init__(self, model: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Run the model once to find its sites; see the class for the arguments."""
        self.model, self.args, self.kwargs = model, tuple(args), dict(kwargs or {})
        self.shapes: dict[str, tuple[int, ...]] = {}
        """The unconstrained shape of each latent site, in the order of the model."""
        names: list[str] = []
        biject_to = require("numpyro.distributions", "bayes").biject_to
        for name, site in self._trace().items():
            if _is_latent(name, site):
                self.shapes[name] = tuple(np.shape(biject_to(site["fn"].support).inv(site["value"])))
                names += _labels(name, self.shapes[name], _is_real(site["fn"].support))
        if not self.shapes:
            because = "it has no latent site: every `sample` statement is observed"
            raise TargetError(cannot("make a target of this NumPyro model", because, "Leave `obs=` out of the sites to infer"))
        self.names = tuple(names)
        self.dim = len(names)

    @cached_property
    def log_prob(self) -> Paired:
        """U ↦ log p(u), (n, d) → (n,), up to the log evidence, with its gradient."""
        return log_density(lambda u: -self._potential(u), batched=False)

    def constrain(self, u: Float[Tensor, "n d"]) -> dict[str, np.ndarray]:
        """Return the model's own sites at each point, deterministic ones included: a dict of arrays (n, *shape).

        Raises:
            TargetError: the points haven't d columns.
        """
        if u.ndim != 2 or u.shape[1] != self.dim:
            because = f"they have shape {tuple(u.shape)}, and the model has {self.dim} free coordinates"
            raise TargetError(cannot("carry these points to the model", because, "Give an (n, d) tensor"))
        found = self._constrained(u.detach().double().cpu())
        return {name: value.numpy() for name, value in found.items()}

    @cached_property
    def _constrained(self) -> Rows:
        jax = require("jax", "bayes")
        util = require("numpyro.infer.util", "bayes")
        model = self._seeded()

        def one(u: Any) -> dict[str, Any]:
            sites: dict[str, Any] = util.constrain_fn(model, self.args, self.kwargs, self._split(u), return_deterministic=True)
            return sites

        return Rows(jax.vmap(one))

    def _potential(self, u: Any) -> Any:
        util = require("numpyro.infer.util", "bayes")
        return util.potential_energy(self._seeded(), self.args, self.kwargs, self._split(u))

    def _split(self, u: Any) -> dict[str, Any]:
        """Return one point's coordinates by site."""
        parts, start = {}, 0
        for name, shape in self.shapes.items():
            parts[name] = u[start : start + math.prod(shape)].reshape(shape)
            start += math.prod(shape)
        return parts

    def _seeded(self) -> Any:
        """Return the model with a fixed random key, which its substituted statements ask for and don't use."""
        return require("numpyro.handlers", "bayes").seed(self.model, 0)

    def _trace(self) -> dict[str, Any]:
        try:
            with _tracing() as sites, kept_running():
                self.model(*self.args, **self.kwargs)
            return sites
        except Exception as error:
            because = f"{said_of(error)}{place_of(error, FOLDERS)}"
            instead = "Correct it, or pass the arguments that it lacks, as MCMC.run takes them: `Target.of(model, data, …)`"
            raise TargetError(cannot("run this NumPyro model", because, instead)) from error


KIND: str = "a NumPyro model"


def claims(obj: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a callable runs NumPyro statements when it is called, or comes with arguments. This doesn't import NumPyro."""
    if "numpyro" not in sys.modules or not callable(obj):
        return False
    if args or kwargs:
        return True
    # a model that raises is reported when it is traced again for use
    with _tracing() as sites, contextlib.suppress(Exception), kept_running():
        obj(*args, **kwargs)
    return bool(sites)


posterior = NumPyroModel


@contextlib.contextmanager
def _tracing() -> Iterator[dict[str, Any]]:
    """Record the sites that run in a block; each gets a value inside its support, also if its prior is improper."""
    handlers = require("numpyro.handlers", "bayes")
    feasible = require("numpyro.infer", "bayes").init_to_feasible()
    with handlers.trace() as sites, handlers.substitute(substitute_fn=feasible), handlers.seed(rng_seed=0):
        yield sites


def _is_latent(name: str, site: Mapping[str, Any]) -> bool:
    """Whether a site is to be inferred; refuse one that can't be."""
    kind = type(site.get("fn")).__name__
    if site["type"] == "plate" and len(site["value"]) != site["args"][0]:
        because = f"its plate `{name}` shows {len(site['value'])} of {site['args'][0]} rows, different ones at every call"
        instead = "Leave `subsample_size` out"
    elif site["type"] == "param":
        because = f"`{name}` is a `numpyro.param`, which has no prior"
        instead = "Give it one with `numpyro.sample`, or fix its value"
    elif site["type"] != "sample" or site["is_observed"]:
        return False
    elif site["fn"].support.is_discrete:
        because = f"`{name}` is a latent {kind}, and the families that are fitted have densities on ℝᵈ"
        instead = "Sum it out, for example with `MixtureSameFamily`, or pass it to `obs=`"
    elif kind == "Delta":
        because, instead = f"`{name}` is a point mass", "Use `numpyro.deterministic` for it"
    else:
        return True
    raise TargetError(cannot("use this NumPyro model", because, instead))


def _is_real(support: Any) -> bool:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    real = require("numpyro.distributions", "bayes").constraints.real
    return type(support) is type(real)


def _labels(name: str, shape: tuple[int, ...], is_real: bool) -> list[str]:
    """Name each coordinate: `theta[0]`, or `tau, free` if the coordinate isn't the site's own value."""
    free = "" if is_real else ", free"
    places = [f"[{','.join(map(str, place))}]" if place else "" for place in product(*map(range, shape))]
    return [f"{name}{place}{free}" for place in places]
