"""Target: the distribution p that is to be matched, and what can be done with it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, reduce
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from whichkl._arguments import typed
from whichkl._checks import TargetError, cannot, check_finite
from whichkl.access import Access
from whichkl.adapters import Model
from whichkl.arrays import check_tensor_options, read_matrix
from whichkl.chains import thinning
from whichkl.distributions import inside, widened
from whichkl.process.seeds import seeded_draws
from whichkl.process.torch_modes import plain_modes
from whichkl.samples import Reading
from whichkl.samples.repeats import Repeats, repeats_of
from whichkl.targets.calling import Function
from whichkl.targets.column_constraints import Support, support_of_columns
from whichkl.targets.conversion import arguments_of, functions_of, remaining
from whichkl.targets.coordinates import free_target
from whichkl.targets.evaluations import Evaluations
from whichkl.targets.free_laws import FreeLaw, free_law
from whichkl.targets.light_parts import LightPart, light_parts
from whichkl.targets.log_density import LogDensity, density_of
from whichkl.targets.origin import Origin, origin_of_weights, worth_of_rows
from whichkl.targets.row_weights import RowWeights, doubtful_columns
from whichkl.targets.rows import Rows, read_dim, read_rows
from whichkl.targets.supports import MAX_STATES, Bijection, count_states, list_states
from whichkl.user_code import call_user


class Target:
    """A distribution p on ℝᵈ, known by samples, by a sampler, by a log density, or by several of them.

    Args:
        samples: (n, d) tensor, array or DataFrame of draws of p; (n,) is read as (n, 1). A pair (x, y) makes a conditional
            target: y is modelled, given x. A sample file is read into memory if it takes up to 256 MB on disk and in float64, or
            if its rows have weights, chains or functions; a larger file, a folder or a list of files, a `DataLoader`, a
            `Dataset` or a `Stream` is read in parts, as often as needed.
        log_prob: f(x), (n, d) → (n,), the natural log of p's density up to a constant. A function of tensors is
            differentiated by autograd, one of arrays by central differences (2d evaluations per gradient), one of JAX arrays by
            JAX, which may also be (d,) → ().
        energy: E(x), (n, d) → (n,), instead of `log_prob`: log p = −E − log Z. An `nn.Module` is copied and frozen.
        sampler: draw(n) or draw(n, generator) → (n, d). Without a generator argument the global seeds of torch and NumPy
            are set for the call and restored afterwards.
        score: g(x), (n, d) → (n, d), the gradient of log p; without `log_prob` it is integrated along lines to log p up to a
            constant. True if `log_prob` returns the pair (value, gradient), as SciPy's ``jac=True`` has it.
        dim: d; needed without samples.
        support: where p > 0: a `torch.distributions.constraints` member, one per column, or a word (``"positive"``). With
            ``"boolean"`` or ``"integer_interval(0, 3)"`` the target is discrete, and `log_prob` gets rows of whole numbers.
            A dict, such as ``{"tau": "positive"}``, has the supports of some columns; the others are real.
        normalized: whether `log_prob` integrates to one.
        weights: (n,) non-negative weights of `samples`, or the name of their column, which is then no data.
        log_weights: (n,) natural logs of them, instead, up to one constant: log p minus the log density that drew the row, where
            the samples are draws of another distribution. −inf is a weight of 0. `origin` has their ESS and k̂.
        chains: if `samples` come from Markov chains, in the order of time: the number of equally long stacked chains, or (n,) ids
            of each row's chain. Error bars then count effective draws.
        names: the d column names; by default those of a DataFrame or file, else x1, x2, …, or y1, y2, … (y) for y given x.
        given: names of the columns of `samples` that are x; the others are y, modelled given x. A converted file has its own.
        columns: names of the columns of a table that are used, in this order; by default all.
        drop: names of the columns that aren't used.
        missing: ``"refuse"`` samples with missing cells (NaN), or ``"drop"`` the rows that have one; `notes` has their count.
        thousands: the character between groups of three digits in the text of numbers, such as ``","``.
        categories: names of the columns of labels, which become codes 0 … K−1 in the order of `reading.categories`; `Product`
            and `Categorical` model these.
        batched: False if `log_prob` and `score` take one point, (d,).
        dtype: of the points that functions get: by default that of `samples`, or float64.
        device: of these points: by default that of `samples`, or the CPU.

    Raises:
        InputError: samples, names, weights or dimension don't fit.

    >>> target = Target(log_prob=lambda x: -x.square().sum(-1) / 2, dim=2)
    >>> target.access
    <Access: log_prob, differentiable>
    """

    @typed
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
        support: Support | Mapping[str, Constraint | str] = None,
        normalized: bool = False,
        weights: Any = None,
        log_weights: Any = None,
        chains: Any = None,
        names: Sequence[str] | None = None,
        given: str | Sequence[str] | None = None,
        columns: str | Sequence[str] | None = None,
        drop: str | Sequence[str] = (),
        missing: str = "refuse",
        thousands: str | None = None,
        categories: str | Sequence[str] | Mapping[str, Sequence[str]] = (),
        batched: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.carrier: Bijection | None = None
        """For streams: the map between rows and the free coordinates of this target."""
        self.law: Distribution | None = None
        """The torch distribution that this target is of, in float64; its free coordinates keep digits that x loses."""
        self.log_ratio: Callable[[Tensor], Tensor] | None = None
        """The log weight of a row as a function of y, where it is known: log prior/proposal of a simulator's parameters."""
        self.known_modes: Tensor | None = None
        """Points (k, d) at modes that were found before, the heaviest first, from which searches start too."""
        self.repeats: Repeats | None = None
        """Which rows are equal, if that was searched and matters; see `noting_repeats`."""
        check_tensor_options(dtype, device)
        log_prob, score, batched = functions_of(log_prob, energy, score, normalized, batched)
        reading = Reading.of(columns, drop, missing, thousands, categories)
        weights, log_weights, reading, origin, given = RowWeights.of(samples, names, weights, log_weights, reading, given)
        others = {"weights": weights, "log_weights": log_weights, "chains": chains}
        others |= {"log_prob": log_prob, "sampler": sampler, "score": score}
        is_whole = any(value is not None for value in others.values())
        rows = read_rows(samples, names=names, given=given, dtype=dtype, device=device, is_whole=is_whole, reading=reading)
        self.reading, self.table = rows.reading, rows.table
        """How a table was read, with the labels of its categories; and the table, which knows where its rows are."""
        self.samples, self.context, self.stream = rows.samples, rows.context, rows.stream
        self.scalar = rows.is_scalar
        """Whether y is a scalar, given as (n,) or as the only column besides `given=`; then events have no axes."""
        self.dim = read_dim(dim, rows.width, has_functions=bool(log_prob or sampler or score))
        self.context_names, self.names = rows.context_names, rows.column_names(self.dim)
        self.normalized = normalized and log_prob is not None
        self.dtype = dtype or (self.samples.dtype if self.samples is not None else torch.float64)
        self.device = torch.device(device or (self.samples.device if self.samples is not None else "cpu"))
        self.evaluations = Evaluations()
        self.score, self.sampler = score, sampler
        self.bijection = Bijection(support_of_columns(support, self.names), self.dim)
        probes = self.bijection.inside(self.dtype, self.device)
        self.density, self.line_integral = density_of(log_prob, score, batched, probes, self._count_scores)
        rows.check(self.names, self.bijection, others)
        self._notes = rows.notes
        self.weights = rows.weights(weights, log_weights)
        self.chains = rows.chains(chains, self.weights, self.device)
        self.origin: Model | Origin | None = origin if log_weights is None else origin_of_weights(self.weights, origin)
        """The model that this is the posterior of, with its own names and shapes; or what `convert` made it of."""

    @classmethod
    def of(cls, obj: Any, /, *args: Any, **kwargs: Any) -> Target:
        """Make a target of a torch distribution, an array, tensor or DataFrame, a sample file, folder or list of them, a loader.

        Args:
            obj: one of these, or a model of an adapted library, such as a NumPyro model: its posterior, in unconstrained
                coordinates (see `whichkl.adapters`).
            args: the model's arguments, as ``MCMC.run`` takes them.
            kwargs: its keyword arguments.

        Raises:
            InputError: the object is none of these.
            TargetError: the model can't be run, or has a discrete latent site.
        """
        if isinstance(obj, Target) and not (args or kwargs):
            return obj
        arguments, model = arguments_of(obj, args, kwargs)
        target = cls(**arguments)
        target.origin = model or target.origin
        if not isinstance(obj, Distribution):
            return target
        target.law = widened(obj) if obj.batch_shape == () else None
        return target.evaluated_in_double()

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """In words: the rows left out, the codes of categories, what weighted rows are worth, columns that may be weights."""
        worth = () if self.weights is None else (worth_of_rows(self.weights),)
        has_rows = self.samples is not None or self.stream is not None
        return (*self._notes, *worth, *(doubtful_columns((*self.context_names, *self.names)) if has_rows else ()))

    @cached_property
    def access(self) -> Access:
        """What can be done with this target."""
        density = None if self.line_integral else self.density
        levels = self.bijection.levels
        have = {
            Access.SAMPLES: self.samples is not None or self.stream is not None,
            Access.SAMPLER: self.sampler is not None,
            Access.LOG_PROB: density is not None,
            Access.NORMALIZED: density is not None and self.normalized,
            # the first use calls the function, so that one that can't be called is refused for discrete targets too
            Access.DIFFERENTIABLE: density is not None and density.differentiable and levels is None,
            Access.SCORE: self.score is not None,
            Access.ENUMERABLE: levels is not None and count_states(levels) <= MAX_STATES,
        }
        return reduce(operator.or_, (access for access, is_had in have.items() if is_had), Access(0))

    @cached_property
    def atoms(self) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Every row of a discrete support, and its log p.

        Raises:
            TargetError: the rows can't be listed, or there is no log density.
        """
        levels = self.bijection.levels
        if levels is None or Access.ENUMERABLE not in self.access:
            because = "its support isn't discrete" if levels is None else f"there are more than {MAX_STATES:,}"
            raise TargetError(cannot("list the states of this target", because, "Draw from a model of it"))
        x = list_states(levels, self.dtype).to(self.device)
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
        """Return `log_prob` for a search, at rows inside the support: −∞ where it is NaN; such points are counted."""
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
        """Return `value_and_score` for a search: −∞ where either isn't a number; such points are counted."""
        self.evaluations["score"] += len(x)
        value, gradient, rejected = self._require_density().trial(x)
        self.evaluations["rejected"] += rejected
        return value, gradient

    def gradient(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return the user's score at rows inside the support."""
        self.evaluations["score"] += len(x)
        return self._require_density().gradient(x)

    @plain_modes()
    def draws(self, n: int, seed: int) -> Float[Tensor, "n d"]:
        """Draw n fresh points from the sampler; the same seed gives the same points.

        Raises:
            TargetError: there is no sampler, or it didn't return n finite rows.
        """
        if self.sampler is None:
            raise TargetError(cannot("draw fresh points", f"the target has only {self.access.label}", "Pass `sampler=`"))
        self.evaluations["samples"] += n
        sampler, instead = self.sampler, "Correct the sampler; it gets the number of points"
        drawn = call_user(lambda: seeded_draws(sampler, n, seed, self.device), "draw from this target", instead, TargetError)
        x = read_matrix(drawn, self.dtype, self.device)
        if tuple(x.shape) != (n, self.dim):
            because = f"`sampler` returned shape {tuple(x.shape)}, not ({n}, {self.dim})"
            raise TargetError(cannot("use this target", because, "Return one point per row"))
        check_finite(x, self.names, "draws")
        return x

    @plain_modes()
    def unconstrained(self) -> Target:
        """Return this target in free coordinates u ∈ ℝᵏ, x = T(u): log p(T(u)) + log|∂T/∂u|.

        Raises:
            TargetError: it is discrete.
        """
        return free_target(self)

    @cached_property
    def light_parts(self) -> list[LightPart]:
        """Components too light for ordinary draws, where p's law, or the owner of its log density, shows them."""
        return light_parts(self.law or getattr(self.density and self.density.function, "__self__", None), self.dim)

    @cached_property
    def free_law(self) -> FreeLaw | None:
        """The law in free coordinates, where that is known without T(u) and its rounding; see `free_laws`."""
        return None if self.law is None or self.bijection.is_real else free_law(self.law)

    def starting_at(self, modes: Float[Tensor, "k d"]) -> Target:
        """Return this target with more points from which mode searches start; evaluations are counted together."""
        known = copy.copy(self)
        modes = modes.to(self.device, self.dtype)
        known.known_modes = modes if self.known_modes is None else torch.cat([modes, self.known_modes])
        return known

    def noting_repeats(self) -> Target:
        """Return this target with its repeated rows noted; of a stream those of its first block, and none of chains."""
        rows = self if self.stream is None else Rows(self.stream.first.x, self.stream.first.context)
        noted = copy.copy(self)
        noted.repeats = None if rows.samples is None or self.chains is not None else repeats_of(rows.samples, rows.context)
        return noted

    def thinned(self) -> tuple[Target, int]:
        """Return this target with every τ-th row of its chains, which are nearly independent, and τ; without chains τ is 1."""
        if self.samples is None or self.chains is None:
            return self, 1
        rows, step = thinning(self.samples, self.chains)
        few = copy.copy(self)
        few.samples, few.chains, few.repeats = self.samples[rows], None, None
        return few, step

    def evaluated_in_double(self) -> Target:
        """Return this target with a log density that gets float64, whatever its dtype: a widened law of float32."""
        if self.density is not None:
            self.density.probe = self.density.probe.to(torch.float64)
        return self

    def without(self, rows: Int[Tensor, " m"]) -> Target:
        """Return a target that has only the other rows of this one's samples, in float64.

        Raises:
            TypeError: it has none in memory.
        """
        others = Target(**remaining(self, rows))
        others.log_ratio = self.log_ratio
        return others

    def __repr__(self) -> str:
        size = "" if self.samples is None else f", n={len(self.samples)}"
        if self.stream is not None:
            parts, rows = len(self.stream.parts), self.stream.rows
            size = f", streamed in {parts:,} part{'s' if parts != 1 else ''}" + ("" if rows is None else f", n={rows}")
        size += f", given {len(self.context_names)} column{'s' * (len(self.context_names) > 1)}" if self.context_names else ""
        return f"Target(dim={self.dim}{size}, access: {self.access.label})"

    def __str__(self) -> str:
        return f"{self!r}\n{self.origin}" if isinstance(self.origin, Origin) else repr(self)

    def _count_scores(self, n: int) -> None:
        self.evaluations["score"] += n

    def _require_density(self) -> LogDensity:
        if self.density is None:
            raise TargetError(cannot("evaluate this target", f"it has only {self.access.label}", "Pass `log_prob=`"))
        return self.density
