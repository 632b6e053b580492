"""Scoring: log densities of new rows under a fit, their ranks among the model's own draws, and the columns that drive them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, TargetError, as_int, cannot, check_seed, quoted
from whichkl.arrays import read_matrix
from whichkl.families.family import log_likelihood
from whichkl.fitting.scores import Driver, ScoredRow, Scores, Strangest
from whichkl.process.seeds import seeded
from whichkl.process.torch_modes import plain_modes
from whichkl.samples import Shards, Table, TableError, open_stream
from whichkl.samples.reading import UNKNOWN
from whichkl.samples.table import as_frame, column_names, is_frame, read_array, read_frame
from whichkl.solvers.work import QUIET

if TYPE_CHECKING:
    from whichkl.fitting.result import Fit

_DRAWS = 10_000
"""Number of draws that ranks count."""
_DRAWS_PER_ROW = 1_000
"""The same for q(y|x), which is another law for each row."""
_VALUES_PER_COLUMN = 200
"""Number of values of a column among which a driver's best is searched."""
_MAX_NUMBERS_AT_ONCE = 2**22
"""Largest number of values of a batch of draws, 32 MB."""
_ROWS_AT_ONCE = 16_384
_MAX_LABEL_SHOWN = 60
"""Number of characters after which a label is cut off."""
_ROUNDING = 1e3
"""Rounding of a log density, in units of the last place."""
_PER_ROW = ("numbers", "x", "log_density", "rank")
"""Fields of a block that have one entry per row."""


class ScoredBlock(NamedTuple):
    """Rows of one source with their scores."""

    source: str
    """The file, where there are several; else ``""``."""
    unit: str
    """What `numbers` counts: ``"line"`` or ``"row"``."""
    numbers: Int[np.ndarray, " m"]
    x: Float[Tensor, "m k"]
    """The columns of x, then those of y."""
    log_density: Float[Tensor, " m"]
    rank: Float[Tensor, " m"]
    left_out: int = 0
    """The number of rows before or among these that were left out."""


@dataclass(frozen=True)
class Scorer:
    """Scores rows under one fit."""

    fit: Fit
    seed: int = 0
    others: dict[str, list[str]] = field(default_factory=dict)
    """The labels of each category that the fit doesn't know."""

    @property
    def draws(self) -> int:
        """How many draws a rank counts."""
        return _DRAWS if isinstance(self.fit.model, Distribution) else _DRAWS_PER_ROW

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that a row needs: those of x, then those of y."""
        return (*self.fit.context_names, *self.fit.names)

    def blocks(self, source: Any) -> Iterator[ScoredBlock]:
        """Score the rows of what `opened` returned, block by block."""
        if isinstance(source, Table):
            rows = torch.from_numpy(source.values)
            numbers = np.arange(len(rows)) if source.numbers is None else source.numbers
            for i in range(0, len(rows), _ROWS_AT_ONCE):
                scored = self._scored("", "row", numbers[i : i + _ROWS_AT_ONCE], rows[i : i + _ROWS_AT_ONCE])
                yield scored._replace(left_out=0 if i else source.left_out)
            return
        for part in source.parts:
            file = os.path.basename(part.path) if len(source.shards) > 1 else ""
            for block, numbers in part.numbered():
                scored = self._scored(file, part.unit, numbers, block.x)
                yield scored._replace(left_out=block.left_out)

    def opened(self, samples: Any, missing: str | None = None) -> tuple[Table | Shards, tuple[str, ...]]:
        """Open rows by the names of the fit's columns, and return them with the names of their other columns.

        Raises:
            InputError: a column of the fit is missing, or a cell isn't a number.
        """
        reading = self.fit.reading
        if missing not in (None, "refuse", "drop"):
            raise InputError(cannot(f"use `missing={missing!r}`", "it is 'refuse' or 'drop'", "Choose one of them"))
        reading = replace(reading, columns=self.names, drop=(), missing=missing or reading.missing, others=self.others)
        if self.fit.names and not self.fit.context_names and not isinstance(self.fit.model, Distribution):
            because = "it was saved without the names of its columns of x"
            raise InputError(cannot("score rows by this fit", because, "Fit again"))
        samples = samples if getattr(samples, "name", None) is None else as_frame(samples)
        if is_frame(samples):
            table = read_frame(samples, reading)
            return table, tuple(name for name in column_names(samples) if name not in self.names)
        if isinstance(samples, tuple) and len(samples) == 2 and self.fit.context_names:
            samples = torch.cat([read_matrix(one) for one in samples], 1)
        if _are_paths(samples):
            stream: Any = open_stream(samples, reading)
            return stream, stream.unused
        x = read_matrix(samples)
        if x.shape[1] != len(self.names):
            found = f"they have {x.shape[1]} column{'s' * (x.shape[1] != 1)}"
            because = f"{found}, and the fit has {len(self.names)}: {', '.join(self.names[:20])}"
            raise InputError(cannot("score these rows", because, "Give these columns in this order, or a DataFrame with names"))
        return read_array(x, self.names, replace(reading, thousands="", categories={})), ()

    def row(self, block: ScoredBlock) -> ScoredRow:
        """Describe the only row of a block, with its drivers."""
        log_density, (x,) = float(block.log_density), block.x
        values = {name: self._shown(name, float(v)) for name, v in zip(self.names, x, strict=True)}
        found = [Driver(name, values[name], gain) for name, gain in self._gains(x, log_density) if gain > 0]
        place = f"{block.unit} {int(block.numbers[0])}" + (f" of {block.source}" if block.source else "")
        drivers = tuple(sorted(found, key=lambda one: -one.gain))
        return ScoredRow(place, log_density, float(block.rank), values, drivers)

    def _shown(self, name: str, value: float) -> float | str:
        labels = self.fit.reading.categories.get(name)
        if labels is None:
            return value
        if value in range(len(labels)):
            return labels[int(value)]
        others, place = self.others.get(name, []), int(UNKNOWN - 1 - value)
        if not 0 <= place < len(others):
            return "a label unknown to the fit"
        other = others[place]
        return f"{other[:_MAX_LABEL_SHOWN] + '…' * (len(other) > _MAX_LABEL_SHOWN)!r}, unknown to the fit"

    def _scored(self, source: str, unit: str, numbers: np.ndarray, x: Float[Tensor, "m k"]) -> ScoredBlock:
        if len(x) == 0:
            return ScoredBlock(source, unit, numbers, x, x.new_empty(0), x.new_empty(0))
        context, y = self._split(x)
        log_density = self._log_density(y, context)
        if bool(log_density.isnan().any()):
            row = int(numbers[int(log_density.isnan().nonzero()[0, 0])])
            because = f"the log density of {unit} {row} isn't a number"
            raise TargetError(cannot("score these rows", because, "Drop that row"))
        rank = self._rank(log_density) if context is None else self._conditional_rank(log_density, context)
        rank = torch.where(log_density == -math.inf, 0.0, rank)
        return ScoredBlock(source, unit, numbers, x, log_density, rank)

    def _split(self, x: Float[Tensor, "m k"]) -> tuple[Float[Tensor, "m c"] | None, Float[Tensor, "m d"]]:
        count = len(self.fit.context_names)
        return (x[:, :count] if count else None), x[:, count:]

    def _log_density(self, y: Float[Tensor, "m d"], context: Float[Tensor, "m c"] | None) -> Float[Tensor, " m"]:
        y = y.to(self._example)
        if context is None and self.fit.model.event_shape == ():
            y = y[:, 0]
        return log_likelihood(self.fit.model, y, context).detach().to("cpu", torch.float64)

    @cached_property
    def _example(self) -> Tensor:
        """A draw, which has the dtype and the device of the model."""
        if isinstance(self.fit.model, Distribution):
            return self._own_draws
        with seeded(self.seed):
            law: Tensor = self.fit.model(torch.zeros(1, len(self.fit.context_names), dtype=torch.float64, device="cpu")).sample()
        return law if law.is_floating_point() else law.double()

    @cached_property
    def _own_draws(self) -> Float[Tensor, "n d"]:
        with seeded(self.seed):
            x: Tensor = self.fit.model.sample((_DRAWS,))
        return (x if x.is_floating_point() else x.double()).reshape(_DRAWS, -1)

    @cached_property
    def _reference(self) -> Float[Tensor, " n"]:
        """The sorted log densities of the model's own draws."""
        return self._log_density(self._own_draws, None).sort().values

    def _rank(self, log_density: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        return torch.searchsorted(self._reference, self._raised(log_density), right=True).double() / _DRAWS

    def _conditional_rank(self, log_density: Float[Tensor, " m"], context: Float[Tensor, "m c"]) -> Float[Tensor, " m"]:
        """Return the share of draws y ~ q(y|x) at each row's own x whose log density is lower or equal."""
        raised = self._raised(log_density)
        step = max(1, _MAX_NUMBERS_AT_ONCE // (_DRAWS_PER_ROW * len(self.fit.names)))
        ranks = []
        for i in range(0, len(context), step):
            law = self._law(context[i : i + step])
            with seeded(self.seed):
                own = law.log_prob(law.sample((_DRAWS_PER_ROW,))).detach().to("cpu", torch.float64)
            ranks.append((own <= raised[i : i + step]).double().mean(0))
        return torch.cat(ranks)

    def _raised(self, log_density: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Raise log densities by their rounding, so that a draw equal to a row counts whatever batch it was computed in."""
        return log_density + _ROUNDING * torch.finfo(self._example.dtype).eps * (1 + log_density.abs())

    def _law(self, context: Float[Tensor, "m c"]) -> Any:
        law = self.fit.model(context)
        return law.expand((len(context),)) if law.batch_shape == () else law

    def _gains(self, x: Float[Tensor, " k"], log_density: float) -> Iterator[tuple[str, float]]:
        """Yield each column of y and its gain: max over v of log q(x with v there) − log q(x), at least 0.

        The v are the column's values in `_VALUES_PER_COLUMN` of the model's draws, at the row's own x if the fit is conditional.
        If no column alone brings a row back into the support, the gain is ∞ for each whose value takes all these draws out of it.
        """
        context, y = self._split(x[None])
        if context is None:
            draws = self._own_draws[:_VALUES_PER_COLUMN]
        else:
            with seeded(self.seed):
                draws = self._law(context).sample((_VALUES_PER_COLUMN,)).reshape(_VALUES_PER_COLUMN, -1)
        rows, draws = y.expand(len(draws), -1), draws.to(y)
        best = self._best_with(rows, draws, context)
        gains = [max(0.0, value - log_density) if value > -math.inf else 0.0 for value in best]
        if log_density == -math.inf and not any(gains):
            gains = [math.inf if value == -math.inf else 0.0 for value in self._best_with(draws, rows, context)]
        yield from zip(self.fit.names, gains, strict=True)

    def _best_with(
        self, rows: Float[Tensor, "m d"], values: Float[Tensor, "m d"], context: Float[Tensor, "1 c"] | None
    ) -> list[float]:
        """Return, per column, the largest log density of these rows with the column's values from others."""
        count, best = len(rows), list[float]()
        step = max(1, _MAX_NUMBERS_AT_ONCE // rows.numel())
        for first in range(0, rows.shape[1], step):
            columns = range(first, min(first + step, rows.shape[1]))
            changed = rows.repeat(len(columns), 1)
            for i, column in enumerate(columns):
                changed[i * count : (i + 1) * count, column] = values[:, column]
            at = None if context is None else context.expand(len(changed), -1)
            best += self._log_density(changed, at).reshape(len(columns), count).amax(1).tolist()
        return best


@plain_modes()
def score_blocks(
    fit: Fit,
    samples: Any,
    take: Callable[[ScoredBlock], None],
    *,
    top: int,
    seed: int,
    missing: str | None,
    tell: Callable[[str, float], None] = QUIET.tell,
) -> Strangest:
    """Score rows block by block, in memory that doesn't grow with the rows of files.

    Args:
        fit: the fit.
        samples: what `Fit.score` takes.
        take: gets each block with its scores.
        top: how many of the strangest rows are described.
        seed: fixes the draws.
        missing: ``"refuse"`` or ``"drop"``; by default as in the fit.
        tell: called with the current step and the fraction of it that is done.

    Raises:
        InputError: a column of the fit is missing, a cell isn't a number, or there are no rows.
    """
    tell("opening the rows", math.nan)
    scorer, kept, count, outside, left_out = Scorer(fit, seed), list[ScoredBlock](), 0, 0, 0
    with torch.no_grad(), _naming_cells():
        source, unused = scorer.opened(samples, missing)
        for block in scorer.blocks(source):
            tell(f"scoring, {count:,} rows done", math.nan)
            take(block)
            order = torch.argsort(block.log_density, stable=True)[:top].tolist()
            # a list as index copies, so that the block can be freed
            alone = [block._replace(**{name: getattr(block, name)[[i]] for name in _PER_ROW}) for i in order]
            kept = sorted([*kept, *alone], key=lambda one: float(one.log_density))[:top]  # of equal ones the first are kept
            count, left_out = count + len(block.numbers), left_out + block.left_out
            outside += int((block.log_density == -math.inf).sum())
        if count == 0:
            raise InputError(cannot("score these rows", "there are none", "Give at least one row without missing cells"))
        notes = [f"columns that the fit doesn't have were ignored: {quoted(unused)}"] if unused else []
        notes += [f"rows left out, since a cell is missing: {left_out:,} of {count + left_out:,}"] if left_out else []
        return Strangest(count, outside, scorer.draws, tuple(map(scorer.row, kept)), tuple(notes))


def score(fit: Fit, samples: Any, top: int, seed: int, missing: str | None) -> Scores:
    """Score rows; see `Fit.score`."""
    top, seed = as_int(top), check_seed(seed)
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise InputError(cannot(f"score with `top={top!r}`", "it isn't a whole number of at least 0", "Give, say, top=20"))
    blocks: list[tuple[Tensor, Tensor, np.ndarray]] = []
    take = lambda block: blocks.append((block.log_density, block.rank, block.numbers))  # noqa: E731
    found = score_blocks(fit, samples, take, top=top, seed=seed, missing=missing)
    log_density, rank, numbers = zip(*blocks, strict=True)
    return Scores(torch.cat(log_density), torch.cat(rank), np.concatenate(numbers), found.rows, found.draws, found.notes)


@contextmanager
def _naming_cells() -> Iterator[None]:
    """In errors about cells, leave out the advice that isn't for scoring: the fit needs all its columns."""
    try:
        yield
    except TableError as error:
        able = {name: value for name, value in error.keywords.items() if name == "missing"}
        kinds = "" if set(error.keywords) == set(able) and not error.otherwise else "correct these cells"
        raise TableError.of(error.do, error.because, able, kinds, "{}") from error


def _are_paths(samples: Any) -> bool:
    several = samples if isinstance(samples, list) and samples else [samples]
    return all(isinstance(one, (str, os.PathLike)) for one in several)
