"""Two-sample test: whether a classifier can distinguish unseen rows from the model's draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import one_hot

from whichkl.divergences.samples.logistic import MIN_ROWS, cosines, cross_fit
from whichkl.divergences.samples.neighbors import Neighbors
from whichkl.files.reading import rebuilt
from whichkl.goodness.draws import Unable, drawn, equal_rows, law_at
from whichkl.printable import brief
from whichkl.process.torch_modes import plain_modes

MAX_ROWS_COMPARED = 4_000
_MAX_FEATURES = 500
_MAX_CLASSES = 20
_LEVEL = 0.01


@dataclass(frozen=True)
class TwoSample:
    """The result of a classifier of rows of p against draws of q; the numbers are None where there is a `reason`."""

    __repr__ = brief

    auc: float | None
    """The chance that a row of p is ranked above a draw of q: 1/2 where they can't be distinguished."""
    stderr: float | None
    p_value: float | None
    """The chance of this AUC or a better one if the model were right."""
    rows: int = 0
    """Rows of p that the classifier was tested on; it was trained on the same number of others."""
    draws: int = 0
    """Draws of q that it was tested on."""
    method: str = ""
    reason: str | None = None
    of_pairs: bool = False
    """Whether rows were compared in pairs: `auc` is then the share of right answers, and the p-value is that of signed ranks."""

    @property
    def differs(self) -> bool:
        """Whether the test rejects at 1 %."""
        return self.p_value is not None and self.p_value < _LEVEL

    def __str__(self) -> str:
        """One sentence."""
        if self.auc is None or self.p_value is None:
            return f"No classifier test: {self.reason}."
        can = "can" if self.differs else "can't"
        level = f"{'below' if self.differs else 'not below'} {_LEVEL:g}"
        return f"A classifier {can} tell unseen rows from the model's draws: {self.number} (chance: 0.5), {self.chance}, {level}."

    @property
    def number(self) -> str:
        """The AUC, such as ``"AUC 0.516 ± 0.026"``; for pairs, the share of right answers."""
        return f"{'right pairs' if self.of_pairs else 'AUC'} {self.auc:.3f} ± {self.stderr:.3f}"

    @property
    def chance(self) -> str:
        """The p-value, such as ``"p = 0.26"``; for pairs, that of signed ranks."""
        return f"p = {self.p_value:.2g}{' by signed ranks' if self.of_pairs else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TwoSample:
        """Read back what `to_dict` wrote."""
        return rebuilt(cls, fields)


@plain_modes()
def two_sample_test(
    x: Float[Tensor, "n d"],
    w: Float[Tensor, " n"] | None,
    context: Float[Tensor, "n c"] | None,
    model: Any,
    seed: int = 0,
    most: int = MAX_ROWS_COMPARED,
) -> TwoSample:
    """Test a model on rows that it has not seen, by `c2st` against its draws; `reason` tells why a test can't be made.

    A conditional model draws one y′ ~ q(·|x) per pair (x, y), and the classifier must decide which of the two is real. Its
    features of y are the standardised residual r under q, r², the products of both with the columns of x, and their squares.

    Args:
        x: rows of p, in the coordinates of the model.
        w: their weights: a row stays with chance w / max w. Or None.
        context: what each row is conditioned on, or None.
        model: a `Distribution`, or a function of contexts that returns one.
        seed: for draws, halves and the classifier.
        most: largest number of rows and of draws that are used, up to 4,000.

    >>> law = torch.distributions.Normal(torch.zeros(2), 1).expand([2])
    >>> law = torch.distributions.Independent(law, 1)
    >>> x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    >>> two_sample_test(x, None, None, law).differs, two_sample_test(2 * x, None, None, law).differs
    (False, True)
    """
    try:
        x, context = equal_rows(x, w, context, most, seed)
        if len(x) < MIN_ROWS:
            raise Unable(f"{len(x)} unseen rows of equal weight are too few; at least {MIN_ROWS} are needed")
        if context is None:
            return _c2st(x, drawn(model, (min(most, 4 * len(x)),), x.shape[1], seed + 1), seed)
        law = law_at(model, context)
        return _paired(context, x, drawn(law, (), x.shape[1], seed + 1), law, seed)
    except Unable as error:
        return TwoSample(None, None, None, reason=str(error))


@plain_modes()
def c2st(x_held: Float[Tensor, "n d"], model_draws: Float[Tensor, "m d"], seed: int = 0) -> TwoSample:
    """Classifier two-sample test: learn x from draws on one half of the rows, and rank the other half by its logit.

    AUC = P(logit of a row of p > logit of a draw of q), with its error by DeLong and its p-value by Mann and Whitney. Given the
    classifier, the rows of the other half are exchangeable where p = q, so that the p-value is uniform. (Cross-fitted AUCs share
    rows, and their mean varies twice as much as it seems.) The classifier is that of the divergences: ridge logistic regression
    on normal scores of the columns, their squares, products and waves along random directions, and the labels of nearest
    neighbours.

    Args:
        x_held: rows of p that the model was not fitted on; at most 4,000 are used.
        model_draws: draws of q, at most 4,000.
        seed: for halves and the classifier.

    Source: Lopez-Paz & Oquab (2017); DeLong, DeLong & Clarke-Pearson (1988); neighbours: Schilling (1986).

    >>> x, y = torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(0))
    >>> print(c2st(x, y))
    A classifier can't tell unseen rows from the model's draws: AUC 0.516 ± 0.026 (chance: 0.5), p = 0.26, not below 0.01.
    """
    try:
        return _c2st(x_held, model_draws, seed)
    except Unable as error:
        return TwoSample(None, None, None, reason=str(error))


def _c2st(x: Tensor, y: Tensor, seed: int) -> TwoSample:
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(len(part), generator=generator, device="cpu")[:MAX_ROWS_COMPARED] for part in (x, y)]
    x, y = (part.to("cpu", torch.float64)[rows] for part, rows in zip((x, y), chosen, strict=True))
    if min(len(x), len(y)) < MIN_ROWS:
        raise Unable(f"at least {MIN_ROWS} rows of each are needed, and there are {len(x)} and {len(y)}")
    n, z = len(x), _scores(torch.cat([x, y]))
    if z.shape[1] == 0:
        raise Unable("every column is constant")
    half = torch.cat([(torch.arange(len(part), device="cpu") < (len(part) + 1) // 2).long() for part in (x, y)])
    more = torch.cat([_waves(z, generator), _around(z, n, half == 1)], 1)
    full = z.shape[1] * (z.shape[1] + 3) // 2 <= min(min(n, len(y)) // 10, _MAX_FEATURES)
    logit, _ = cross_fit(z, n, 2, full, generator, rounds=1, more=more, fold=half)
    ours, theirs = (part[half[side] == 0].numpy() for part, side in ((logit[:n], slice(n)), (logit[n:], slice(n, None))))
    auc, stderr = _delong(ours, theirs)
    varied = len(np.unique(np.concatenate([ours, theirs]))) > 1
    p_value = mann_whitney(ours, theirs) if varied else 1.0
    method = "classifier trained on half of the rows, tested on the other"
    return TwoSample(auc, stderr, p_value, len(ours), len(theirs), method)


def _paired(context: Tensor, y: Tensor, other: Tensor, law: Distribution, seed: int) -> TwoSample:
    """Have (x, y) distinguished from (x, y′), and test the answers by signed ranks; both stay in the same half."""
    generator, n = torch.Generator().manual_seed(seed), len(y)
    x = _scores(context)
    residual = torch.cat([_residual(law, one) for one in (y, other)])
    residual = residual[:, _moving(residual)]
    if residual.shape[1] == 0:
        raise Unable("neither the rows nor the model's draws vary")
    scale = residual.std(0).clamp(min=1e-300)
    residual = (residual / scale).clamp(-10, 10)
    given = x.repeat(2, 1)
    i, j = torch.triu_indices(residual.shape[1], residual.shape[1], 1, device="cpu")
    products = torch.cat([(one[:, :, None] * given[:, None]).flatten(1) for one in (residual, residual.square())], 1)
    products = torch.cat([products[:, : _MAX_FEATURES // 2], (residual[:, i] * residual[:, j])[:, : _MAX_FEATURES // 4]], 1)
    z = torch.cat([residual, _scores(torch.cat([y, other])), products], 1)
    z, waves = z[:, _moving(z)], _waves(torch.cat([given, residual], 1), generator)
    half = (torch.randperm(n, generator=generator, device="cpu") < (n + 1) // 2).long().repeat(2)
    logit, _ = cross_fit(z, n, 2, False, generator, rounds=1, more=waves, fold=half)
    apart = (logit[:n] - logit[n:])[half[:n] == 0]
    count, right = len(apart), (torch.sign(apart) + 1) / 2
    share, stderr = float(right.mean()), max(float(right.std()), 0.5 / math.sqrt(count)) / math.sqrt(count)
    ranks = torch.from_numpy(ranks_of(apart.abs().numpy())) * torch.sign(apart)
    p_value = float(torch.special.ndtr(-ranks.sum() / ranks.norm())) if bool(apart.any()) else 1.0
    method = "classifier trained on half of the pairs (x, y), (x, y′), tested on the other"
    return TwoSample(share, stderr, p_value, count, count, method, of_pairs=True)


def _residual(law: Distribution, y: Tensor) -> Tensor:
    """Return a class indicator or a standardised y minus its expectation under the law; y where there is no expectation."""
    probs = getattr(law, "probs", None) if len(law.event_shape) == 0 and y.shape[1] == 1 else None
    if isinstance(probs, Tensor) and probs.ndim == 2 and probs.shape[1] <= _MAX_CLASSES:
        chance = probs.detach().to("cpu", torch.float64)
        return one_hot(y[:, 0].long().clamp(0, chance.shape[1] - 1), chance.shape[1]) - chance
    try:
        mean, spread = (one.detach().to("cpu", torch.float64).reshape(y.shape) for one in (law.mean, law.stddev))
    except Exception:  # laws without moments raise many errors
        return y
    if not bool((mean.isfinite() & spread.isfinite() & (spread > 0)).all()):
        return y
    return (y - mean) / spread


def _moving(z: Tensor) -> Tensor:
    return z.amax(0) > z.amin(0)


def _scores(z: Tensor) -> Tensor:
    """Return normal scores of the pooled rows, column by column; ties share one score. Constant columns are left out."""
    z = z[:, _moving(z)]
    ranks = torch.from_numpy(np.stack([ranks_of(column) for column in z.T.numpy()], 1)) if z.shape[1] else z
    scores: Tensor = torch.special.ndtri((ranks - 0.5) / len(z))
    return scores


def _waves(z: Tensor, generator: torch.Generator) -> Tensor:
    """Return waves in the rows; ties are broken at random, since the order of the rows is their label."""
    order = torch.randperm(len(z), generator=generator, device="cpu")
    return cosines(z[order], generator)[order.argsort()]


def _around(z: Tensor, n: int, known: Tensor) -> Tensor:
    """Return the logit of the share of rows of p among the nearest known rows; a known row isn't its own neighbour."""
    label = (torch.arange(len(z), device="cpu") < n)[known].double()
    index, k = Neighbors(z[known].numpy()), max(3, round(math.sqrt(len(label)) / 2))
    near = torch.from_numpy(index.nearest(z.numpy(), k + 1))
    mine = torch.full((len(z),), -1, dtype=torch.int64, device="cpu")
    mine[known] = torch.arange(len(label), device="cpu")
    others = (near != mine[:, None]).double()
    share = ((others * label[near]).sum(1) + 1) / (others.sum(1) + 2)
    return torch.logit(share)[:, None]


def ranks_of(values: np.ndarray) -> np.ndarray:
    """Return the ranks from 1 on; equal values share the mean of theirs."""
    # `scipy.stats.rankdata` does the same, but that module takes half a second to import, in everybody's first fit.
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum()
    ranks: np.ndarray = (last - (count - 1) / 2)[place]
    return ranks


def mann_whitney(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the chance of ranks as high as ours or higher if both samples are of one law, by the normal limit of their sum.

    Source: Mann & Whitney (1947); for ties, Lehmann (1975), "Nonparametrics", section 1.4.
    """
    n, m = len(ours), len(theirs)
    both = np.concatenate([ours, theirs])
    ties = np.unique(both, return_counts=True)[1].astype(float)
    variance = n * m / 12 * (n + m + 1 - (ties**3 - ties).sum() / ((n + m) * (n + m - 1)))
    above = ranks_of(both)[:n].sum() - n * (n + 1) / 2 - n * m / 2
    return math.erfc(above / math.sqrt(2 * variance)) / 2


def _delong(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Return the AUC and its standard error from the placements of each side among the other."""
    n, m = len(ours), len(theirs)
    whole, first, second = map(ranks_of, (np.concatenate([ours, theirs]), ours, theirs))
    above, below = (whole[:n] - first) / m, (whole[n:] - second) / n
    return float(above.mean()), math.sqrt(above.var(ddof=1) / n + below.var(ddof=1) / m)
