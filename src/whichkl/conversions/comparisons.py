"""Comparisons: answers to "which of two points is likelier?" → a log density up to a power."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MixtureSameFamily
from torch.distributions.constraints import Constraint

from whichkl._arguments import typed
from whichkl._checks import InputError, TargetError, cannot, check_seed, quoted
from whichkl.conversions.comparison_mixture import fit_mixtures
from whichkl.conversions.comparison_pairs import Pairs
from whichkl.conversions.comparison_process import CENTERS, Process, fit_process
from whichkl.conversions.comparison_reach import MAX_SHARE_ELSEWHERE, Places, Reach, reach_of
from whichkl.families.mixture import mixture, mixture_parts
from whichkl.printable import count_of
from whichkl.process.torch_modes import plain_modes
from whichkl.targets import Target
from whichkl.targets.column_constraints import Support
from whichkl.targets.origin import Origin, inherited
from whichkl.targets.supports import Bijection

Model = Process | MixtureSameFamily
_MIN_PAIRS = 20
"""Fewest comparisons: four per fold."""
_MAX_PAIRS = 10_000
"""Largest number of comparisons that are used; beyond it, the error is that of the models."""
_MAX_COLUMNS = 30
"""Largest number of free coordinates: the precision of a component has 465 entries there."""
_BEFORE_PROCESS = 2
"""Number of mixtures that count as simpler than the process: more components have several optima."""
_EXCESS = 0.5
"""Largest loss above the least, in standard errors, at which a simpler model is taken."""
_EXCESS_OF_CHECKED = 2.0
"""The same for a model that has its mass where points were compared, in place of one that doesn't."""
_SATURATED = 2.0
"""Log odds from which on an answer tells hardly more than its sign: it is right in 88 % of cases."""
_MAX_SATURATED_SHARE = 0.9
"""Share of saturated pairs, by two standard errors, above which comparisons are refused."""
_COIN = math.log(2)
"""Loss of an answer that is a coin's, in nats."""


class Comparisons:
    """Answers to "which of two points is likelier?": P(a ≻ b) = σ((log p(a) − log p(b)) / noise) (Bradley & Terry, 1952).

    `convert` fits log p by mixtures of 1 to 4 Gaussians, and by a concave quadratic plus a Gaussian process. Of the models whose
    loss on answers that they haven't seen is close to the least it takes the simplest; one
    with much mass where nobody compared only if no other comes near. A mixture is normalised and
    can be sampled, too; the process can only be evaluated. `n` of `convert` is the number of points that carry the process.

    The answers fix p up to a power: if the true noise is c times `noise`, the target is p^(1/c).

    Args:
        winners: (n, d) points, or what else `Target(samples=…)` takes; (n,) is read as (n, 1).
        losers: (n, d), the point that lost against each winner.
        noise: the scale of the answers' noise, in nats of log p.
        support: where p > 0, as in `Target`; p is a density in these coordinates.
        names: the names of the columns, by default those of a DataFrame.

    Raises:
        InputError: points or noise can't be used, or there are too few comparisons.
        TargetError: the support is discrete.

    Source: Chu & Ghahramani (2005) for the process; Mikkola, Acerbi & Klami (2024) for densities of comparisons.

    >>> generator = torch.Generator().manual_seed(0)
    >>> a, b = 2 * torch.randn(2, 300, 1, generator=generator, dtype=torch.float64)
    >>> a_wins = torch.rand(300, 1, generator=generator) < torch.sigmoid((b**2 - a**2) / 2)
    >>> answers = Comparisons(winners=torch.where(a_wins, a, b), losers=torch.where(a_wins, b, a))
    >>> answers.as_target().origin.up_to
    'temperature'
    """

    @typed
    @plain_modes()
    def __init__(
        self,
        *,
        winners: Any,
        losers: Any,
        noise: float = 1.0,
        support: Support | Mapping[str, Constraint | str] = None,
        names: Sequence[str] | None = None,
    ) -> None:
        if not 0 < noise < math.inf:
            raise InputError(cannot(f"use `noise={noise}`", "noise is a finite number above 0", "Give, say, noise=1.0"))
        (won, a), (lost, b) = _points(winners, "winners", support, names), _points(losers, "losers", support, names)
        b = b.to(a.device)
        if a.shape != b.shape:
            because = f"the winners have shape {tuple(a.shape)}, and the losers {tuple(b.shape)}"
            raise InputError(cannot("pair winners and losers", because, "Give one loser per winner, in the same order"))
        self.noise, self.names, self.bijection = noise, won.names, won.bijection
        self.origins = {"winners": won.origin, "losers": lost.origin}
        is_tie = a.eq(b).all(1)
        self.winners, self.losers, self.ties = a[~is_tie], b[~is_tie], int(is_tie.sum())
        if len(self.winners) < _MIN_PAIRS:
            ties = f", apart from {self.ties} of a point with itself" * bool(self.ties)
            because = f"there are {count_of(len(self.winners), 'comparison')}{ties}, and at least {_MIN_PAIRS} are needed"
            raise InputError(cannot("convert these comparisons", because, "Compare more pairs; some hundreds are useful"))

    @typed
    @plain_modes()
    def as_target(self, *, n: int | None = None, seed: int = 0) -> Target:
        """Return the target, with its `origin`.

        Args:
            n: the number of points that carry the process, by default 200.
            seed: fixes every random choice.

        Raises:
            InputError: n isn't positive, or a column doesn't vary.
            TargetError: more than 90 % of the comparisons are saturated, or there are more than 30 columns.
        """
        if n is not None and n < 1:
            raise InputError(cannot(f"use `n={n}`", "it is the number of points that carry the process", "Give, say, n=200"))
        generator = torch.Generator().manual_seed(check_seed(seed))
        scaled = _Scaled.of(self, generator)
        pairs = scaled.pairs
        found: list[tuple[Model, Tensor]] = [*fit_mixtures(pairs, generator)]
        found.insert(_BEFORE_PROCESS, fit_process(pairs, n or CENTERS))
        places = Places.of(pairs.points)
        reaches = [reach_of(model, places, seed) for model, _ in found]
        at = chosen_by_loss([loss for _, loss in found], [one.is_known for one in reaches])
        (model, loss), reach = found[at], reaches[at]
        saturated = (pairs.margin(model.log_prob(pairs.points)).abs() > _SATURATED).double().mean().item()
        if saturated - 2 * math.sqrt(saturated * (1 - saturated) / len(pairs)) > _MAX_SATURATED_SHARE:
            because = (
                f"{saturated:.0%} of the pairs are saturated (|Δ log p| > {_SATURATED:g} × noise), so that the answers tell "
                "which point is likelier, and not by how much"
            )
            instead = "Compare points that are more alike, such as pairs of winners, or pass the true `noise=`"
            raise TargetError(cannot("convert these comparisons", because, instead))
        target = scaled.target(model, reach.log_z)
        own = self._origin(describe(model), loss, [float(one.mean()) for _, one in found], saturated, reach)
        target.origin = inherited(own, **self.origins)
        return target

    def _origin(self, model: str, loss: Tensor, losses: list[float], saturated: float, reach: Reach) -> Origin:
        """Say what was assumed, what can't be known, what was left out, and how far to trust it."""
        pairs, used, mean = len(self.winners), len(loss), float(loss.mean())
        is_informative = _COIN - mean > 2 * float(loss.std()) / math.sqrt(used)
        left_out = [f"{count_of(self.ties, 'comparison')} of a point with itself: they tell nothing."] * bool(self.ties)
        left_out += [f"{count_of(pairs - used, 'comparison')} at random: {used:,} are used at most."] * (pairs > used)
        share = float((loss < _COIN).double().mean())
        trust = [
            f"The model predicts {share:.0%} of unseen answers; its loss is {mean:.3f} nats, and that of a coin {_COIN:.3f}.",
            f"{saturated:.0%} of the pairs are saturated (|Δ log p| > {_SATURATED:g} × noise).",
            f"{reach.elsewhere:.1%} of the mass lies where nobody compared.",
        ]
        if not is_informative:
            trust.append("The answers are no better than a coin's, so the density isn't reliable.")
        if reach.elsewhere > MAX_SHARE_ELSEWHERE:
            trust.append(f"This is more than {MAX_SHARE_ELSEWHERE:.0%}, so the density isn't reliable: compare points there.")
        trust += [reach.doubt] * bool(reach.doubt)
        return Origin(
            source=f"{count_of(pairs, 'comparison')} of two points with {count_of(len(self.names), 'column')}.",
            assumed=(
                f"The point a wins against b with probability σ((log p(a) − log p(b)) / noise), noise = {self.noise:g}.",
                f"{model}. Of {len(losses)} models, this is the simplest that predicts unseen answers about as well as the best: "
                f"its loss is {mean:.3f} nats per answer; the models have {min(losses):.3f} to {max(losses):.3f}.",
            ),
            unknown=(
                f"The temperature: if the true noise is c times {self.noise:g}, the target is p^(1/c).",
                "The density where nobody compared: the model continues it.",
            ),
            left_out=tuple(left_out),
            trust=" ".join(trust),
            reliable=is_informative and reach.is_known,
            up_to="temperature",
            log_z_stderr=reach.log_z_stderr,
        )

    def __repr__(self) -> str:
        return f"Comparisons({len(self.winners):,} pairs, dim={len(self.names)}, noise={self.noise:g})"


def chosen_by_loss(losses: Sequence[Float[Tensor, " n"]], is_known: Sequence[bool]) -> int:
    """Return which of several models is taken, by the losses of each on unseen answers; the simplest model is the first.

    It is the first whose mean loss is within half a standard error of the least. A model whose mass isn't known to lie where
    points were compared is only taken if the loss of the others is higher by two standard errors: answers can't check its mass.
    """
    every = range(len(losses))
    near = [i for i in every if is_known[i]]
    best = _simplest(losses, every)
    if not near or best in near:
        return best
    checked = _simplest(losses, near)
    return checked if _excess(losses[checked], losses[best]) <= _EXCESS_OF_CHECKED else best


def _simplest(losses: Sequence[Tensor], among: Sequence[int]) -> int:
    least = min((losses[i] for i in among), key=lambda loss: float(loss.mean()))
    return next(i for i in among if _excess(losses[i], least) <= _EXCESS)


def _excess(loss: Float[Tensor, " n"], other: Float[Tensor, " n"]) -> float:
    """Return the mean difference in standard errors, answer by answer."""
    excess = loss - other
    return float(excess.mean()) / max(float(excess.std()) / math.sqrt(len(excess)), 1e-300)


def describe(model: Model) -> str:
    """Return what log p is, as a clause."""
    if isinstance(model, Process):
        return f"log p is a concave quadratic plus a Gaussian process, carried by {len(model.centers)} of the winners"
    count = len(mixture_parts(model)[0])
    return f"p is a {f'mixture of {count} Gaussians' if count > 1 else 'Gaussian'}"


@dataclass(frozen=True)
class _Scaled:
    """The comparisons in standardised free coordinates z = (u − m) / s, and the way back."""

    pairs: Pairs
    bijection: Bijection
    names: tuple[str, ...]
    loc: Float[Tensor, " k"]
    scale: Float[Tensor, " k"]

    @classmethod
    def of(cls, given: Comparisons, generator: torch.Generator) -> _Scaled:
        """Standardise the points; keep at most `_MAX_PAIRS` comparisons."""
        a, b, bijection, names = given.winners, given.losers, given.bijection, given.names
        if bijection.free_dim > _MAX_COLUMNS:
            because = f"they have {bijection.free_dim} free columns, and answers determine a density of at most {_MAX_COLUMNS}"
            raise TargetError(cannot("convert these comparisons", because, "Compare points of fewer columns"))
        u, v = bijection.inverse(a), bijection.inverse(b)
        both = torch.cat([u, v])
        loc, scale = both.mean(0), both.std(0)
        if constant := [names[min(i, len(names) - 1)] for i in (~(scale > 0)).nonzero()[:, 0].tolist()]:
            because = f"all points have the same {quoted(constant)}, so that nothing is known about the density along it"
            raise InputError(cannot("convert these comparisons", because, "Leave such columns out"))
        offset = bijection.log_jacobian(v, b) - bijection.log_jacobian(u, a)
        pairs = Pairs((u - loc) / scale, (v - loc) / scale, offset, given.noise).shuffled(generator)
        return cls(pairs.take(torch.arange(min(len(pairs), _MAX_PAIRS), device=a.device)), bijection, names, loc, scale)

    def target(self, model: Model, log_z: float) -> Target:
        """Return the target of the fitted model, in the user's coordinates."""
        if isinstance(model, MixtureSameFamily):
            probs, loc, tril, _ = mixture_parts(model)
            law = mixture(probs, self.loc + self.scale * loc, self.scale[:, None] * tril, "full")
            target = Target.of(self.bijection.wrap(law))
            target.names = self.names
            return target
        constant = log_z + float(self.scale.log().sum())

        def log_prob(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
            u = self.bijection.inverse(x)
            return model.log_prob((u - self.loc) / self.scale) - constant - self.bijection.log_jacobian(u, x)

        return Target(
            log_prob=log_prob,
            dim=len(self.names),
            names=self.names,
            support=self.bijection.constraints,
            dtype=torch.float64,
            device=self.loc.device,
        )


def _points(given: Any, which: str, support: Any, names: Sequence[str] | None) -> tuple[Target, Float[Tensor, "n d"]]:
    """Return points as the samples of a target, which checks them, and alone."""
    known = given if isinstance(given, Target) else None
    given = given if known is None else known.samples
    names = known.names if known is not None and names is None else names
    support = known.bijection.constraints if known is not None and support is None else support
    try:
        points = Target(samples=given, support=support, names=names, dtype=torch.float64)
    except InputError as error:
        both = "Drop those rows from both `winners=` and `losers=`"
        said = re.sub(r"Drop or repair those rows first.*(?=\.$)", both, str(error))
        raise InputError(said.replace("these samples", f"these `{which}`", 1)) from error
    known = points if known is None else known
    points.origin, has_gaps = known.origin, known.table is not None and known.table.left_out > 0
    if points.samples is None or known.context is not None or known.weights is not None or has_gaps:
        because = "there are none in memory" if known.samples is None else "rows were left out, which the other points have"
        because = "they have weights, and a row is an answer" if known.weights is not None else because
        because = "they are pairs (x, y)" if known.context is not None else because
        raise InputError(cannot(f"use these `{which}`", because, "Give one array or DataFrame of points"))
    if points.bijection.is_discrete:
        because = "the support is discrete, and the models of log p have densities on ℝᵈ"
        raise TargetError(cannot("compare these points", because, "Fit the rows that won as samples, or compare other columns"))
    if not bool(points.bijection.is_interior(points.samples).all()):
        because = "a point is at an end of the support, where free coordinates are infinite"
        raise InputError(cannot(f"use these `{which}`", because, "Leave such pairs out"))
    return points, points.samples
