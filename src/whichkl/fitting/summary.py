"""Summary: a fit as a table: each coordinate under q and, where weights can be trusted, under p; coefficients of q(y|x)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, cannot, plain, quoted
from whichkl.adapters import Model
from whichkl.diagnostics import carried, model_target
from whichkl.diagnostics.result import draws_in
from whichkl.families import Mixture
from whichkl.fitting.coefficients import coefficients
from whichkl.fitting.moments import Moments, moments_of, weighted_moments
from whichkl.goodness.draws import drawn
from whichkl.importance import MIN_SHARE_OF_DRAWS, effective_sample_size, khat_limit, pareto_smooth
from whichkl.printable import HTML, one_line, shorten
from whichkl.targets import Target
from whichkl.targets.origin import Origin

if TYPE_CHECKING:
    from whichkl.fitting.result import Fit

MAX_ROWS = 20
"""Largest number of rows that are printed."""
_MAX_NAME_LENGTH = 24
_MAX_DECIMALS = 8
_MAX_PLAIN = 1e7
"""Size from which on numbers are printed with an exponent."""
_MAX_NUMBERS = 1 << 24
"""Largest number of draws times numbers of an adapted model's variables; beyond, rows are free coordinates."""
Points = tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]
_HEADS = {"low": "2.5 %", "high": "97.5 %", "stderr": "std err"}
_OF_P = "p_"


@dataclass(frozen=True)
class Summary(HTML):
    """A table of a fit; it prints aligned, with the first 20 rows.

    For q(x) a row is a coordinate of the target, or a number of a NumPyro model's own variables: `mean`, `sd`, `low` and `high`
    (the equal-tailed 95 % interval) under q, and `mcse`, the Monte Carlo standard error of the mean, 0 for a closed form. The
    same with `p_` are corrected to p by importance weights. A mixture has further rows, a coordinate in a component each,
    with the component's `weight`. For q(y|x) with linear predictors a row is a coefficient: `coef`, `stderr`, and `low` and
    `high`, the 95 % interval by the normal approximation.
    """

    columns: tuple[str, ...]
    """Names of the numbers, in their order."""
    rows: tuple[dict[str, float | str | None], ...]
    """Every row: `name`, and a number or None for each of `columns`."""
    notes: tuple[str, ...] = ()
    """Sentences on how the numbers were computed, and on why some are missing."""

    def __post_init__(self) -> None:
        """Keep names that a file can't tell from numbers, such as `inf`, as text."""
        if not all({"name", *self.columns} <= row.keys() for row in self.rows):
            raise ValueError("a row of the table lacks one of its numbers")
        rows = tuple({"name": str(row["name"]), **{key: row[key] for key in self.columns}} for row in self.rows)
        object.__setattr__(self, "rows", rows)

    @property
    def heads(self) -> tuple[str, ...]:
        """What is printed above the columns."""
        return tuple(
            _HEADS.get(one, one) if not one.startswith(_OF_P) else f"p {_HEADS.get(one[2:], one[2:])}" for one in self.columns
        )

    def cells(self, most: int | None = None) -> list[list[str]]:
        """Return the first rows as text: the name, and each number to the digits that its spread deserves."""
        return [[one_line(str(row["name"])), *_texts(row, self.columns)] for row in self.rows[:most]]

    def lines(self, most: int = MAX_ROWS) -> list[str]:
        """Return the table as aligned lines of the first rows, without the notes; none if there are no rows."""
        if not self.rows:
            return []
        table = [["", *self.heads], *([shorten(name, _MAX_NAME_LENGTH), *numbers] for name, *numbers in self.cells(most))]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
        more = len(self.rows) - most
        return lines if more <= 0 else [*lines, f"… {more:,} more rows: `summary().rows` has all {len(self.rows):,}"]

    def __str__(self) -> str:
        return "\n".join([*self.lines(), *self.notes])

    def __repr__(self) -> str:
        return f"Summary({len(self.rows)} rows of {', '.join(self.columns)})"

    def to_dict(self) -> dict[str, Any]:
        """Return columns, rows and notes as JSON can hold them."""
        fields: dict[str, Any] = plain({"columns": list(self.columns), "rows": list(self.rows), "notes": list(self.notes)})
        return fields

    def to_frame(self) -> Any:
        """Return a pandas DataFrame with a row per name.

        Raises:
            InputError: pandas isn't installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ModuleNotFoundError as error:
            because = "pandas isn't installed"
            raise InputError(cannot("make a DataFrame", because, "Run: pip install pandas, or read `.rows`")) from error
        return pandas.DataFrame(list(self.rows), columns=["name", *self.columns]).set_index("name")


def summarize(fit: Fit, target: Target | None = None) -> Summary:
    """Return the table of a fit; with `target`, its log density is evaluated for the columns of p.

    Raises:
        TargetError: the log density of `target` is broken.
    """
    if not isinstance(fit.model, Distribution):
        return Summary(*coefficients(fit))
    try:
        return _of_coordinates(fit, _weighted(fit, target), fit.target if target is None else target)
    except Exception as error:  # a user's model may do anything, and a fit must print and be saved
        if target is not None:
            raise
        return Summary((), (), (f"No table: {shorten(one_line(str(error)), 200)}.",))


def _of_coordinates(fit: Fit, weighted: Points | str, target: Target | None) -> Summary:
    """Return a row per coordinate; of an adapted library's model, a row per number of its own variables."""
    names, own = fit.names, None if target is None or isinstance(target.origin, Origin) else target.origin
    if own is not None and _MAX_NUMBERS < draws_in(len(names)) * len(
        own_variables(own, torch.zeros(1, len(names), dtype=torch.float64, device="cpu"))[0]
    ):
        own = None
    if own is None:
        moments = moments_of(fit.model, len(names), fit.seed)
    else:
        names, x = own_variables(own, drawn(fit.model, (draws_in(len(names)),), len(names), fit.seed))
        moments = weighted_moments(x, torch.full_like(x[:, 0], -math.log(len(x))))
    columns, unseen = _columns(moments), list[int]()
    notes = ["2.5 % to 97.5 % is the equal-tailed 95 % interval under q."]
    if not isinstance(weighted, str):
        x, log_weights = weighted
        x = x if own is None else own_variables(own, x)[1]
        of_p, unseen = weighted_moments(x, log_weights), _without_second_moment(x, log_weights)
        columns |= {f"{_OF_P}{key}": values for key, values in _columns(of_p, has_error=True).items()}
        notes = ["2.5 % to 97.5 % is the equal-tailed 95 % interval, under q, and under p by importance weights."]
        if unseen:
            which = quoted([names[i] for i in unseen], 3)
            notes.append(f"Not of p for {which}: weights times squares have a heavy tail. `fit.expect(f)` moves particles to p.")
    elif weighted:
        notes.append(f"The table has no columns for p: {weighted}.")
    rows, keys = _rows(names, columns), list(columns)
    for i in unseen:
        rows[i].update({key: None for key in keys if key.startswith(_OF_P)})
    rows = _with_labels(fit, rows) if fit.reading.categories else rows
    if isinstance(fit.family, Mixture) and own is None:
        rows, keys = [{**row, "weight": 1.0} for row in rows] + _component_rows(fit, keys), ["weight", *keys]
        notes.append(f"{names[0]}[0] is {names[0]} in component 0, and `weight` is that component's share.")
    return Summary(tuple(keys), tuple({"name": row["name"], **{key: row.get(key) for key in keys}} for row in rows), tuple(notes))


def _with_labels(fit: Fit, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put a row per label in the place of a column of categories: its probability, the mean of 1 for that label and 0 else."""
    laws, found = fit.model.laws, list[dict[str, Any]]()
    for row, law in zip(rows, laws, strict=True):
        labels = fit.reading.categories.get(row["name"])
        chances = zip(labels, law.probs.tolist(), strict=True) if labels else ()
        found += [{"name": f"{row['name']} = {one}", "mean": p} for one, p in chances] or [row]
    return found


def own_variables(model: Model, u: Float[Tensor, "n d"]) -> tuple[tuple[str, ...], Float[Tensor, "n k"]]:
    """Return the names of all numbers of an adapted model's variables, such as ``theta[2]``, and their values at each row."""
    names, columns = [], []
    for name, value in model.constrain(u).items():
        rows = torch.as_tensor(np.asarray(value), dtype=torch.float64, device="cpu")
        places = np.ndindex(*rows.shape[1:])
        names += [name if not place else f"{name}[{', '.join(map(str, place))}]" for place in places]
        columns.append(rows.reshape(len(u), -1))
    return tuple(names), torch.cat(columns, 1)


def _weighted(fit: Fit, target: Target | None) -> Points | str:
    """Return draws of q with normalised log weights, or the reason why there are none; ``""`` if p has no log density.

    The weights are those that judged the fit, or, if `target` is given, new ones.
    """
    d = fit.diagnostics
    p = fit.target if target is None else target
    if p is None or p.density is None:
        return ""
    if "modes_missing" in fit.findings or d.leaves_optima_out:
        return "q misses modes, which weights can't see; `fit.expect(f)` moves particles to p"
    if d.weights_miss_mass:
        return "p has mass where its weights hardly come; `fit.expect(f)` moves particles to p"
    if target is None and d.log_weights is None:
        return "the weights weren't measured"
    q = model_target(fit.model, p)
    log_weights = d.log_weights
    x = q.draws(draws_in(q.dim) if log_weights is None else len(log_weights), fit.seed + 1)  # the draws that judged the fit
    if target is not None or log_weights is None:
        log_weights = (p.log_prob(x).double() - q.log_prob(x).double()).detach().cpu()
    if not bool((log_weights > -math.inf).any()):
        return "p is 0 at every draw of q"
    smoothed, khat = pareto_smooth(log_weights)
    limit = khat_limit(len(x))
    if khat > limit and effective_sample_size(smoothed) < MIN_SHARE_OF_DRAWS * len(x):
        return f"the weights' PSIS k̂ is {khat:.2f}, above {limit:.2f}; `fit.expect(f)` moves particles to p"
    return x, smoothed


def _without_second_moment(x: Float[Tensor, "n k"], log_weights: Float[Tensor, " n"]) -> list[int]:
    """Return the columns whose squares have a heavy tail under the weights, so that a standard deviation would be too small.

    Weights may have a light tail where weights times squares have none.

    Source: Vehtari, Simpson, Gelman, Yao & Gabry (2024), Pareto smoothed importance sampling: k̂ of one function.
    """
    if effective_sample_size(log_weights) >= MIN_SHARE_OF_DRAWS * len(x):
        return []
    x = x.detach().to(log_weights)
    squares = 2 * (x - log_weights.exp() @ x).abs().log()
    return [i for i, one in enumerate(squares.T) if pareto_smooth(log_weights + one)[1] > khat_limit(len(x))]


def _columns(moments: Moments, *, has_error: bool = False) -> dict[str, Sequence[float]]:
    """Return the columns by name; that of the Monte Carlo error only where there is one."""
    names = ["mean", "sd", "low", "high"] + (["mcse"] if has_error or any(moments.mcse) else [])
    return {name: getattr(moments, name) for name in names}


def _rows(names: Sequence[str], columns: dict[str, Sequence[float]]) -> list[dict[str, Any]]:
    return [{"name": name, **{key: values[i] for key, values in columns.items()}} for i, name in enumerate(names)]


def _component_rows(fit: Fit, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row per coordinate and component, in the order of `fit.model`'s components."""
    parameters = fit.family.parameters(fit.diagnostics.optima[0].model)
    rows = []
    for k, weight in enumerate(parameters["probs"].tolist()):
        one = {name: value[k : k + 1] for name, value in parameters.items()} | {"probs": torch.ones_like(parameters["probs"][:1])}
        law = carried(fit.family.model(one), fit.bijection)
        columns = _columns(moments_of(law, len(fit.names), fit.seed), has_error="mcse" in keys)
        rows += [{**row, "weight": weight} for row in _rows([f"{name}[{k}]" for name in fit.names], columns)]
    return rows


def _texts(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Return the numbers of a row; those of q and those of p have as many decimals as four digits of the spread need."""
    spread = next((row[one] for one in ("sd", "stderr") if row.get(one)), None)
    decimals = 4
    if spread is not None and 0 < spread < math.inf:
        decimals = max(0, 3 - math.floor(math.log10(float(f"{spread:.3e}"))))
    return [_text(row[one], decimals if one != "weight" else 3) for one in columns]


def _text(value: float | None, decimals: int) -> str:
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if decimals > _MAX_DECIMALS or abs(value) >= _MAX_PLAIN:
        return f"{value:.4g}"
    return f"{round(value, decimals) + 0.0:.{decimals}f}"
