"""Atoms: laws on atoms, of torch, of a fit or of a target with a discrete support, as log probabilities and a list of atoms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Bernoulli, Binomial, Categorical, Distribution, Independent, OneHotCategorical
from torch.nn.functional import logsigmoid

from whichkl._checks import InputError, TargetError, cannot
from whichkl.access import Access
from whichkl.divergences.kinds import IntegralDivergence
from whichkl.process.seeds import seeded
from whichkl.targets import Target
from whichkl.targets.supports import Bijection, count_states, list_states

MassOn = Literal["density", "atoms", "mixed"]
NEGLIGIBLE_NATS = 40.0
"""Nats below the largest at which the probabilities of countable atoms are left off."""
MAX_ATOMS = 1 << 17
_MAX_NORMALIZER_ERROR = 1e-4
"""Largest |log Z| of probabilities that are given as normalised: those of float32 are nearer to 0."""


def where_mass_is(p: Distribution) -> MassOn:
    """Return whether a law has a density, lives on atoms, or is mixed: columns of both kinds."""
    try:
        support: Any = p.support
    except NotImplementedError:
        return "density"
    found = {bool(getattr(one, "is_discrete", False)) for one in getattr(support, "columns", [support])}
    return "mixed" if len(found) == 2 else "atoms" if found == {True} else "density"


def is_discrete(p: Distribution) -> bool:
    """Whether a law lives on atoms."""
    return where_mass_is(p) == "atoms"


@dataclass(frozen=True)
class Atoms:
    """The probabilities of a law on atoms: of a torch distribution, or of a target by its normalised log probabilities.

    >>> from torch.distributions import Poisson
    >>> Atoms(Poisson(2.0)).log_mass(torch.tensor([[0.0], [0.5]])).tolist()
    [-2.0, -inf]
    """

    law: Distribution | Target

    def log_mass(self, atoms: Float[Tensor, "v d"]) -> Float[Tensor, " v"]:
        """Return the log probability of each row, −∞ where it is no atom."""
        if isinstance(self.law, Distribution):
            return _log_mass(self.law, atoms)
        return self.law.log_prob(atoms.to(self.law.device, self.law.dtype)).detach().to("cpu", torch.float64)

    @property
    def is_finite(self) -> bool:
        """Whether `listed` has every atom, not only those with mass up to e⁻⁴⁰ of the largest."""
        return not isinstance(self.law, Distribution) or _finite_list(self.law) is not None

    def listed(self) -> Float[Tensor, "v d"] | None:
        """Return the atoms; None if there are too many, or if they can't be listed."""
        if not isinstance(self.law, Distribution):
            return self.law.atoms[0].to(torch.float64) if Access.ENUMERABLE in self.law.access else None
        found = _finite_list(self.law)
        return _countable_list(self.law) if found is None else found


def target_of_law(p: Distribution) -> Target:
    """Return the target of a law with atoms, in all columns or in some: its draws, and its normalised log probabilities."""
    if p.batch_shape != () or len(p.event_shape) > 1:
        shapes = f"batch shape {tuple(p.batch_shape)} and event shape {tuple(p.event_shape)}"
        instead = "Give one distribution over a scalar or a vector (torch.distributions.Independent makes one)"
        raise InputError(cannot("estimate a divergence of this distribution", f"it has {shapes}", instead))

    def sampler(n: int) -> Tensor:
        return p.sample((n,)).reshape(n, -1).to(torch.float64)

    with seeded(0):
        dim = sampler(1).shape[1]
    return Target(sampler=sampler, log_prob=Atoms(p).log_mass, normalized=True, dim=dim)


def normalised_target(p: Target) -> Target:
    """Return a target with a discrete support with normalised log probabilities and a sampler, if its states can be listed.

    Raises:
        TargetError: the probabilities are given as normalised and don't sum to one, or all are 0.
    """
    if Access.LOG_PROB not in p.access or Access.ENUMERABLE not in p.access:
        return p
    states, log_p = p.atoms
    log_z = float(log_p.logsumexp(0))
    if log_z == -math.inf or (p.normalized and abs(log_z) > _MAX_NORMALIZER_ERROR):
        what = "is given as normalised (`normalized=True`)" if p.normalized else "has a log density"
        because = f"it {what}, and its probabilities sum to {math.exp(log_z):.6g}"
        raise TargetError(cannot("use this target", because, "Normalise it, or pass `normalized=False`"))
    table, dtype = Categorical(logits=log_p.cpu(), validate_args=False), p.dtype
    return Target(
        samples=p.samples,
        weights=p.weights,
        chains=p.chains,
        log_prob=lambda x: p.log_prob(x).to(torch.float64) - log_z,
        sampler=(lambda n: states[table.sample((n,))]) if p.samples is None else None,
        normalized=True,
        dim=p.dim,
        names=p.names,
        support=p.bijection.constraints,
        dtype=dtype,
        device=p.device,
    )


def enumerate_atoms(
    p: Atoms | Distribution, q: Atoms | Distribution, kind: IntegralDivergence
) -> tuple[Float[Tensor, " v"], Float[Tensor, " v"], Float[Tensor, "v d"]] | None:
    """Log probabilities of two laws over their joint atoms, and the atoms; None if they can't be listed.

    Countable supports (Poisson, Geometric, …) are listed until e⁻⁴⁰ of the largest is left of either, and until the terms of the
    divergence have fallen as far, or are seen not to fall. Rows of several such columns are listed for bounded divergences.
    """
    p, q = (one if isinstance(one, Atoms) else Atoms(one) for one in (p, q))
    lists = [one for one in (p.listed(), q.listed()) if one is not None]
    if len(lists) < 2:
        return None
    atoms = torch.cat(lists).unique(dim=0)
    if not (p.is_finite and q.is_finite):
        if atoms.shape[1] > 1 and not kind.bounded:
            return None
        # A divergence such as χ² weights tails more than the probabilities do: the list ends where its own terms do.
        while atoms.shape[1] == 1 and not is_settled(kind.log_tail(p.log_mass(atoms), q.log_mass(atoms))):
            if len(atoms) >= MAX_ATOMS:
                break
            atoms = torch.arange(2 * len(atoms), dtype=torch.float64, device="cpu")[:, None]
    return p.log_mass(atoms), q.log_mass(atoms), atoms


def is_settled(size: Float[Tensor, " v"]) -> bool:
    """Whether the last terms are negligible and fall."""
    top, last = float(size.max()), size[-len(size) // 8 :]
    return top == math.inf or float(last.max()) < top - NEGLIGIBLE_NATS or top == -math.inf


def named(atom: Tensor) -> str:
    """Return an atom as a message writes it."""
    return f"{float(atom):g}" if atom.numel() == 1 else str([float(v) if v != v.round() else int(v) for v in atom])


def _finite_list(p: Distribution) -> Float[Tensor, "v d"] | None:
    """Return all atoms of a finite support, of one column or of several."""
    dim = max(1, p.event_shape.numel())
    if p.has_enumerate_support:
        try:
            return p.enumerate_support().reshape(-1, dim).to(torch.float64)
        except NotImplementedError:  # torch's Independent
            pass
    try:
        support: Any = p.support
        levels = Bijection(getattr(support, "columns", support), dim).levels
    except (InputError, NotImplementedError, AttributeError, RuntimeError, TypeError, ValueError):
        return None
    return None if levels is None or count_states(levels) > MAX_ATOMS else list_states(levels)


def _countable_list(p: Distribution) -> Float[Tensor, "v d"] | None:
    """Return the atoms of a countable support that have mass; for independent columns, every combination of theirs."""
    if laws := getattr(p, "laws", None):
        columns = [Atoms(law).listed() for law in laws]
        known = [one[:, 0] for one in columns if one is not None]
        if len(known) < len(columns) or math.prod(map(len, known)) > MAX_ATOMS:
            return None
        return torch.stack(torch.meshgrid(*known, indexing="ij"), -1).reshape(-1, len(known))
    if p.support is None or not p.support.is_discrete or p.event_shape != ():
        return None
    count = 64
    while count <= 1 << 22:
        atoms = torch.arange(count, dtype=torch.float64, device="cpu")[:, None]
        size = _log_mass(p, atoms)
        if float(size[-1]) < float(size.max()) - NEGLIGIBLE_NATS and float(size.logsumexp(0)) > -1e-6:
            return torch.arange(2 * count, dtype=torch.float64, device="cpu")[:, None]
        count *= 2
    return None


def _log_mass(p: Distribution, atoms: Float[Tensor, "v d"]) -> Float[Tensor, " v"]:
    support = p.support
    points = atoms[:, 0] if p.event_shape == () else atoms
    inside = torch.ones(len(atoms), dtype=torch.bool, device="cpu") if support is None else support.check(points)
    value = torch.full((len(atoms),), -math.inf, dtype=torch.float64, device="cpu")
    inside = inside if inside.ndim == 1 else inside.all(-1)
    if bool(inside.any()):
        value[inside] = _log_prob(p, points[inside]).detach().to(torch.float64)
    return value


def _log_prob(p: Distribution, atoms: Tensor) -> Tensor:
    """Log probabilities without torch's clamp of the parameter to some 1e-16, which makes infinite KLs finite."""
    if isinstance(p, OneHotCategorical):
        return _log_prob(p._categorical, atoms.argmax(-1))
    if isinstance(p, Independent) and p.reinterpreted_batch_ndims == 1:
        return _log_prob(p.base_dist, atoms).sum(-1)
    given = vars(p)
    if isinstance(p, Categorical):
        each: Tensor = given["logits"].log_softmax(-1) if _has_logits(p) else given["probs"].log()
        return each.expand(*atoms.shape, -1).gather(-1, atoms.long()[..., None])[..., 0]
    if isinstance(p, (Bernoulli, Binomial)):
        if _has_logits(p):
            yes, no = logsigmoid(p.logits), logsigmoid(-p.logits)
        else:
            yes, no = given["probs"].log(), (-given["probs"]).log1p()
        n = p.total_count if isinstance(p, Binomial) else torch.ones((), dtype=torch.float64, device="cpu")
        ways = torch.lgamma(n + 1) - torch.lgamma(atoms + 1) - torch.lgamma(n - atoms + 1)
        return ways + torch.where(atoms > 0, atoms * yes, 0.0) + torch.where(n > atoms, (n - atoms) * no, 0.0)
    return p.log_prob(atoms)


def _has_logits(p: Any) -> bool:
    """Whether the law was given by its logits; torch stores the other parameter, with fewer digits, once it has been read."""
    given = vars(p)
    return "logits" in given and ("probs" not in given or torch.equal(given["logits"], given["_param"]))
