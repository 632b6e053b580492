"""Simulator: a prior of parameters, and a function that makes data given parameters, whose likelihood isn't known."""

from __future__ import annotations

import os
from typing import Any

from whichkl._arguments import typed
from whichkl._checks import InputError, cannot, check_seed
from whichkl.cluster import Ray, Workers, workers_of
from whichkl.conversions.simulations import Simulations
from whichkl.conversions.simulations_prior import parameter_names, read_prior, read_proposal
from whichkl.conversions.simulator_runs import Call, mixed_seed, run_simulator
from whichkl.printable import count_of
from whichkl.process.torch_modes import plain_modes
from whichkl.targets import Target
from whichkl.targets.calling import Function

_DEFAULT_SIMULATIONS, _MAX_SIMULATIONS = 10_000, 100_000_000
_CALLED = {
    True: "`simulate` takes rows of parameters, (n, d), and simulates each row on its own (`batched=True`).",
    False: "`simulate` takes the parameters of one simulation, (d,) (`batched=False`).",
}


class Simulator:
    """A prior p(θ) and a simulator of data x given θ: `convert` turns them into pairs (x, θ), of which p(θ | x) is fitted.

    Forward KL to a conditional family, E_p(x) KL(p(θ|x) ‖ q(θ|x)), is minimised by maximum likelihood on the pairs, so a single
    fit answers for every x: ``fit(convert(Simulator(…)), Flow()).model(x)``. No likelihood is needed.

    Args:
        prior: a torch `Distribution` of the parameters, a `Target` with a sampler, or independent laws in a list, or in a dict by
            the parameters' names. Its support is that of the posterior.
        simulate: x(θ) or x(θ, generator): (n, d) → (n, c), tensors or arrays of the prior's dtype. The global seeds of torch and
            NumPy are set for each call. Where a simulation fails, it returns NaN; that row is left out.
        proposal: a distribution to draw parameters from instead of the prior; each simulation then has the weight prior/proposal.
            A dict may name some parameters of a prior that is a dict: the others are drawn from the prior.
        batched: False if `simulate` takes one point, (d,) → (c,).
        workers: number of processes of this machine that simulate, by Ray.
        cluster: ``"auto"`` or the address of a Ray cluster.
        journal: a folder in which simulations are kept: the same call resumes after an interruption, and doesn't simulate again,
            except for the first few rows, which must come out the same.

    The simulations are the same for a seed, however many processes work.

    Raises:
        InputError: an argument can't be used.

    Source: Papamakarios & Murray (2016), "Fast ε-free inference of simulation models with Bayesian conditional density
    estimation".

    >>> import torch, whichkl as wk
    >>> prior = torch.distributions.Normal(torch.zeros(1), torch.ones(1))
    >>> simulator = wk.Simulator(prior=prior, simulate=lambda theta: theta + torch.randn_like(theta))
    >>> posterior = wk.fit(wk.convert(simulator, n=2_000), wk.families.LinearGaussian()).model
    >>> [round(value, 1) for value in posterior([[1.0]]).mean.flatten().tolist()]
    [0.5]
    """

    @typed
    @plain_modes()
    def __init__(
        self,
        *,
        prior: Any,
        simulate: Function,
        proposal: Any = None,
        batched: bool = True,
        workers: int | None = None,
        cluster: Workers | str | None = None,
        journal: str | os.PathLike[str] | None = None,
    ) -> None:
        if workers is not None and workers < 1:
            raise InputError(cannot(f"use `workers={workers}`", "it isn't at least 1", "Give, say, 4"))
        if workers is not None and cluster is not None:
            because = "workers are processes of this machine"
            raise InputError(cannot("use both `workers=` and `cluster=`", because, "Give one of them"))
        self.prior = read_prior(prior)
        names = parameter_names(self.prior)
        self.proposal = None if proposal is None else read_proposal(proposal, prior, names, samples=True)
        self.simulate, self.batched, self.journal = simulate, batched, journal
        chosen = Ray("local", most=workers) if workers is not None else None if cluster is None else workers_of(cluster)
        self._ray = chosen if isinstance(chosen, Ray) else None

    @typed
    @plain_modes()
    def run(self, n: int = _DEFAULT_SIMULATIONS, *, seed: int = 0) -> Simulations:
        """Simulate n times, and return the pairs of parameters and data.

        Raises:
            TargetError: the simulator raised; the error names the parameters.
            InputError: n isn't a whole number of at least 1, or the simulator returned no rows of one width.
            ResourceError: the cluster can't be reached, a worker died at every retry, or the journal can't be written.
        """
        if not 1 <= n <= _MAX_SIMULATIONS:
            because = f"it isn't between 1 and {_MAX_SIMULATIONS:,}"
            raise InputError(cannot(f"simulate `n={n}` times", because, f"Give, say, n={_DEFAULT_SIMULATIONS:,}"))
        own = mixed_seed(
            check_seed(seed), n
        )  # runs of other lengths share no simulation, so that they can test each other's fits
        theta = (self.proposal or self.prior).draws(n, own)
        call = Call(self.simulate, self.batched, own, parameter_names(self.prior))
        x = run_simulator(call, theta, self._ray, self.journal)
        found = Simulations(prior=self.prior, parameters=theta, data=x, proposal=self.proposal)
        found.called = _CALLED[self.batched]
        return found

    def as_target(self, *, n: int | None, seed: int) -> Target:
        """Return n simulations, by default 10,000, as pairs (x, θ); see `Simulations.as_target`."""
        target = self.run(_DEFAULT_SIMULATIONS if n is None else n, seed=seed).as_target(n=None, seed=seed)
        return target

    def __repr__(self) -> str:
        d = self.prior.dim
        return f"Simulator({getattr(self.simulate, '__name__', 'simulate')}, {count_of(d, 'parameter')})"
