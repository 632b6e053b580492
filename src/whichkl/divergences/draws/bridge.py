"""Bridge sampling: log Z from draws of both sides, and with it KLs of unnormalised densities that are absolute."""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.access import Access
from whichkl.chains import FEWEST, standard_error
from whichkl.divergences.draws.monte_carlo import Place, log_ratio_at, mean_log_ratio, placed, points
from whichkl.divergences.estimate import Estimate
from whichkl.importance import effective_sample_size
from whichkl.targets import Target

_OFFSET_OF_OTHER_BRIDGES = 2.0
MIN_ESS = 30
"""Fewest effective draws on the bridge for an error that covers: 92–96 % on Gaussians 4–30 nats apart in 1–40 dimensions."""


@dataclass(frozen=True)
class Bridge:
    """Log of Z_p/Z_q with what each draw contributes to its error: ẑ − z ≈ mean(from_p) + mean(from_q)."""

    log_z: float
    from_p: Float[Tensor, " n"]
    from_q: Float[Tensor, " m"]
    ess: float
    """The smaller of the effective numbers of draws of p and of q that lie on the bridge."""


def log_z(p: Target, q: Target, n: int = 20_000, seed: int = 0) -> Estimate:
    """Log of p's normaliser (over q's, if that isn't normalised either), from draws and log densities of both; consistent.

    Raises:
        TargetError: draws or a log density are missing, draws are weighted, or no draw of one falls where the other has mass.

    Source: Meng & Wong (1996); its error, Bennett (1976) and Frühwirth-Schnatter (2004).

    >>> from torch.distributions import Normal
    >>> q = Target.of(Normal(0.5, 1.0))
    >>> p = Target(sampler=lambda n: torch.randn(n, 1), log_prob=lambda x: -x[:, 0].square() / 2, dim=1)
    >>> e = log_z(p, q)
    >>> abs(e.value - math.log(2 * math.pi) / 2) < 4 * e.stderr < 0.05
    True
    """
    draws = _Draws.of(p, q, n, seed)
    found = draws.bridge()
    return _estimate("log_z", found.log_z, found, draws, (found.from_p, found.from_q))


def forward_kl(p: Target, q: Target, n: int = 20_000, seed: int = 0) -> Estimate:
    """KL(p‖q) = E_p[log p̃ − log q̃] − log Ẑ, absolute. The draws of p are used twice, and the error takes that into account."""
    return _kl("forward_kl", _Draws.of(p, q, n, seed), 0)


def reverse_kl(p: Target, q: Target, n: int = 20_000, seed: int = 0) -> Estimate:
    """KL(q‖p) = E_q[log q̃ − log p̃] + log Ẑ, absolute."""
    return _kl("reverse_kl", _Draws.of(p, q, n, seed), 1)


def _kl(name: str, draws: _Draws, side: int) -> Estimate:
    """The KL whose expectation is under p (side 0) or q (side 1)."""
    ratio, sign = ((draws.at_p, 1), (-draws.at_q, -1))[side]
    plain = mean_log_ratio(name, ratio, None, draws.of_what[side], chains=draws.chains[side], place=draws.places[side])
    if plain.value == math.inf:
        return plain
    found = draws.bridge()
    terms = [found.from_p, found.from_q]
    terms[side] = ratio - sign * terms[side]
    return _estimate(name, plain.value - sign * found.log_z, found, draws, (terms[0], terms[1]), plain)


def contradiction(p: Target, q: Target, n: int, seed: int) -> str | None:
    """Report draws and log densities that don't belong together: two bridges that must agree give different Z.

    E_q[p̃ h] = (Z_p/Z_q) E_p[q̃ h] holds for every h if the draws of each are draws of its density, and in general only then:
    so it is checked at the optimal bridge and at two that lean to either side. Where both densities are normalised, Z is 1.
    """
    draws = _Draws.of(p, q, n, seed)
    if not bool((draws.at_p < math.inf).any() and (draws.at_q > -math.inf).any()):
        return None
    found = draws.bridge()
    if found.ess < MIN_ESS:
        return None
    for lean in (-_OFFSET_OF_OTHER_BRIDGES, _OFFSET_OF_OTHER_BRIDGES):
        other = draws.bridge(lean)
        # The two share their draws, so that most of their noise cancels.
        gap, noise = other.log_z - found.log_z, draws.errors(other.from_p - found.from_p, other.from_q - found.from_q)[0]
        if other.ess >= MIN_ESS and abs(gap) > 5 * noise + 1e-3:
            seen = f"two estimates of log Z, by different bridges, differ by {gap:+.2g} ± {noise:.1g}"
            return f"{seen}: draws contradict a log density"
    known = draws.errors(found.from_p, found.from_q)[0]
    if p.normalized and q.normalized and abs(found.log_z) > 5 * known + 1e-3:
        return f"the densities are given as normalised, and log Z is {found.log_z:+.3g} ± {known:.1g}"
    return None


def bridge(
    at_p: Float[Tensor, " n"],
    at_q: Float[Tensor, " m"],
    chains_p: Tensor | None = None,
    chains_q: Tensor | None = None,
    lean: float = 0.0,
) -> Bridge:
    """Log Z by the optimal bridge, the z at which s E_p[σ(z − ℓ − a)] = (1 − s) E_q[σ(ℓ − z + a)], a = log s/(1 − s).

    ℓ = log p̃/q, s the share of p's draws among all, effective ones where they're chains. Both sides are monotone in z, so
    that there is one. The optimal bridge p̃q/(s p̃/Z + (1 − s) q) depends on Z through the same draws, which costs nothing at
    first order, so that the error is that of known weights.

    `at_p` and `at_q` are ℓ at draws of p and of q, ±∞ where the other density is zero; `lean` is added to a, which makes it
    another bridge than the optimal one, with a larger error.

    Raises:
        TargetError: no draw of q falls where p has mass, or the other way round.
    """
    for ratio, text in ((-at_q, "q falls where p"), (at_p, "p falls where q")):
        if not bool((ratio < math.inf).any()):
            raise TargetError(cannot("bridge p and q", f"no draw of {text} has mass", "Use a q that covers p"))
    sides = ((at_p, chains_p), (at_q, chains_q))
    counts = [standard_error(ratio.clamp(-1e3, 1e3), chains)[1] or float(len(ratio)) for ratio, chains in sides]
    share = counts[0] / sum(counts)
    offset = math.log(share / (1 - share)) + lean
    share = 1 / (1 + math.exp(-offset))

    def excess(z: float) -> float:
        of_p, of_q = torch.sigmoid(z - at_p - offset), torch.sigmoid(at_q - z + offset)
        return share * float(of_p.mean()) - (1 - share) * float(of_q.mean())

    finite = torch.cat([at_p, at_q])
    finite = finite[finite.isfinite()]
    reach = 50 + 2 * abs(offset) + math.log(len(finite))  # nats beyond all ratios, where one side is 0 and the other isn't
    z = float(scipy.optimize.brentq(excess, float(finite.min()) - reach, float(finite.max()) + reach, xtol=1e-10))
    on_p, on_q = torch.sigmoid(z - at_p - offset), torch.sigmoid(at_q - z + offset)
    steep = share * float((on_p * (1 - on_p)).mean()) + (1 - share) * float((on_q * (1 - on_q)).mean())
    if steep < 1e-100:
        raise TargetError(cannot("bridge p and q", "their draws lie hundreds of nats apart", "Use a q that covers p"))
    ess = min(effective_sample_size(on.log()) * count / len(on) for on, count in zip((on_p, on_q), counts, strict=True))
    return Bridge(z, -share * (on_p - on_p.mean()) / steep, (1 - share) * (on_q - on_q.mean()) / steep, ess)


@dataclass(frozen=True)
class _Draws:
    """Log p̃/q̃ at draws of both, a description of the draws, their chains, and where the other density is zero."""

    at_p: Float[Tensor, " n"]
    at_q: Float[Tensor, " m"]
    of_what: tuple[str, str]
    chains: tuple[Tensor | None, Tensor | None]
    places: tuple[Place, Place]

    @classmethod
    def of(cls, p: Target, q: Target, n: int, seed: int) -> _Draws:
        """Draw from both, or take their samples."""
        for one, name in ((p, "p"), (q, "q")):
            if not one.access.can_sample or Access.LOG_PROB not in one.access or one.weights is not None:
                because = f"{name} has {one.access.label}" + (", weighted" if one.weights is not None else "")
                raise TargetError(cannot("bridge p and q", because, "Give draws of equal weight, and a log density, of both"))
        (x, of_p, chains_p), (y, of_q, chains_q) = points(p, n, seed, "p"), points(q, n, seed + 1, "q")
        places = placed(x, q), placed(y, p)
        return cls(log_ratio_at(p, q, x), -log_ratio_at(q, p, y), (of_p, of_q), (chains_p, chains_q), places)

    def bridge(self, lean: float = 0.0) -> Bridge:
        """Return log Z from these draws."""
        return bridge(self.at_p, self.at_q, *self.chains, lean)

    def errors(self, from_p: Tensor, from_q: Tensor) -> tuple[float, list[float | None]]:
        """Return the error of mean(from_p) + mean(from_q), which are independent, and the effective draws of each."""
        errors = [standard_error(one, chains) for one, chains in zip((from_p, from_q), self.chains, strict=True)]
        return math.hypot(*(error for error, _ in errors)), [ess for _, ess in errors]


def _estimate(
    name: str, value: float, found: Bridge, draws: _Draws, terms: tuple[Tensor, Tensor], plain: Estimate | None = None
) -> Estimate:
    error, effective = draws.errors(*terms)
    notes = [] if plain is None else [*plain.notes]
    if found.ess < MIN_ESS:
        seen = f"{found.ess:.0f} effective draws of one lie where the other is, and {MIN_ESS} are needed"
        notes.append(f"p and q overlap too little: {seen}")
    for ess, whose in zip(effective, "pq", strict=True):
        if ess is not None and ess < FEWEST:
            notes.append(f"the chains of {whose} are worth {ess:.0f} independent draws, and error bars need {FEWEST}")
    return Estimate(
        name,
        value,
        error,
        method=f"bridge sampling, {draws.of_what[0]} and {draws.of_what[1]}",
        n=sum(map(len, terms)),
        ess=found.ess,
        khat=None if plain is None else plain.khat,
        reliable=not notes,
        notes=tuple(dict.fromkeys(notes)),
    )
