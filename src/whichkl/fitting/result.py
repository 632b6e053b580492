"""Fit: the result of `fit`: the model, its value, its findings, what can be computed from them, and how it is saved."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from whichkl._arguments import typed
from whichkl._checks import IntegrityError, WhichklError, check_seed
from whichkl.advice import Advice
from whichkl.diagnostics import Diagnostics, JudgedFit, explain
from whichkl.diagnostics import linear_response as responses
from whichkl.divergences import Estimate
from whichkl.families import Family, family_from_config, family_of
from whichkl.files.saving import FORMAT
from whichkl.fitting.checking import checked
from whichkl.fitting.correction import Expectation, Weighted, check_draws, draw, expectation
from whichkl.fitting.correction import corrected as corrected_points
from whichkl.fitting.printed import printed
from whichkl.fitting.saved_fit import FIT, FitFields, rebuilt
from whichkl.fitting.scores import Scores
from whichkl.fitting.scoring import score
from whichkl.fitting.summary import Summary, summarize
from whichkl.fitting.trust import trust
from whichkl.objectives import Objective
from whichkl.printable import HTML, shorten
from whichkl.process.torch_modes import plain_modes
from whichkl.progress import shown_progress, with_progress
from whichkl.samples import Reading
from whichkl.targets import Target
from whichkl.targets.supports import Bijection

_DRAWS_FOR_CORRECTION = 10_000
_MAX_SAVED_ROWS = 1_000
"""Largest number of rows of a table that is saved; of more, a loaded fit has the columns of q only."""


@dataclass(frozen=True)
class Fit(HTML):
    """The result of `fit`."""

    model: Any
    """The fitted q, a `Distribution`: `log_prob`, `sample`, and `rsample` where it exists. Conditional: x ↦ `Distribution`."""
    family: Family
    objective: Objective
    solver: str
    advice: Advice
    value: Estimate
    """What was minimised, on draws that the fit hasn't seen, or exactly."""
    status: str
    """`converged` or `stopped`."""
    findings: frozenset[str]
    """Names from `diagnostics.FINDINGS`; `explanations` has a sentence for each, in the order of `sorted(findings)`."""
    diagnostics: Diagnostics
    names: tuple[str, ...]
    bijection: Bijection
    seed: int
    target: Target | None = None
    """What was fitted; None after `Fit.load`."""
    parts: JudgedFit | None = field(default=None, repr=False, compare=False)
    """What `check` reads; None after `Fit.load`."""
    saved_summary: Summary | None = None
    """What `summary` returned when the fit was saved; None before `Fit.load`."""
    context_names: tuple[str, ...] = ()
    """The columns of x of a conditional fit."""
    reading: Reading = Reading()
    """How a table was read, with the labels of its categories; `score` reads rows in the same way."""

    @property
    def explanations(self) -> tuple[str, ...]:
        """A sentence with the next step for each of `sorted(findings)`."""
        return explain(self.findings, self.family, self.diagnostics)

    @property
    def trust(self) -> str:
        """One sentence on what to use in place of p: q, its corrected draws, or neither."""
        return trust(self)

    def __str__(self) -> str:
        """What to use, what was minimised, how it ended, the value, the table of `summary`, the findings: at most 40 lines."""
        return printed(self)

    def __repr__(self) -> str:
        count, d = len(self.findings), len(self.names)
        found = f"{count or 'no'} finding{'s' * (count != 1)}"
        size = f"{d:,} dimension{'s' * (d > 1)}"
        return f"Fit({self.objective.spec}, {shorten(repr(self.family), 160)}, {size}, {self.status}, {found})"

    @typed
    @plain_modes()
    def summary(self, *, target: Any = None) -> Summary:
        """Return a table: each coordinate's mean, standard deviation and 95 % interval, in the coordinates of the target.

        If p has a log density, the same numbers of p by importance weights are next to those of q, if the weights can be trusted:
        PSIS k̂ is at most min(1 − 1/log₁₀ n, 0.7), and no mode is known to be missing. Otherwise a note has the reason. The log
        density isn't evaluated, since the weights are those that judged the fit. A mixture has further rows for its components. A
        linear or generalised linear model of y given x has a row per coefficient, with its standard error.

        Args:
            target: what was fitted, for a fit that was loaded or not judged; its log density is evaluated at up to 10,000 draws.

        Raises:
            TargetError: the log density of `target` is broken.

        Source: Vehtari, Simpson, Gelman, Yao & Gabry (2024).

        >>> from whichkl import fit
        >>> print(fit(Target(log_prob=lambda x: -(x - 1).square().sum(-1) / 2, dim=2, names=["a", "b"])).summary())
            mean     sd   2.5 %  97.5 %  p mean   p sd  p 2.5 %  p 97.5 %  p mcse
        a  1.000  1.000  -0.960   2.960   ...
        b  1.000  1.000  -0.960   2.960   ...
        2.5 % to 97.5 % is the equal-tailed 95 % interval, under q, and under p by importance weights.
        """
        return self._summary if target is None else summarize(self, Target.of(target))

    @cached_property
    def _summary(self) -> Summary:
        return self.saved_summary or summarize(self)

    @typed
    @plain_modes()
    def draws(self, n: int = 1_000, *, corrected: bool = False, seed: int = 0, target: Any = None) -> Float[Tensor, "n d"]:
        """Draw n points of q in the coordinates of the target, or, corrected, of p.

        Args:
            n: number of points.
            corrected: whether to resample draws of q by Pareto-smoothed importance weights, or, if k̂ is too large, to move
                particles from q to p (see `whichkl.fitting.correction.corrected`). Corrected points can repeat.
            seed: fixes the draws.
            target: what was fitted, for a loaded fit.

        Raises:
            InputError: the fit is conditional, or n isn't a whole number of at least 1.
            TargetError: there is no log density to correct by, or neither weights nor particles can be trusted.

        Source: Vehtari, Simpson, Gelman, Yao & Gabry (2024); Dai, Heng, Jacob & Whiteley (2022).

        >>> from whichkl import fit
        >>> fit(Target(log_prob=lambda x: -x.square().sum(-1), dim=2)).draws(5, corrected=True).shape
        torch.Size([5, 2])
        """
        n, seed = check_draws(self.model, self.names, n), check_seed(seed)
        return draw(self.model, self._weighted(max(_DRAWS_FOR_CORRECTION, n), seed, target) if corrected else None, n, seed)

    @typed
    @plain_modes()
    def expect(
        self,
        f: Callable[[Tensor], Any],
        *,
        corrected: bool = True,
        n: int = _DRAWS_FOR_CORRECTION,
        seed: int = 0,
        target: Any = None,
    ) -> Expectation:
        """Return E f(x) with its standard error, under p, or under q.

        Args:
            f: (n, d) → (n,) or (n, k), of points in the coordinates of the target.
            corrected: whether the expectation is under p, by importance weights or particles as in `draws`.
            n: number of draws of q.
            seed: fixes the draws.
            target: what was fitted, for a loaded fit.

        Raises:
            InputError: the fit is conditional, f returns something else, or n isn't a whole number of at least 1.
            TargetError: there is no log density to correct by, or neither weights nor particles can be trusted.

        >>> from whichkl import fit
        >>> print(fit(Target(log_prob=lambda x: -(x - 1).square().sum(-1) / 2, dim=2)).expect(lambda x: x[:, 0]))
        0.999 ± 0.01 (importance weights, 10,000 of 10,000)
        """
        n, seed = check_draws(self.model, self.names, n), check_seed(seed)
        weighted = self._weighted(n, seed, target) if corrected else None
        return expectation(f, draw(self.model, None, n, seed) if weighted is None else weighted.x, weighted)

    @typed
    @plain_modes()
    def score(self, samples: Any, *, top: int = 20, missing: str | None = None, seed: int = 0) -> Scores:
        """Score rows: log q of each, its rank among the model's own draws, and what drives the strangest ones.

        The rank of a row is the share of 10,000 draws of q whose log density is lower or equal; of q(y|x), of 1,000 draws of y
        at the row's own x. A small rank means a strange row. A row outside the support has log density −inf and rank 0. A column
        drives a row by its gain, max over v of log q(row with v in that column) − log q(row) in nats, where v are the column's
        values in 200 draws of q.

        Args:
            samples: a DataFrame, a file, a folder or a list of files, whose columns are found by their names; or an (n, d) array,
                or a pair (x, y), with the fit's columns in their order.
            top: for how many rows, those of the lowest log density, the drivers are computed.
            missing: ``"refuse"`` or ``"drop"``, as for `Target`; by default as in the fit.
            seed: fixes the draws.

        Raises:
            InputError: a column of the fit is missing, or a cell isn't a number.

        >>> from whichkl import fit
        >>> scores = fit(Target(log_prob=lambda x: -x.square().sum(-1) / 2, dim=2)).score([[0.0, 0.0], [5.0, 0.1]])
        >>> scores.rank.tolist(), scores.top(1)[0].drivers[0].column
        ([1.0, 0.0], 'x1')
        """
        return score(self, samples, top, seed, missing)

    @typed
    @plain_modes()
    def linear_response(self, columns: Sequence[int | str] | None = None, *, target: Any = None) -> Float[Tensor, "k d"]:
        """Return rows of the covariance that a mean-field fit by reverse KL implies: the response of its means to a tilt of p.

        Mean field makes columns independent, and too narrow if they are correlated. Σ = [∇² (−ELBO)]⁻¹, in the rows and columns
        of the means, has their correlations and spreads: exactly for a Gaussian target, to first order for others.

        Args:
            columns: names or numbers of the rows; by default all, up to 500 dimensions.
            target: what was fitted, for a loaded fit.

        Returns:
            Rows of Σ in the order of `columns`, in the squared units of x; if the target has a support other than ℝᵈ, in free
            coordinates (those of `diagnostics.optima`), whose columns have only numbers unless there are d of them.

        Raises:
            InputError: it's another fit, a column isn't known, or all of more than 500 columns are requested.
            TargetError: there is no target, the fit isn't a minimum, or the equations can't be solved to nine digits.

        Source: Giordano, Broderick & Jordan (2018); Giordano, Ingram & Broderick (2024).

        >>> from whichkl import fit
        >>> tilted = Target(log_prob=lambda x: -(x[:, 0] ** 2 + x[:, 1] ** 2 - 1.2 * x[:, 0] * x[:, 1]) / 1.28, dim=2)
        >>> mean_field = fit(tilted, "gaussian:diagonal")
        >>> mean_field.model.variance, mean_field.linear_response(["x1"])
        (tensor([0.6400, 0.6400], dtype=torch.float64), tensor([[1.0000, 0.6000]], dtype=torch.float64))
        """
        p = self.target if target is None else Target.of(target)
        return responses(p, self.family, self.objective, self.diagnostics, columns, self.seed)

    def _weighted(self, n: int, seed: int, target: Target | None) -> Weighted:
        p = self.target if target is None else Target.of(target)
        d, misses = self.diagnostics, None
        if "modes_missing" in self.findings or d.leaves_optima_out:
            misses = "modes"
        elif d.weights_miss_mass:
            misses = f"{d.beyond:.0%} of p or more, where its draws hardly come"
        with shown_progress("correcting draws of the fit"):
            return corrected_points(p, self.model, n, seed, misses=misses)

    @typed
    @with_progress("checking the fit")
    @plain_modes()
    def check(self, *, target: Any = None, tell: Callable[[str, float], None] | None = None) -> Fit:
        """Return this fit with everything measured, also what `fit` left out so that judging costs no more than the fit.

        That is what `diagnostics.left_out` lists: after `judge=False` nearly everything; otherwise unseen rows beyond the first
        thousands, neighbouring families on more rows, and, for a costly log density, more draws and particles. The model stays.

        Args:
            target: what was fitted, for a loaded fit.
            tell: called with the current step and the fraction of it that is done, for a progress bar.

        Raises:
            TargetError: a loaded fit gets no target, or the log density is broken.

        >>> from whichkl import fit
        >>> found = fit(Target(samples=[[0.1], [1.3], [-0.4], [0.6], [2.0], [-1.2]] * 10), judge=False)
        >>> found.diagnostics.held_out, found.check().diagnostics.held_out is None
        (None, False)
        """
        return checked(self, target, tell)

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the parameters, as JSON can hold it."""
        return {
            "format": FORMAT,
            "family": self.family.config(),
            "objective": self.objective.spec,
            "solver": self.solver,
            "status": self.status,
            "findings": sorted(self.findings),
            "explanations": list(self.explanations),
            "value": self.value.to_dict(),
            "diagnostics": self.diagnostics.to_dict(),
            "access": self.advice.access.label,
            "names": list(self.names),
            "support": self.bijection.describe(),
            "seed": self.seed,
            "summary": self.summary().to_dict() if len(self.summary().rows) <= _MAX_SAVED_ROWS else None,
            **({"context_names": list(self.context_names)} if self.context_names else {}),
            **({} if self.reading.is_default else {"reading": asdict(self.reading)}),
            **({} if self.advice.origin is None else {"origin": self.advice.origin.to_dict()}),
        }

    @typed
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `fit.json` and the weights that it names (every optimum's parameters, in free coordinates).

        An earlier fit in that folder is replaced in one step, when the new `fit.json` gets its name. If the process is killed
        before, the earlier fit is unchanged. Processes that save into one folder wait for each other.

        Raises:
            InputError: the folder holds anything but a fit.
            ResourceError: it can't be written.
        """
        FIT.write(Path(folder), self.files())

    @plain_modes()
    def files(self) -> dict[str, bytes]:
        """Return the files that `save` writes: the weights, and `fit.json`, which names them."""
        models = [one.model for one in self.diagnostics.optima]
        tensors = {f"{i}.{name}": part for i, one in enumerate(models) for name, part in self.family.parameters(one).items()}
        return FIT.files(self.to_dict(), tensors)

    @classmethod
    @typed
    @plain_modes()
    def load(cls, folder: str | os.PathLike[str], family: Family | nn.Module | None = None) -> Fit:
        """Read a saved fit.

        Args:
            folder: what `save` was given, or the `--out` folder of `whichkl fit`.
            family: the family or the module, if it isn't one of this library.

        Raises:
            InputError: there is no fit in that folder.
            IntegrityError: a file was changed, cut short, or written by a newer version, or holds impossible values.
            ResourceError: a file can't be read.
        """
        path = Path(folder)
        path = path / "fit" if (path / "fit").is_dir() and not (path / FIT.file).exists() else path
        fields, tensors = FIT.read(path, FitFields)
        is_given = family is not None or fields["family"].get("family") == "Module"
        try:
            chosen = family_from_config(fields["family"]) if family is None else family_of(family)
            return cls(**rebuilt(fields, tensors, chosen))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, IntegrityError) or (is_given and isinstance(error, WhichklError)):
                raise
            raise FIT.damaged(path, " ".join(str(error).split())[:300]) from error
