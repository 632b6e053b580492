"""Pool: points of p and draws of models of p as one weighted sample of p, with log Z and the forward KL of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.importance import tail_shape
from whichkl.particles.tempering import Particles


@dataclass(frozen=True)
class Points:
    """Weighted points that follow p, in independent groups, and log p̃ there."""

    x: Float[Tensor, "n d"]
    log_p: Float[Tensor, " n"]
    weights: Float[Tensor, " n"]
    """Their sum is 1."""
    groups: Int[Tensor, " n"]
    """Numbers from 0 on that points share if they aren't independent."""
    effective: float
    """The number of independent draws that the points are worth."""

    @classmethod
    def of_particles(cls, found: Particles) -> Points:
        """Take particles: their islands are independent, and each rise of the temperature adds noise of a fresh choice."""
        groups = torch.arange(found.islands, device="cpu").repeat_interleave(len(found.x) // found.islands)
        return cls(found.x, found.log_p, found.log_weights.exp(), groups, found.ess / max(1, len(found.temperatures) - 1))

    @classmethod
    def even(cls, x: Float[Tensor, "n d"], log_p: Float[Tensor, " n"]) -> Points:
        """Take independent draws of equal weight."""
        return cls(x, log_p, torch.full_like(log_p, 1 / len(x)), torch.arange(len(x), device="cpu"), float(len(x)))

    def take(self, keep: Bool[Tensor, " n"]) -> Points:
        """Return some of the groups."""
        groups = self.groups[keep].unique(return_inverse=True)[1]
        weights = self.weights[keep] / self.weights[keep].sum()
        return Points(self.x[keep], self.log_p[keep], weights, groups, self.effective * float(keep.double().mean()))


@dataclass(frozen=True)
class Pool:
    """Points of p, and draws of a proposal q̄, weighted by p/m, m = a p + (1 − a) q̄.

    a is the share of the points' effective number among all. m needs p's normaliser Z, which is the one at which the weights
    sum to 1: that of bridge sampling between the points and the draws. No weight exceeds 1/a times that of a point, so that
    mass of p where q̄ has none is held by the points alone, and elsewhere the noise of the points counts little.

    Source: Meng & Wong (1996); Owen & Zhou (2000) and Cappé, Douc, Guillin, Marin & Robert (2008) for the mixture's weights.
    """

    log_p: Float[Tensor, " n"]
    """log p̃ at the points, then at the draws."""
    proposal: Float[Tensor, " n"]
    """log q̄ there."""
    base: Float[Tensor, " n"]
    """The mass of m that each of them stands for; their sum is 1."""
    groups: Int[Tensor, " n"]
    """Numbers that dependent ones share; every draw is a group of its own."""
    points: int
    """How many are points of p."""
    share: float
    """a."""
    log_z: float
    """log ∫ p̃, in nats."""

    @classmethod
    def of(cls, points: Points, log_p: Float[Tensor, " m"], proposal: Float[Tensor, " n"]) -> Pool:
        """Pool points of p with m draws of q̄, given log p̃ at the draws, and log q̄ at the points and then at the draws.

        Raises:
            TargetError: no draw has mass under p, or no point has any under q̄.
        """
        log_p, count, draws = torch.cat([points.log_p, log_p]), len(points.x), len(log_p)
        if not (bool((log_p[count:] > -math.inf).any()) and bool((proposal[:count] > -math.inf).any())):
            because = "no draw of the model has mass under the target, or none of the target's points has any under the model"
            raise TargetError(cannot("weight the model's draws", because, "Fit another family"))
        share = points.effective / (points.effective + draws)
        base = torch.cat([share * points.weights, torch.full_like(log_p[count:], (1 - share) / draws)])
        groups = torch.cat([points.groups, int(points.groups.max()) + 1 + torch.arange(draws, device="cpu")])
        return cls(log_p, proposal, base, groups, count, share, _log_z(log_p - proposal, base, share))

    @property
    def weights(self) -> Float[Tensor, " n"]:
        """The weights of p, whose sum is 1."""
        w = self.base * self._over_m(self.log_z)
        return w / w.sum()

    def log_z_stderr(self) -> float:
        """Return the standard error of log Z."""
        return self._stderr(self._of_log_z())

    def forward_kl(self, log_q: Float[Tensor, " n"], *, normalized: bool) -> tuple[float, float, float]:
        """Return KL(p‖q) = E_p[log p̃ − log q] − log Z, its standard error, with that of log Z in it, and k̂ of the draws' terms.

        It is the integral of p log(p/q) − p + q, which is nowhere below 0, so that it has little noise where q is close to p.

        Args:
            log_q: log q at the points and draws.
            normalized: whether Z is known to be 1.
        """
        z = 0.0 if normalized else self.log_z
        kl, r = self.log_p - z - log_q, self._over_m(z)
        if bool((kl[self.base > 0] == math.inf).any()):
            return math.inf, 0.0, math.inf
        of_q = torch.exp(log_q - self.proposal).nan_to_num(0.0) * _density_ratio(self.proposal - self.log_p + z, 1 - self.share)
        kl = torch.where(r > 0, kl, 0.0)
        terms = self.base * (r * kl - r + of_q)
        value, khat = float(terms.sum()), tail_shape(terms[self.points :])
        if normalized:
            return value, self._stderr(terms), khat
        slope = float(self.base @ (-r * (1 - self.share * r) * (kl - 1) - r + self.share * r * of_q))
        return value, self._stderr(terms + slope * self._of_log_z()), khat

    def _over_m(self, z: float) -> Float[Tensor, " n"]:
        """Return p/m."""
        return _density_ratio(self.log_p - self.proposal - z, self.share)

    def _of_log_z(self) -> Float[Tensor, " n"]:
        """Return what each point contributes to the error of log Z."""
        r = self._over_m(self.log_z)
        return self.base * r / float(self.base @ (r * (1 - self.share * r)))

    def _stderr(self, terms: Float[Tensor, " n"]) -> float:
        """Return the standard error of a sum of terms, from the groups of the points and from the draws, two independent sums."""
        variance = 0.0
        for part in (slice(None, self.points), slice(self.points, None)):
            sums, mass = (_by_group(one[part], self.groups[part]) for one in (terms, self.base))
            apart = sums - sums.sum() * mass / mass.sum()
            variance += float(apart.square().sum()) * len(sums) / max(1, len(sums) - 1)
        return math.sqrt(variance)


def _density_ratio(log_ratio: Float[Tensor, " n"], share: float) -> Float[Tensor, " n"]:
    """Return p/m, m = a p + (1 − a) q, given log p/q and a: at most 1/a."""
    return torch.sigmoid(log_ratio + math.log(share / (1 - share))) / share


def _log_z(ratio: Float[Tensor, " n"], base: Float[Tensor, " n"], share: float) -> float:
    """Solve Σ base p̃/(Z m) = 1 for log Z; the sum falls as Z rises."""
    finite = ratio[ratio.isfinite()]
    reach = 50 + 2 * abs(math.log(share / (1 - share))) + math.log(len(ratio))

    def excess(z: float) -> float:
        return float(base @ _density_ratio(ratio - z, share)) - 1

    return float(scipy.optimize.brentq(excess, float(finite.min()) - reach, float(finite.max()) + reach, xtol=1e-10))


def _by_group(terms: Float[Tensor, " n"], groups: Int[Tensor, " n"]) -> Float[Tensor, " g"]:
    first = int(groups[0])
    return torch.zeros(int(groups[-1]) - first + 1, dtype=terms.dtype, device="cpu").index_add(0, groups - first, terms)
