"""Target: the distribution p that is to be matched, and what can be done with it."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution
from torch.utils.data import DataLoader, Dataset

from whichkl._checks import InputError, TargetError, cannot, check_finite
from whichkl.access import Access
from whichkl.adapters.numpyro import NumPyroModel, is_numpyro
from whichkl.adapters.pairs import paired
from whichkl.arrays import check_filled, check_pairs, default_names, read_matrix, read_names, read_weights, split_pair, widened
from whichkl.chains import chain_ids, thinning
from whichkl.distributions import distribution_log_prob, inside
from whichkl.process.seeds import seeded, seeded_draws
from whichkl.process.torch_modes import plain_modes
from whichkl.samples import Stream, Table, open_samples
from whichkl.samples.repeats import Repeats, repeats_of
from whichkl.targets import enumeration
from whichkl.targets.coordinates import free_log_prob, free_sampler, free_score
from whichkl.targets.energies import NegativeEnergy
from whichkl.targets.evaluations import Evaluations
from whichkl.targets.line_integral import LineIntegral
from whichkl.targets.log_density import Function, LogDensity, Score
from whichkl.targets.pairing import has_flat_response, tell_apart
from whichkl.targets.supports import Bijection, Support, support_of
from whichkl.user_code import call_user

_MAX_DIM = 1_000_000
"""Largest number of coordinates of a target without samples: even a factorised fit of this many takes 16 GB of memory."""


class Target:
    """A distribution p on ℝᵈ, known by samples, by a sampler, by a log density, or by several of them.

    Args:
        samples: (n, d) tensor, array or DataFrame of draws of p; (n,) is read as (n, 1). A pair (x, y) makes a conditional
            target: y is what is modelled, given x. The path of a sample file is read into memory up to 256 MB of file and of
            float64, or where anything but the support goes with its rows; a larger file, a folder or a list of files, a
            `DataLoader`, a `Dataset` or a `Stream` is read in parts, as often as needed.
        log_prob: f(x), (n, d) → (n,), the natural log of p's density up to a constant. A tensor function is
            differentiated by autograd; one of arrays by central differences (2d evaluations a gradient); one of JAX arrays
            by JAX, (d,) → () too.
        energy: E(x), (n, d) → (n,), in place of `log_prob`: log p = −E − log Z. An `nn.Module` is copied and frozen.
        sampler: draw(n) or draw(n, generator) → (n, d). Without a generator argument torch's and NumPy's global
            seeds are set for the call and restored after it.
        score: g(x), (n, d) → (n, d), the gradient of log p; without `log_prob` it's integrated along lines to log p up to a
            constant. True where `log_prob` returns the pair (value, gradient), as SciPy's ``jac=True`` has it.
        dim: d; needed where there are no samples.
        support: where p > 0: a `torch.distributions.constraints` member, one a column, or a word (``"positive"``). With
            ``"boolean"`` or ``"integer_interval(0, 3)"`` the target is discrete, and `log_prob` gets rows of whole numbers.
        normalized: whether `log_prob` integrates to one.
        weights: (n,) non-negative weights of `samples`.
        chains: where `samples` come from Markov chains, in the order of time: how many equally long ones are stacked one
            after another, or (n,) ids of the chain of each row. Error bars then count effective draws.
        names: the d column names; unless said, those of a DataFrame or file, else x1, x2, …, and of y given x y1, y2, … (y).
        given: names of the columns of `samples` that are x; the rest are y, which is modelled given x.
        batched: False if `log_prob` and `score` take one point, (d,).
        dtype: what the functions are called with: float64 unless said.
        device: where they are called: the CPU, or the device of `samples`, unless said.

    Raises:
        InputError: samples, names, weights or dimension don't fit.

    >>> target = Target(log_prob=lambda x: -x.square().sum(-1) / 2, dim=2)
    >>> target.access
    <Access: log_prob, differentiable>
    """

    @plain_modes()
    def __init__(
        self,
        *,
        samples: Any = None,
        log_prob: Function | None = None,
        energy: Function | None = None,
        sampler: Function | None = None,
        score: Function | bool | None = None,
        dim: int | None = None,
        support: Support = None,
        normalized: bool = False,
        weights: Any = None,
        chains: Any = None,
        names: Sequence[str] | None = None,
        given: str | Sequence[str] | None = None,
        batched: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Take what is known of p; see the class for the arguments."""
        self.carrier: Bijection | None = None
        self.origin: NumPyroModel | None = None
        """The model that this is the posterior of; `origin.constrain(u)` has its own names and shapes."""
        self.known_modes: Tensor | None = None
        """Points (k, d) at modes that were found before, the heaviest first, from which searches start too."""
        self.repeats: Repeats | None = None
        """Which rows are equal, where that was looked for and matters; see `noting_repeats`."""
        if energy is not None:
            if log_prob is not None or score is not None or normalized:
                because = "an energy is log p, turned round, up to its own log Z"
                raise InputError(cannot("use `energy=` with `log_prob=`, `score=` or `normalized=`", because, "Pass one of them"))
            log_prob = NegativeEnergy(energy)
        if isinstance(score, bool):
            if score and log_prob is None:
                because = "it says that `log_prob` returns value and gradient, and there is none"
                raise InputError(cannot("use `score=True`", because, "Pass `log_prob=`, or the gradient as `score=`"))
            log_prob, batched = (paired(log_prob, batched), True) if score and log_prob else (log_prob, batched)
            score = None
        beside = (log_prob, sampler, score, weights, chains)
        found = open_samples(samples, is_whole=any(one is not None for one in beside))
        if isinstance(found, Table):
            samples, names = found.values, found.names if names is None else names
        x_names: Sequence[str] | None = None
        if given is not None:
            found, samples, names, x_names = tell_apart(found, samples, names, given)
        self.stream = found if isinstance(found, Stream) else None
        samples, x = (None, None) if self.stream is not None else split_pair(samples)
        self.samples = None if samples is None else read_matrix(samples, dtype, device)
        self.samples = self.samples if self.samples is None or dtype is not None else widened(self.samples)
        self.context = None if x is None else read_matrix(x, dtype, device, "x")
        self.scalar = self.context is not None and np.ndim(samples) == 1
        """Whether y came as (n,), or as the one column beside `given=`, so that a conditional model has an event of no axes."""
        width = None if self.samples is None else self.samples.shape[1]
        width = width if self.stream is None else len(self.stream.names)
        _check_dim(dim, width)
        if dim is None and width is None and (log_prob or sampler or score):
            because = "there are no samples to read the dimension from"
            raise InputError(cannot("make a target of functions alone", because, "Pass `dim=`"))
        self.dim = width or dim or 1
        if self.stream is not None:
            self.context_names, self.scalar = self.stream.context_names, has_flat_response(self.stream)
            names = _stream_names(self.stream) if names is None else names
        else:
            self.context_names = () if self.context is None else read_names(x_names, x, self.context.shape[1])
        self.names = read_names(names, samples, self.dim, is_response=self.context is not None)
        self.normalized = normalized and log_prob is not None
        self.dtype = dtype or (self.samples.dtype if self.samples is not None else torch.float64)
        self.device = torch.device(device or (self.samples.device if self.samples is not None else "cpu"))
        self.evaluations = Evaluations()
        self.score = score
        self.sampler = sampler
        self.bijection = Bijection(support, self.dim)
        inside = self.bijection.inside(self.dtype, self.device)
        self.density = self._density(log_prob, score, batched, inside)
        self._check_context()
        self._check_stream(weights, chains)
        self.weights = self._check_samples(weights)
        self.chains = self._check_chains(chains)

    @classmethod
    def of(cls, obj: Any, /, *args: Any, **kwargs: Any) -> Target:
        """Make a target of a torch distribution, an array, tensor or DataFrame, a sample file, folder or list of them, a loader.

        Args:
            obj: one of these, or a NumPyro model: its posterior, in unconstrained coordinates (see `NumPyroModel`).
            args: the model's arguments, as ``MCMC.run`` takes them.
            kwargs: its keyword arguments.

        Raises:
            InputError: the object is none of these.
            TargetError: the model can't be run, or has a discrete latent site.
        """
        if is_numpyro(obj, args, kwargs):
            model = NumPyroModel(obj, args, kwargs)
            target = cls(log_prob=model.log_prob, dim=model.dim, names=model.names)
            target.origin = model
            return target
        if args or kwargs:
            because = f"a `{type(obj).__name__}` takes none; they are for a NumPyro model"
            raise InputError(cannot("use further arguments", because, "Leave them out"))
        if isinstance(obj, Target):
            return obj
        if isinstance(obj, Distribution):
            return _of_distribution(obj)
        if isinstance(obj, (Stream, DataLoader, Dataset, str, os.PathLike)):
            return cls(samples=obj)
        if isinstance(obj, (Tensor, np.ndarray, list, tuple)) or hasattr(obj, "to_numpy"):
            return cls(samples=obj)
        if callable(obj):
            because = "a bare function doesn't say its dimension"
            instead = "Use `Target(log_prob=f, dim=d)`; a NumPyro model's arguments go beside it, `Target.of(model, data, …)`"
            raise InputError(cannot("make a target of it", because, instead))
        known = "a torch Distribution, an array, a DataFrame, a path, a DataLoader or a NumPyro model"
        raise InputError(cannot(f"make a target of a `{type(obj).__name__}`", f"it is none of {known}", "Convert it"))

    @cached_property
    def access(self) -> Access:
        """What can be done with this target."""
        have = Access(0)
        if self.samples is not None or self.stream is not None:
            have |= Access.SAMPLES
        if self.sampler is not None:
            have |= Access.SAMPLER
        if self.density is not None and self.line_integral is None:
            have |= Access.LOG_PROB
            have |= Access.NORMALIZED if self.normalized else Access(0)
            is_smooth = self.density.differentiable and not self.bijection.is_discrete
            have |= Access.DIFFERENTIABLE if is_smooth else Access(0)
        if self.score is not None:
            have |= Access.SCORE
        levels = self.bijection.levels
        if levels is not None and enumeration.count(levels) <= enumeration.MOST:
            have |= Access.ENUMERABLE
        return have

    @cached_property
    def atoms(self) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Every row of a discrete support, and log p of it.

        Raises:
            TargetError: they can't be listed, or there is no log density.
        """
        levels = self.bijection.levels
        if levels is None or Access.ENUMERABLE not in self.access:
            because = "its support isn't discrete" if levels is None else f"there are more than {enumeration.MOST:,}"
            raise TargetError(cannot("list the states of this target", because, "Draw from a model of it"))
        x = enumeration.rows(levels, self.dtype).to(self.device)
        return x, self.log_prob(x).detach().to(torch.float64)

    def log_prob(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Natural log of the density (up to a constant unless `normalized`), −inf outside the support.

        Raises:
            TargetError: there is no log density, or it returned the wrong shape, NaN or +inf.
        """
        density = self._require_density()
        self.evaluations["log_prob"] += 0 if self.line_integral else len(x)
        return inside(self.bijection.contains(x), x, density.value)

    def tried(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """As `log_prob` at rows inside the support, for a search: a point where it's NaN gets −∞, and is counted.

        Raises:
            TargetError: as `log_prob`, but for NaN.
        """
        self.evaluations["log_prob"] += 0 if self.line_integral else len(x)
        value, rejected = self._require_density().tried(x)
        self.evaluations["rejected"] += rejected
        return value

    def value_and_score(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d"]]:
        """Return log p and ∇log p at rows inside the support: the user's score, autograd or central differences.

        Raises:
            TargetError: as `log_prob`, or the gradient isn't finite where the value is.
        """
        self.evaluations["score"] += len(x)
        return self._require_density().value_and_score(x)

    def trial(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d"]]:
        """As `value_and_score` for the steps of a search: a point where either isn't a number gets −∞, and is counted."""
        self.evaluations["score"] += len(x)
        value, gradient, rejected = self._require_density().trial(x)
        self.evaluations["rejected"] += rejected
        return value, gradient

    def gradient(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return the user's score alone at rows inside the support."""
        self.evaluations["score"] += len(x)
        return self._require_density().gradient(x)

    @plain_modes()
    def draws(self, n: int, seed: int) -> Float[Tensor, "n d"]:
        """Draw n fresh points from the sampler; the same seed gives the same points.

        Raises:
            TargetError: there is no sampler, or what it returned isn't n finite rows.
        """
        if self.sampler is None:
            raise TargetError(cannot("draw fresh points", f"the target has only {self.access.label}", "Pass `sampler=`"))
        self.evaluations["samples"] += n
        sampler, instead = self.sampler, "Mend the sampler; it gets the number of points"
        drawn = call_user(lambda: seeded_draws(sampler, n, seed, self.device), "draw from this target", instead, TargetError)
        x = read_matrix(drawn, self.dtype, self.device)
        if tuple(x.shape) != (n, self.dim):
            because = f"`sampler` returned shape {tuple(x.shape)}, not ({n}, {self.dim})"
            raise TargetError(cannot("use this target", because, "Return one point a row"))
        check_finite(x, self.names, "draws")
        return x

    @plain_modes()
    def unconstrained(self) -> Target:
        """Return this target in free coordinates u ∈ ℝᵏ, x = T(u): log p(T(u)) + log|∂T/∂u|.

        Raises:
            TargetError: it is discrete.
        """
        if self.bijection.is_discrete:
            because = "it is discrete, and this family has a density on ℝᵈ"
            instead = "Use Product('bernoulli'), Product('categorical'), Autoregressive() or Categorical() of whichkl.families"
            raise TargetError(cannot("carry this target to ℝᵈ", because, instead))
        if self.stream is not None:
            free = copy.copy(self)
            free.carrier, free.dim, free.bijection = (
                self.bijection,
                self.bijection.free_dim,
                Bijection(None, self.bijection.free_dim),
            )
            return free
        if self.bijection.is_real:
            return self
        bijection, inner, log_prob = self.bijection, copy.copy(self), None
        if self.density is not None:
            log_prob = free_log_prob(bijection, self.density.unchecked, differentiable=self.density.differentiable)
        free = Target(
            samples=None if self.samples is None else bijection.inverse(self.samples),
            log_prob=log_prob,
            sampler=free_sampler(bijection, self.draws) if self.sampler else None,
            score=free_score(bijection, inner.gradient) if self.score else None,
            dim=bijection.free_dim,
            names=self.names if bijection.free_dim == self.dim else None,
            normalized=self.normalized,
            weights=self.weights,
            chains=self.chains,
            dtype=self.dtype,
            device=self.device,
        )
        if free.density is not None:
            free.density.place, free.density.source = bijection.forward, self.density
        free.repeats = self.repeats
        free.known_modes = None if self.known_modes is None else bijection.inverse(self.known_modes)
        free.context, free.context_names, free.scalar = self.context, self.context_names, self.scalar
        free.evaluations = self.evaluations
        inner.evaluations = Evaluations()
        return free

    def starting_at(self, modes: Float[Tensor, "k d"]) -> Target:
        """Return this target with further points from which searches for its modes start; evaluations are counted together."""
        known = copy.copy(self)
        modes = modes.to(self.device, self.dtype)
        known.known_modes = modes if self.known_modes is None else torch.cat([modes, self.known_modes])
        return known

    def noting_repeats(self) -> Target:
        """Return this target with what repeats among its rows, or among the first of a stream; draws of chains do by nature."""
        block = None if self.stream is None else self.stream.first
        x, context = (self.samples, self.context) if block is None else (block.x, block.context)
        found = None if x is None or self.chains is not None else repeats_of(x, context)
        if found is None:
            return self
        noted = copy.copy(self)
        noted.repeats = found
        return noted

    def thinned(self) -> tuple[Target, int]:
        """Return this target with every τ-th row of its chains, nearly independent, and τ; itself and 1 without chains."""
        if self.samples is None or self.chains is None:
            return self, 1
        rows, step = thinning(self.samples, self.chains)
        few = copy.copy(self)
        few.samples, few.chains, few.repeats = self.samples[rows], None, None
        return few, step

    def __repr__(self) -> str:
        size = "" if self.samples is None else f", n={len(self.samples)}"
        if self.stream is not None:
            parts, rows = len(self.stream.parts), self.stream.rows
            size = f", streamed in {parts:,} part{'s' if parts != 1 else ''}" + ("" if rows is None else f", n={rows}")
        size += f", given {len(self.context_names)} columns" if self.context_names else ""
        return f"Target(dim={self.dim}{size}, access: {self.access.label})"

    def _density(
        self, log_prob: Function | None, score: Function | None, batched: bool, probe: Float[Tensor, "1 d"]
    ) -> LogDensity | None:
        """The log density: the user's, or the line integral of the score where there is that alone."""
        self.line_integral: LineIntegral | None = None
        if log_prob is not None:
            return LogDensity(log_prob, score, batched, probe)
        if score is None:
            return None
        gradient = Score(score, batched, probe)

        def count(n: int) -> None:
            self.evaluations["score"] += n

        self.line_integral = LineIntegral(gradient, probe, count)
        return LogDensity(self.line_integral, gradient, True, probe.to(torch.float64))

    def _require_density(self) -> LogDensity:
        if self.density is None:
            raise TargetError(cannot("evaluate this target", f"it has only {self.access.label}", "Pass `log_prob=`"))
        return self.density

    def _check_context(self) -> None:
        if self.context is None or self.samples is None:
            return
        check_pairs(self.context, self.samples, self.context_names)
        if self.density is not None or self.sampler is not None or self.score is not None:
            because = "a conditional target is known by its pairs alone"
            raise InputError(cannot("use functions of p beside pairs (x, y)", because, "Leave them out"))

    def _check_stream(self, weights: Any, chains: Any) -> None:
        if self.stream is None:
            return
        extra = [name for name, value in (("weights", weights), ("chains", chains)) if value is not None]
        extra += [name for name in ("density", "sampler", "score") if getattr(self, name) is not None]
        if extra:
            word = {"density": "log_prob"}.get(extra[0], extra[0])
            because = "streamed samples are read in parts, and this version takes nothing beside them"
            raise InputError(cannot(f"use `{word}=` here", because, "Leave it out, or read the samples into memory"))

    def _check_samples(self, weights: Any) -> Tensor | None:
        if self.samples is None:
            if weights is not None:
                raise InputError(cannot("use `weights=`", "there are no samples to weigh", "Pass `samples=`"))
            return None
        check_filled(self.samples)
        check_finite(self.samples, self.names)
        outside = ~self.bijection.contains(self.samples)
        if bool(outside.any()):
            where = ", ".join(str(int(i)) for i in outside.nonzero()[:5, 0])
            because = f"{int(outside.sum())} of {len(outside)} rows lie outside the support, first rows {where}"
            raise InputError(cannot("use these samples", because, "Correct `support=`, or drop those rows"))
        return None if weights is None else read_weights(weights, self.samples)

    def _check_chains(self, chains: Any) -> Tensor | None:
        if chains is None:
            return None
        if self.samples is None or self.weights is not None:
            because = "there are no samples that they could belong to" if self.samples is None else "the samples are weighted"
            raise InputError(cannot("use `chains=`", because, "Pass `samples=` of equal weight"))
        return chain_ids(chains, len(self.samples), self.device)


def _check_dim(dim: Any, width: int | None) -> None:
    """Refuse a `dim=` that is no number of coordinates, or another one than the samples have."""
    if dim is None:
        return
    if isinstance(dim, bool) or not isinstance(dim, Integral) or int(dim) < 1:
        because = "it must be a whole number of at least 1"
    elif width is not None and width != int(dim):
        because = f"the samples have {width} columns"
    elif int(dim) > _MAX_DIM:
        because = f"it is more than {_MAX_DIM:,}, the most coordinates that a log density can have here"
    else:
        return
    raise InputError(cannot(f"use `dim={dim!r}`", because, "Give the number of coordinates of one point"))


def _of_distribution(p: Distribution) -> Target:
    if p.batch_shape != () or len(p.event_shape) > 1:
        shapes = f"batch shape {tuple(p.batch_shape)} and event shape {tuple(p.event_shape)}"
        instead = "Give one distribution over a scalar or a vector (torch.distributions.Independent makes one)"
        raise InputError(cannot("make a target of this distribution", f"it has {shapes}", instead))
    if getattr(p.support, "is_discrete", False):
        instead = "Use Target(log_prob=p.log_prob, dim=d, support='boolean', normalized=True), or its draws as `samples=`"
        because = "it is discrete, and the families that a distribution is fitted by have densities on ℝᵈ"
        raise InputError(cannot("make a target of this distribution", because, instead))
    with seeded(0):
        example = p.sample()

    def draw(n: int) -> Tensor:
        return p.sample((n,)).reshape(n, -1)

    dim = max(1, example.numel())
    return Target(
        sampler=draw,
        log_prob=lambda x: distribution_log_prob(p, x),
        normalized=True,
        dim=dim,
        support=support_of(p, dim),
        dtype=example.dtype if example.is_floating_point() else torch.float64,
        device=example.device,
    )


def _stream_names(stream: Stream) -> Sequence[str]:
    """The stream's names; of pairs without names, such as batches have, y's are told apart from x's."""
    is_unnamed = bool(stream.context_names) and tuple(stream.names) == default_names(len(stream.names))
    return default_names(len(stream.names), "y") if is_unnamed else stream.names
