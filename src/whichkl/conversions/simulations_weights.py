"""Weights prior/proposal of simulations whose parameters were drawn from a proposal, and whether it covers the prior."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, TargetError, cannot, check_finite
from whichkl.importance import khat_limit, pareto_smooth
from whichkl.printable import count_of
from whichkl.targets import Target

_PRIOR_DRAWS = 10_000
"""Draws of the prior at which the proposal's density is looked up."""
_MAX_UNSEEN, _FACTOR = 0.01, 2.0
"""Largest share of the prior's draws whose weight may be more than this many times the largest weight of a simulation."""
_OUTER_SHARE = 0.01
"""The rows of the proposal with the least densities, as a share: a point with a smaller density is at the proposal's edge."""
_MAX_ERRORS = 4.0
"""Largest distance of the mean weight from 1, in standard errors, besides `_MAX_UNSEEN`."""
_MIN_SHARE, _ENOUGH = 0.1, 1_000
"""Least effective share of the simulations, unless this many count."""


@dataclass(frozen=True)
class ProposalWeights:
    """log prior/proposal at the parameters of simulations, and at draws of the prior."""

    log_weights: Float[Tensor, " n"]
    """−∞ where the prior is 0."""
    of_prior: Float[Tensor, " m"] | None
    """At draws of the prior at the proposal's edge, where it may be too narrow; −∞ at others. None if it can't be evaluated."""

    @classmethod
    def of(cls, prior: Target, proposal: Target, theta: Float[Tensor, "n d"]) -> ProposalWeights:
        """Evaluate both densities.

        Raises:
            InputError: one of them has no density, their dimensions differ, or a row can't be a draw of the proposal.
            TargetError: draws of the prior have no density under the proposal.
        """
        if proposal.dim != prior.dim:
            because = f"it has {count_of(proposal.dim, 'column')}, and the prior has {prior.dim}"
            raise InputError(cannot("use this `proposal`", because, "Give a distribution of all parameters"))
        for name, law in (("prior", prior), ("proposal", proposal)):
            if law.density is None:
                because = f"weights are prior/proposal, and the {name} has only {law.access.label}"
                raise InputError(cannot("use this `proposal`", because, f"Pass the log density of the {name}"))
        of_proposal = _possible(_log_prob(proposal, theta), theta)
        drawn = prior.draws(_PRIOR_DRAWS, 0).to(torch.float64)
        at_prior = _log_prob(proposal, drawn)
        unreached = at_prior == -torch.inf
        if bool(unreached.any()):
            share, example = float(unreached.double().mean()), _at(drawn[int(unreached.nonzero()[0])])
            because = f"it lacks the prior's support: its density is 0 at {share:.2%} of the prior's draws, such as {example}"
            instead = "Simulate from the prior, or from a proposal that covers it"
            raise TargetError(cannot("use this `proposal`", because, instead))
        is_outer = at_prior < of_proposal.kthvalue(math.ceil(_OUTER_SHARE * len(theta))).values
        of_prior = torch.where(is_outer, _log_prob(prior, drawn) - at_prior, -torch.inf)
        return cls(_log_prob(prior, theta) - of_proposal, of_prior)

    @classmethod
    def of_log_densities(cls, prior: Target, given: Float[Tensor, "n 1"], theta: Float[Tensor, "n d"]) -> ProposalWeights:
        """Take the proposal's log densities at the parameters, and evaluate the prior there.

        Raises:
            InputError: there isn't one per row, one isn't a number or is −∞, or the prior has no normalised density.
        """
        if given.shape != (len(theta), 1):
            rows = count_of(len(theta), "row")
            because = f"its log densities have shape {tuple(given.shape)}, and the parameters have {rows}"
            raise InputError(cannot("use this `proposal`", because, "Give one log density per row"))
        if not prior.normalized:
            because = "weights are prior/proposal, and the prior has no normalised density"
            raise InputError(cannot("use this `proposal`", because, "Give a torch Distribution as `prior=`"))
        check_finite(torch.where(given == -torch.inf, 0.0, given), ("log density",), "log densities of the proposal")
        return cls(_log_prob(prior, theta) - _possible(given[:, 0], theta), None)

    def described(self, kept: Tensor) -> tuple[str, str, str]:
        """Return a sentence on the weights of the simulations that are used, and the doubts about them, empty if there are none.

        The second doubt is that few simulations count, which holds for fits to the weighted simulations alone.
        """
        logw = self.log_weights[kept]
        share = (logw - torch.logsumexp(logw, 0)).exp()
        n, ess, khat = len(logw), float(1 / share.square().sum()), pareto_smooth(logw)[1]
        shown = "below 0" if khat < 0 else f"{khat:.2f}"
        said = f"The weights prior/proposal leave {ess:,.0f} effective simulations of {n:,} (PSIS k̂ {shown})."
        doubt = few = ""
        is_bounded = self.of_prior is not None and float(self.of_prior.max()) <= float(logw.max()) + math.log(_FACTOR)
        if khat > khat_limit(n) and not is_bounded:
            limit = f"PSIS k̂ of the weights is {shown}, above {khat_limit(n):.2f}"
            doubt = f"{limit}: the proposal is too narrow, and few simulations decide."
        elif narrow := self._too_narrow(float(logw.max())):
            doubt = narrow
        elif ess < min(_MIN_SHARE * n, _ENOUGH) or khat > khat_limit(n):
            few = f"Only {ess:,.0f} of {n:,} simulations count: the proposal is much wider than the prior."
            if self.of_prior is not None:
                few += " Fit `Flow()` or another network, which learns from all of them; a fit of another family is unreliable."
        return said, doubt, few

    def _too_narrow(self, most: float) -> str:
        """Return the doubt that mass of the prior has no simulations; empty if there is none.

        The mean of prior/proposal over all draws of the proposal is the share of the prior's mass where it has a density.
        """
        if self.of_prior is not None:
            unseen = float((self.of_prior > most + math.log(_FACTOR)).double().mean())
            few = f"The proposal is too narrow: {unseen:.0%} of the prior's mass is where it left hardly any simulation."
            return few if unseen > _MAX_UNSEEN else ""
        w = self.log_weights.exp()
        mean, stderr = float(w.mean()), float(w.std()) / math.sqrt(len(w))
        if abs(mean - 1) <= _MAX_UNSEEN + _MAX_ERRORS * stderr:
            return ""
        return (
            f"The mean of prior/proposal is {mean:.3g} ± {stderr:.2g}, not 1: the proposal has no mass at some of the prior's, "
            "rows were left out before, or these aren't logs of its normalised density."
        )

    def left_out(self, n: int) -> list[str]:
        """Say how many of the first n simulations have no weight."""
        count = int((self.log_weights[:n] == -torch.inf).sum())
        said = f"{count:,} of {n:,} simulations have parameters outside the prior's support, so their weight is 0."
        return [said] if count else []


def log_ratio(prior: Target, proposal: Target, theta: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Return log prior/proposal; −∞ where either density is 0, since the proposal draws nothing there."""
    of_prior, of_proposal = _log_prob(prior, theta), _log_prob(proposal, theta)
    return torch.where(of_proposal > -torch.inf, of_prior - of_proposal, -torch.inf)


def _possible(log_densities: Float[Tensor, " n"], theta: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Refuse parameters that the proposal can't have drawn."""
    impossible = log_densities == -torch.inf
    if bool(impossible.any()):
        row = int(impossible.nonzero()[0])
        count = f"{int(impossible.sum()):,} of {len(theta):,} rows of parameters"
        because = f"its density is 0 at {count}, first row {row} {_at(theta[row])}"
        raise InputError(cannot("use this `proposal`", because, "Give the distribution that the parameters were drawn from"))
    return log_densities


def _log_prob(law: Target, theta: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Evaluate a density at parameters, in its own dtype."""
    return law.log_prob(theta.to(law.device, law.dtype)).detach().to(theta.device, torch.float64)


def _at(theta: Float[Tensor, " d"]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in theta.tolist())})"
