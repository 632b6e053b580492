"""Moments: known expectations and a reference → the distribution nearest to the reference that has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._arguments import typed
from whichkl._checks import InputError, TargetError, as_int, cannot, check_finite
from whichkl.access import Access
from whichkl.arrays import default_names, read_matrix, read_names, tensor_of
from whichkl.chains import thinning
from whichkl.conversions.multiplier_errors import MultiplierErrors, multiplier_errors
from whichkl.conversions.projection import Dual, Projection
from whichkl.conversions.reweighted import Reweighted
from whichkl.printable import count_of
from whichkl.targets import Target
from whichkl.targets.calling import values_of
from whichkl.targets.column_constraints import Support
from whichkl.targets.origin import Origin, inherited, worth_of_rows
from whichkl.targets.supports import MAX_STATES, Bijection

_DRAWS = 10_000
"""Default number of draws from a reference that can be sampled."""
_MIN_SHARE = 0.1
"""Share of the draws in the effective sample size below which the result isn't reliable."""
_MAX_DIMENSIONS = 3
"""Most variables over which expectations of a reference density are integrals; over more, they are means of draws."""
_ISLANDS = 32
"""Number of groups of particles, whose differences give the error of λ."""
_DO = "use these moments"


@dataclass(frozen=True)
class MomentsOrigin(Origin):
    """The origin of a target that was made of moments."""

    multipliers: tuple[float, ...] = ()
    """λ of q ∝ r exp(λ·f), one number per moment, in the inverse of its unit."""
    kl: float = math.nan
    """KL(q‖r), in nats."""
    multipliers_stderr: tuple[float, ...] = ()
    """Standard errors of λ; above 0 where the log density rests on draws of the reference."""
    kl_stderr: float = 0.0


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments, or other expectations, of a distribution, and a reference that it is near to.

    `convert` makes of them the I-projection of the reference r: the q that minimises KL(q‖r) subject to E_q f = m. It is
    q ∝ r exp(λ·f). With standard errors s of the values, it minimises KL(q‖r) + ½ Σ ((E_q f − m)/s)². Where the reference has
    draws, the target has these as weighted samples; where it has a log density and `of` is a function, a log density.

    Args:
        of: f(x), (n, d) → (n,) or (n, k); or its values, (n, k), at the n draws of the reference, an array or a DataFrame.
        values: m, (k,), in the units of f.
        stderr: s, (k,), in the same units, where the values have errors; 0 is exact. By default all are exact.
        reference: r: draws (an array, a DataFrame, a file), a torch distribution, or a `Target`.
        support: without a reference, the bounds of each column: the reference is then uniform between them.
        names: the names of the moments in messages; by default those of a DataFrame, or f1, f2, ….

    Raises:
        InputError: the values aren't numbers, or there is neither a reference nor a bounded support.

    Source: Csiszár (1975), "I-divergence geometry of probability distributions and minimization problems"; with errors, Hummer
    & Köfinger (2015), "Bayesian ensemble refinement by replica simulations and reweighting".

    >>> from whichkl import convert
    >>> die = convert(Moments(of=lambda x: x, values=4.5, reference=torch.arange(1.0, 7.0)))
    >>> [round(one, 3) for one in die.origin.multipliers]
    [0.371]
    """

    of: Any
    values: Any
    stderr: Any = None
    reference: Any = None
    support: Support = None
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        m = _vector(self.values, "values")
        s = torch.zeros_like(m) if self.stderr is None else _vector(self.stderr, "stderr")
        if len(s) not in (1, len(m)):
            because = f"there are {count_of(len(s), 'standard error')} for {count_of(len(m), 'value')}"
            raise InputError(cannot("use this `stderr`", because, "Give one per value"))
        if bool((s < 0).any()):
            raise InputError(cannot("use this `stderr`", f"it is {float(s.min()):g}, below 0", "Give standard errors"))
        if self.of is None or isinstance(self.of, type):
            because = f"`of` is {'None' if self.of is None else f'the class `{self.of.__name__}`'}"
            raise InputError(cannot(_DO, because, "Pass a function of (n, d) points, or its (n, k) values at the draws"))
        if isinstance(self.of, str) or (isinstance(self.of, (list, tuple)) and any(isinstance(one, str) for one in self.of)):
            because = f"`of` is {self.of!r}, and names of columns are read on the command line alone"
            raise InputError(cannot(_DO, because, "Pass a function of (n, d) points, such as `lambda x: x[:, :1]`"))
        if self.reference is None and self.support is None:
            because = "many distributions have them, and there is neither a reference nor a bounded support to choose one by"
            raise InputError(cannot(_DO, because, "Pass `reference=` (draws or a density), or `support='interval(a, b)'`"))
        if self.reference is not None and self.support is not None:
            raise InputError(cannot("use `support=` here", "the reference has its own", "Leave it out"))
        if not callable(self.of):
            _check_width(len(getattr(self.of, "columns", m)), len(m))
        names = _names(self.names, of=self.of, count=len(m))
        object.__setattr__(self, "_exact", (m, s.expand_as(m), names))

    def as_target(self, *, n: int | None = None, seed: int = 0) -> Target:
        """Return the I-projection of the reference as a target.

        Args:
            n: the number of draws from a reference that has a sampler or a log density alone; by default 10,000.
            seed: fixes these draws.

        Raises:
            InputError: the function doesn't return k numbers per row, or its values don't belong to the draws.
            TargetError: no distribution near the reference has these moments.
        """
        r = self._reference()
        count = _DRAWS if n is None else as_int(n)
        if not isinstance(count, int) or isinstance(count, bool) or count < 2:
            raise InputError(cannot(f"use `n={n!r}`", "it isn't a whole number of at least 2", "Give, say, n=10000"))
        return _Conversion(self, r, count, seed).target()

    def _reference(self) -> Target:
        if self.reference is None:
            return _uniform(self.support)
        r = Target.of(self.reference)
        if r.context_names or r.stream is not None:
            because = "it is conditional: pairs (x, y)" if r.context_names else "it is streamed, and draws are needed in memory"
            raise InputError(cannot("use this `reference`", because, "Pass draws of one distribution, such as an array"))
        if r.access.cell == "neither":
            raise InputError(cannot("use this `reference`", "it has neither draws nor a density", "Pass draws, or a density"))
        if r.bijection.is_discrete and not r.access.can_sample and Access.ENUMERABLE not in r.access:
            because = f"it is discrete, has more than {MAX_STATES:,} states, and no draws"
            raise InputError(cannot("use this `reference`", because, "Pass `samples=` or `sampler=` to it"))
        if not callable(self.of) and r.samples is None:
            because = "they belong to draws, and the reference has none of its own"
            raise InputError(cannot("use values of f as `of`", because, "Pass f as a function, or the draws as `reference=`"))
        return r


class _Conversion:
    """The parts of one conversion: the draws, the projection, the density."""

    def __init__(self, evidence: Moments, reference: Target, n: int, seed: int) -> None:
        self.evidence, self.reference, self.n, self.seed = evidence, reference, n, seed
        self.values, self.stderr, self.names = evidence._exact  # type: ignore[attr-defined]
        self.left_out: list[str] = []
        self.rows: Tensor | None = None
        """The rows of the draws that are used, where those of chains are thinned."""
        self.islands: int | None = None  # of particles, if the draws are these
        self.errors: MultiplierErrors | None = None
        self.has_density = reference.density is not None and callable(evidence.of)

    def target(self) -> Target:
        """Find λ, by integrals over a density of few variables, else on draws, and return the target."""
        r = self.reference
        is_sum = self.has_density and Access.ENUMERABLE in r.access
        has_boxes = all(one.event_dim == 0 for one in r.bijection.constraints) and not r.bijection.is_discrete
        is_integral = self.has_density and has_boxes and r.dim <= _MAX_DIMENSIONS
        x, log_r = self._draws() if r.access.can_sample or not (is_sum or is_integral) else (None, None)
        found, log_mass = None, math.nan
        if is_sum:
            atoms, log_p = r.atoms
            found, log_mass = self._dual(atoms).project(log_p), float(torch.logsumexp(log_p, 0))
        elif is_integral:
            from whichkl.conversions.integrals import project_density

            found, log_mass = project_density(r, lambda nodes: self._dual(nodes, are_draws=False))
        on_draws = None
        if x is not None and log_r is not None:
            dual = self._dual(x)
            on_draws = dual.project(log_r) if found is None else _reweighted(dual.f, log_r, found)
            if found is None and self.has_density:
                self.errors = multiplier_errors(dual, log_r, on_draws, self.islands)
        return self._assembled(x, on_draws, found, log_mass)

    def _assembled(self, x: Tensor | None, on_draws: Projection | None, found: Projection | None, log_mass: float) -> Target:
        r, exact = self.reference, found
        found = found or on_draws
        if found is None:  # a reference has draws, a density, or both
            raise TypeError("no projection")
        logs = None if on_draws is None else on_draws.log_weights
        share = 1.0 if logs is None else float(1 / logs.exp().square().sum()) / len(logs)
        worth = "" if logs is None else f" {worth_of_rows(logs.exp())}"
        if exact is None and self.has_density:
            worth += " λ rests on these rows, and so does the log density."
        if logs is not None and share < _MIN_SHARE and exact is not None:
            why = f"they would be worth {share * len(logs):.3g}, and the log density is exact"
            self.left_out.append(f"{len(logs):,} draws of the reference: {why}.")
            logs, worth, share = None, "", 1.0
        if not r.access.can_sample:  # particles serve to find λ
            logs = None
        density = None
        if self.has_density:
            shift = float(found.log_z) + log_mass if exact is not None else 0.0
            density = Reweighted(r, _tilt(self.evidence.of, found.multipliers, shift))
        target = Target(
            samples=None if logs is None else x,
            weights=None if logs is None else (logs - logs.max()).exp(),
            log_prob=density,
            normalized=density is not None and exact is not None,
            dim=r.dim,
            support=r.bijection.constraints,
            names=r.names,
            device=r.device,
        )
        target.origin = inherited(self._origin(found, target, worth, share), reference=r.origin)
        return target

    def _draws(self) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Return draws of the reference, or particles where it has a density alone, with the logs of their weights."""
        r = self.reference
        if r.samples is not None:
            x, w = r.samples.to("cpu", torch.float64), r.weights
            if r.chains is not None:
                rows, step = thinning(r.samples, r.chains)
                self.rows = rows
                self.left_out.append(f"All but every {step}th row of each chain, since its neighbours depend on it.")
                return x[rows], torch.zeros(len(rows), dtype=torch.float64, device="cpu")
            return x, torch.zeros(len(x), dtype=torch.float64, device="cpu") if w is None else w.to("cpu", torch.float64).log()
        if r.sampler is not None:
            return r.draws(self.n, self.seed).to("cpu", torch.float64), torch.zeros(self.n, dtype=torch.float64, device="cpu")
        from whichkl.particles import temper

        each = max(2, -(-self.n // _ISLANDS))
        found = temper(r.unconstrained(), particles=each * _ISLANDS, islands=_ISLANDS, settle=True, seed=self.seed)
        if not found.finished:
            because = "sequential Monte Carlo didn't reach it in 1,000 calls of its log density"
            raise TargetError(cannot("draw from this reference", because, "Pass draws of it as `samples=`"))
        self.islands = found.islands
        return r.bijection.forward(found.x), found.log_weights

    def _dual(self, x: Float[Tensor, "n d"], *, are_draws: bool = True) -> Dual:
        """Evaluate f at points."""
        of = self.evidence.of
        if callable(of):
            f = values_of(of, x.to(self.reference.device), _DO)
            f = f[:, None] if f.ndim == 1 else f
        else:
            f = read_matrix(of, torch.float64, "cpu", "values of f")
            count = 0 if self.reference.samples is None else len(self.reference.samples)
            if len(f) != count:
                because = f"there are {count_of(len(f), 'row')} of `of`, and the reference has {count_of(count, 'draw')}"
                raise InputError(cannot(_DO, because, "Give one row per draw"))
            f = f if self.rows is None else f[self.rows]
            check_finite(f, default_names(f.shape[1], "f"), "values of f")
        _check_width(f.shape[1], len(self.values))
        is_unbounded = not all(math.isfinite(end) for pair in self.reference.bijection.bounds for end in pair)
        return Dual(f, self.values, self.stderr, self.names, are_draws, is_unbounded)

    def _origin(self, found: Projection, target: Target, worth: str, share: float) -> MomentsOrigin:
        k, evidence = len(self.values), self.evidence
        size = "the density" if target.samples is None else count_of(len(target.samples), "draw")
        assumed = [
            "The target q is the distribution nearest to the reference r, in KL(q‖r), with these moments of f: q ∝ r exp(λ·f)."
        ]
        if evidence.reference is None:
            assumed.append("The reference is uniform on the support.")
        exact = "The values of the moments are exact."
        assumed.append(exact if evidence.stderr is None else "Each value is normal around the moment, with its standard error.")
        errors = self.errors or MultiplierErrors((0.0,) * k, kl=0.0, log_z=0.0)
        is_sound = share >= _MIN_SHARE
        poor = f" Below {100 * _MIN_SHARE:.0f} % they carry no conclusion: take a reference nearer to these moments."
        return MomentsOrigin(
            f"{count_of(k, 'moment')} and {size} of a reference.",
            assumed=tuple(assumed),
            unknown=("Every property of the target that neither the reference nor these moments determine.",),
            left_out=tuple(self.left_out),
            trust=errors.shown(found) + worth + poor * (not is_sound),
            reliable=is_sound,
            multipliers=tuple(found.multipliers.tolist()),
            kl=found.kl,
            multipliers_stderr=errors.multipliers,
            kl_stderr=errors.kl,
            log_z_stderr=errors.log_z,
        )


def _check_width(columns: int, values: int) -> None:
    if columns != values:
        because = f"`of` has {count_of(columns, 'column')}, and `values` has {count_of(values, 'number')}"
        raise InputError(cannot(_DO, because, "Give one value per column of f"))


def _tilt(of: Callable[[Tensor], Any], multipliers: Float[Tensor, " k"], shift: float) -> Callable[[Tensor], Tensor]:
    """Return x ↦ λ·f(x) − c."""

    def term(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        f = tensor_of(of(x)).to(x)
        tilted: Tensor = f.reshape(len(x), -1) @ multipliers.to(x) - shift
        return tilted

    return term


def _reweighted(f: Float[Tensor, "n k"], log_r: Float[Tensor, " n"], found: Projection) -> Projection:
    """Weight draws by exp(λ·f) for λ that is known."""
    logs = log_r + f @ found.multipliers
    return Projection(found.multipliers, logs - torch.logsumexp(logs, 0), found.log_z, found.kl, found.gap, found.steps)


def _vector(values: Any, name: str) -> Float[Tensor, " k"]:
    """Read one finite number per moment."""
    do, instead = f"use these `{name}`", "Give one finite number per moment"
    if name == "stderr" and getattr(values, "ndim", 0) == 2:
        instead = "Give the standard errors, or first turn the moments so that their covariance is diagonal (docs/moments.md)"
    found = tensor_of(values) if values is not None and not isinstance(values, (str, bytes, bool)) else None
    if found is None or found.is_complex() or found.dtype == torch.bool or found.ndim > 1 or found.numel() == 0:
        shape = f"shape {tuple(found.shape)}" if found is not None else f"a `{type(values).__name__}`"
        raise InputError(cannot(do, f"they are {shape}, not (k,) numbers", instead))
    m = found.detach().to("cpu", torch.float64).reshape(-1)
    if not bool(m.isfinite().all()):
        raise InputError(cannot(do, f"number {int((~m.isfinite()).int().argmax())} is {float(m[~m.isfinite()][0])}", instead))
    return m


@typed
def _names(names: Sequence[str] | None, *, of: Any, count: int) -> Sequence[str]:
    """Return the names of the moments: those given, those of a DataFrame, or f1, f2, …."""
    given = getattr(of, "columns", None) if names is None else names
    return default_names(count, "f") if given is None else read_names([*map(str, given)], None, count)


def _uniform(support: Support) -> Target:
    """Return the uniform distribution between the bounds of each column, or on the whole numbers between them."""
    parts: Sequence[Any] = support if isinstance(support, (list, tuple)) else [support]
    width = max(len(parts), *(getattr(getattr(one, "lower_bound", None), "numel", lambda: 1)() for one in parts))
    bijection = Bijection(support, width)
    if bijection.levels is not None:
        return Target(log_prob=lambda x: torch.zeros_like(x[:, 0]), dim=width, support=support)
    low, high = torch.tensor(bijection.bounds, dtype=torch.float64, device="cpu").T
    if not bool((high - low).isfinite().all()):
        because = "it has no bounds on both sides, and nothing is uniform on it"
        raise InputError(cannot("use this `support` without a reference", because, "Pass `reference=`, or a bounded support"))
    log_volume = float((high - low).log().sum())

    def sampler(n: int, generator: torch.Generator) -> Tensor:
        drawn: Tensor = low + (high - low) * torch.rand(n, width, generator=generator, dtype=torch.float64, device="cpu")
        return drawn

    def log_prob(x: Tensor) -> Tensor:
        return 0 * x.sum(1) - log_volume

    return Target(sampler=sampler, log_prob=log_prob, dim=width, support=support, normalized=True)
