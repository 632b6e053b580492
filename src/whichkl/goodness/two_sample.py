"""Two-sample: whether a classifier can tell rows that the model has not seen from the model's own draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import one_hot

from whichkl.divergences.samples.logistic import MIN_ROWS, cosines, cross_fit
from whichkl.divergences.samples.neighbors import Neighbors
from whichkl.goodness.draws import Unable, drawn, equal_rows, law_at
from whichkl.modes import plain_modes
from whichkl.reading import rebuilt

_MOST = 4_000
_WIDE = 500
_CLASSES = 20
_LIKELY = 0.01


@dataclass(frozen=True)
class TwoSample:
    """How well a classifier tells rows of p from draws of q; the numbers are None where `reason` says why."""

    auc: float | None
    """The chance that a row of p is ranked above a draw of q: 1/2 where they can't be told apart."""
    stderr: float | None
    p_value: float | None
    """The chance to tell them apart so well, or better, if the model were right."""
    rows: int = 0
    """Rows of p that the classifier was tried on; as many more taught it."""
    draws: int = 0
    """Draws of q that it was tried on."""
    method: str = ""
    reason: str | None = None
    of_pairs: bool = False
    """Whether rows were compared in pairs: `auc` is then the share told apart rightly, and the p-value that of signed ranks."""

    @property
    def differs(self) -> bool:
        """Whether the test rejects at 1 %."""
        return self.p_value is not None and self.p_value < _LIKELY

    def __str__(self) -> str:
        """One sentence."""
        if self.auc is None or self.p_value is None:
            return f"No classifier test: {self.reason}."
        found = "can tell unseen rows from the model's draws" if self.differs else "can't tell unseen rows from the model's draws"
        return f"A classifier {found}: {self.number} (chance: 0.5), {self.chance}."

    @property
    def number(self) -> str:
        """Such as ``"AUC 0.516 ± 0.026"``; of pairs, the share that is told apart rightly."""
        return f"{'pairs told apart' if self.of_pairs else 'AUC'} {self.auc:.3f} ± {self.stderr:.3f}"

    @property
    def chance(self) -> str:
        """Such as ``"p = 0.26"``; of pairs, with the test that also counts by how much they are told apart."""
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
    x: Float[Tensor, "n d"], w: Float[Tensor, " n"] | None, context: Float[Tensor, "n c"] | None, model: Any, seed: int = 0
) -> TwoSample:
    """Test a model on rows that it has not seen, by `c2st` against its draws; what it can't do it says in `reason`.

    A conditional model is asked for one y′ ~ q(·|x) beside each (x, y), and the classifier must say which of the two is real; it
    sees y by its standardised residual r under q, by r², and by the products of both with the columns of x, and their squares.

    Args:
        x: rows of p, in the coordinates of the model.
        w: their weights: a row stays with chance w / max w. Or None.
        context: what each row is conditioned on, or None.
        model: a `Distribution`, or a function of contexts that returns one.
        seed: of draws, halves and classifier.

    >>> law = torch.distributions.Normal(torch.zeros(2), 1).expand([2])
    >>> law = torch.distributions.Independent(law, 1)
    >>> x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    >>> two_sample_test(x, None, None, law).differs, two_sample_test(2 * x, None, None, law).differs
    (False, True)
    """
    try:
        x, context = equal_rows(x, w, context, _MOST, seed)
        if len(x) < MIN_ROWS:
            raise Unable(f"{len(x)} unseen rows of equal weight are too few; it takes {MIN_ROWS}")
        if context is None:
            return c2st(x, drawn(model, (min(_MOST, 4 * len(x)),), x.shape[1], seed + 1), seed)
        law = law_at(model, context)
        return _paired(context, x, drawn(law, (), x.shape[1], seed + 1), law, seed)
    except Unable as error:
        return TwoSample(None, None, None, reason=str(error))


@plain_modes()
def c2st(x_held: Float[Tensor, "n d"], model_draws: Float[Tensor, "m d"], seed: int = 0) -> TwoSample:
    """Classifier two-sample test: learn x from draws on one half of the rows, and rank the other half by its logit.

    AUC = P(logit of a row of p > logit of a draw of q), its error by DeLong, its p-value by Mann and Whitney: given the
    classifier, the rows of the other half are exchangeable where p = q, so that the p-value is uniform. (Cross-fitted AUCs
    share their rows, and their mean varies twice as much as it seems.) The classifier is that of the divergences: ridge
    logistic regression on normal scores of the columns, their squares, products and waves along random directions, and what
    the nearest neighbours are.

    Args:
        x_held: rows of p that the model was not fitted on; at most 4,000 are used.
        model_draws: draws of q, at most 4,000.
        seed: of halves and classifier.

    Source: Lopez-Paz & Oquab (2017); DeLong, DeLong & Clarke-Pearson (1988); neighbours: Schilling (1986).

    >>> x, y = torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(0))
    >>> print(c2st(x, y))
    A classifier can't tell unseen rows from the model's draws: AUC 0.516 ± 0.026 (chance: 0.5), p = 0.26.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        part.to("cpu", torch.float64)[torch.randperm(len(part), generator=generator, device="cpu")[:_MOST]]
        for part in (x_held, model_draws)
    )
    if min(len(x), len(y)) < MIN_ROWS:
        return TwoSample(None, None, None, reason=f"it takes {MIN_ROWS} rows of each, and there are {len(x)} and {len(y)}")
    n, z = len(x), _scores(torch.cat([x, y]))
    if z.shape[1] == 0:
        return TwoSample(None, None, None, reason="every column is constant")
    half = torch.cat([(torch.arange(len(part), device="cpu") < (len(part) + 1) // 2).long() for part in (x, y)])
    more = torch.cat([_waves(z, generator), _around(z, n, half == 1)], 1)
    full = z.shape[1] * (z.shape[1] + 3) // 2 <= min(min(n, len(y)) // 10, _WIDE)
    logit, _ = cross_fit(z, n, 2, full, generator, rounds=1, more=more, fold=half)
    ours, theirs = (part[half[side] == 0].numpy() for part, side in ((logit[:n], slice(n)), (logit[n:], slice(n, None))))
    auc, stderr = _delong(ours, theirs)
    varied = len(np.unique(np.concatenate([ours, theirs]))) > 1
    p_value = float(scipy.stats.mannwhitneyu(ours, theirs, alternative="greater", use_continuity=False).pvalue) if varied else 1.0
    return TwoSample(auc, stderr, p_value, len(ours), len(theirs), "classifier trained on half of the rows, tried on the other")


def _paired(context: Tensor, y: Tensor, other: Tensor, law: Distribution, seed: int) -> TwoSample:
    """Which of (x, y) and (x, y′) is real? The share of right answers, tested by signed ranks; a pair stays in one half."""
    generator, n = torch.Generator().manual_seed(seed), len(y)
    x = _scores(context)
    residual = torch.cat([_residual(law, one) for one in (y, other)])
    residual = residual[:, _moving(residual)]
    if residual.shape[1] == 0:
        return TwoSample(None, None, None, reason="neither the rows nor the model's draws vary")
    scale = residual.std(0).clamp(min=1e-300)
    residual = (residual / scale).clamp(-10, 10)
    given = x.repeat(2, 1)
    i, j = torch.triu_indices(residual.shape[1], residual.shape[1], 1, device="cpu")
    products = torch.cat([(one[:, :, None] * given[:, None]).flatten(1) for one in (residual, residual.square())], 1)
    products = torch.cat([products[:, : _WIDE // 2], (residual[:, i] * residual[:, j])[:, : _WIDE // 4]], 1)
    z = torch.cat([residual, _scores(torch.cat([y, other])), products], 1)
    z, waves = z[:, _moving(z)], _waves(torch.cat([given, residual], 1), generator)
    half = (torch.randperm(n, generator=generator, device="cpu") < (n + 1) // 2).long().repeat(2)
    logit, _ = cross_fit(z, n, 2, False, generator, rounds=1, more=waves, fold=half)
    apart = (logit[:n] - logit[n:])[half[:n] == 0]
    count, right = len(apart), (torch.sign(apart) + 1) / 2
    share, stderr = float(right.mean()), max(float(right.std()), 0.5 / math.sqrt(count)) / math.sqrt(count)
    ranks = torch.from_numpy(scipy.stats.rankdata(apart.abs().numpy())) * torch.sign(apart)
    p_value = float(torch.special.ndtr(-ranks.sum() / ranks.norm())) if bool(apart.any()) else 1.0
    method = "classifier trained on half of the pairs (x, y), (x, y′), tried on the other"
    return TwoSample(share, stderr, p_value, count, count, method, of_pairs=True)


def _residual(law: Distribution, y: Tensor) -> Tensor:
    """What a class indicator or a standardised y has beyond its expectation under the law; y itself where there is none."""
    probs = getattr(law, "probs", None) if len(law.event_shape) == 0 and y.shape[1] == 1 else None
    if isinstance(probs, Tensor) and probs.ndim == 2 and probs.shape[1] <= _CLASSES:
        chance = probs.detach().to("cpu", torch.float64)
        return one_hot(y[:, 0].long().clamp(0, chance.shape[1] - 1), chance.shape[1]) - chance
    try:
        mean, spread = (one.detach().to("cpu", torch.float64).reshape(y.shape) for one in (law.mean, law.stddev))
    except Exception:  # laws without moments say so in many ways
        return y
    if not bool((mean.isfinite() & spread.isfinite() & (spread > 0)).all()):
        return y
    return (y - mean) / spread


def _moving(z: Tensor) -> Tensor:
    return z.amax(0) > z.amin(0)


def _scores(z: Tensor) -> Tensor:
    """Normal scores of the pooled rows, column by column; ties share theirs. Constant columns are left out."""
    z = z[:, _moving(z)]
    ranks = np.empty(tuple(z.shape))
    for j in range(z.shape[1]):
        ranks[:, j] = scipy.stats.rankdata(z[:, j].numpy())
    scores: Tensor = torch.special.ndtri((torch.from_numpy(ranks) - 0.5) / len(z))
    return scores


def _waves(z: Tensor, generator: torch.Generator) -> Tensor:
    """Waves in the rows; ties are broken at random, not by the order of the rows, which is their label."""
    order = torch.randperm(len(z), generator=generator, device="cpu")
    return cosines(z[order], generator)[order.argsort()]


def _around(z: Tensor, n: int, known: Tensor) -> Tensor:
    """The share of rows of p, as a logit, among the nearest known rows; a known row isn't its own neighbour."""
    label = (torch.arange(len(z), device="cpu") < n)[known].double()
    index, k = Neighbors(z[known].numpy()), max(3, round(math.sqrt(len(label)) / 2))
    near = torch.from_numpy(index.nearest(z.numpy(), k + 1))
    mine = torch.full((len(z),), -1, dtype=torch.int64, device="cpu")
    mine[known] = torch.arange(len(label), device="cpu")
    others = (near != mine[:, None]).double()
    share = ((others * label[near]).sum(1) + 1) / (others.sum(1) + 2)
    return torch.logit(share)[:, None]


def _delong(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """AUC and its standard error from the placements of each side among the other."""
    n, m = len(ours), len(theirs)
    whole, first, second = map(scipy.stats.rankdata, (np.concatenate([ours, theirs]), ours, theirs))
    above, below = (whole[:n] - first) / m, (whole[n:] - second) / n
    return float(above.mean()), math.sqrt(above.var(ddof=1) / n + below.var(ddof=1) / m)
