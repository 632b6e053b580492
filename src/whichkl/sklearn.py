"""sklearn: a scikit-learn estimator that fits a family by maximum likelihood."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whichkl._checks import InputError, cannot, require
from whichkl.families import Family
from whichkl.families.family import log_likelihood
from whichkl.families.named import family_named
from whichkl.fitting import fit
from whichkl.objectives import ForwardKL, Objective, objective_of
from whichkl.process.seeds import seeded
from whichkl.process.torch_modes import plain_modes
from whichkl.solvers import Solver
from whichkl.targets import Target

require("sklearn", "sklearn")

from sklearn.base import BaseEstimator, DensityMixin  # noqa: E402
from sklearn.utils import check_random_state  # noqa: E402
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data  # noqa: E402


class DensityEstimator(DensityMixin, BaseEstimator):  # type: ignore[misc]
    """A model of p(x) from rows by forward KL, which maximises the mean log likelihood of the rows.

    Args:
        family: a `Family`, or its name: ``"gaussian"``, ``"mixture:3"``, ``"mixture:auto:diagonal"``, ``"student_t"``, ``"flow"``
            and so on (`whichkl.families.named.grammar` lists all).
        objective: None or ``"forward_kl"``: rows alone allow no other.
        solver: a solver or its name; by default the best for the family.
        support: where p > 0, as in `Target`: ``"positive"``, or one constraint per column.
        random_state: a number, a `RandomState`, or None for a new seed at each fit.

    Attributes:
        fit_: what `whichkl.fit` returned, without held-out judging; pickles leave the rows out.
        model_: the `torch.distributions.Distribution`.
        value_: mean −log q over the fitted rows, an `Estimate`; on unseen rows it is larger.
        n_features_in_: the number of columns.
        feature_names_in_: their names, if `X` had any.

    >>> rows = np.random.default_rng(0).normal(3, 2, size=(500, 1))
    >>> estimator = DensityEstimator("gaussian").fit(rows)
    >>> round(float(estimator.model_.mean), 1), round(float(estimator.model_.stddev), 1)
    (2.9, 2.0)
    >>> estimator.sample(3, random_state=0).shape
    (3, 1)
    """

    def __init__(
        self,
        family: Family | str = "gaussian",
        *,
        objective: Objective | str | None = None,
        solver: Solver | str | None = None,
        support: Any = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        """Store the parameters unchanged; see the class for them."""
        self.family = family
        self.objective = objective
        self.solver = solver
        self.support = support
        self.random_state = random_state

    @plain_modes()
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> DensityEstimator:  # noqa: N803
        """Fit the family to the rows of X.

        Args:
            X: (n, d) numbers, finite and dense.
            y: ignored, as in every density estimator of scikit-learn.
            sample_weight: (n,) non-negative weights.

        Raises:
            InputError: rows, weights or parameters can't be used, or rows alone don't allow the objective.
        """
        rows = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        family = family_named(self.family) if isinstance(self.family, str) else self.family
        if self.objective is not None and not isinstance(objective_of(self.objective), ForwardKL):
            name = objective_of(self.objective).name
            because = "an estimator has the rows of X alone, and they allow `forward_kl` and no other"
            raise InputError(cannot(f"use `objective={name!r}`", because, "Leave it out, or call whichkl.fit with a target"))
        if isinstance(family, Family) and family.conditional and not family.optional_context:
            because = f"`{family}` models y given x, and a density estimator has X alone"
            raise InputError(cannot("fit this family", because, "Call whichkl.fit(Target(samples=(x, y)), family)"))
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, rows, dtype=np.float64)
        names = getattr(self, "feature_names_in_", None)
        target = Target(
            samples=torch.from_numpy(np.array(rows)),
            weights=weights,
            names=None if names is None or len(set(names)) < len(names) else list(names),
            support=self.support,
        )
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.fit_ = fit(target, family, objective="forward_kl", solver=self.solver, seed=seed, judge=False)
        self.model_ = self.fit_.model
        self.value_ = self.fit_.value
        return self

    @plain_modes()
    def score_samples(self, X: Any) -> np.ndarray:  # noqa: N803
        """Return log q(x) of each row in nats; −∞ where q has no mass."""
        check_is_fitted(self)
        rows = torch.from_numpy(np.array(validate_data(self, X, dtype=np.float64, reset=False)))
        with torch.no_grad():
            return log_likelihood(self.model_, rows).to(torch.float64).numpy()

    def score(self, X: Any, y: Any = None) -> float:  # noqa: N803
        """Return the mean log likelihood of the rows in nats: on unseen rows −(KL(p‖q) + H(p)); higher is better."""
        return float(self.score_samples(X).mean())

    @plain_modes()
    def sample(self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None) -> np.ndarray:
        """Draw rows from the model.

        Args:
            n_samples: number of rows.
            random_state: a number or a `RandomState`; None for new draws at each call.
        """
        check_is_fitted(self)
        with seeded(int(check_random_state(random_state).randint(2**31 - 1))), torch.no_grad():
            draws: Tensor = self.model_.sample((n_samples,))
        return draws.to(torch.float64).numpy()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the rows out: a pickled estimator doesn't pass its data on."""
        state: dict[str, Any] = dict(super().__getstate__())
        if "fit_" in state:
            state["fit_"] = replace(state["fit_"], target=None, parts=None)
        return state
