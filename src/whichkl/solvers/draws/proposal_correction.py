"""Proposal correction: y given x is fitted to rows of a proposal, and draws of that law are weighted to the prior."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl.families.family import Family, log_likelihood
from whichkl.goodness import transform_calibration
from whichkl.importance import effective_sample_size
from whichkl.process.seeds import seeded
from whichkl.samples import Block
from whichkl.solvers.rows.rows import rows_of
from whichkl.solvers.solver import Held, Solution
from whichkl.solvers.work import Work
from whichkl.targets import Target

_MAX_SHARE_OF_ROWS = 0.2
"""Effective share of the rows from which on the likelihood of the weighted rows is as good, at half the cost."""
_DRAWS_PER_ROW, _MIN_DRAWS, _MAX_DRAWS = 2, 10_000, 100_000
"""Number of draws of a round per row, and its least and largest value."""
_MIN_SHARE, _MIN_LAST_SHARE = 0.1, 0.3
"""Least effective share of the draws: of a round, which decides how far it goes from the proposal to the prior; of the last."""
_MAX_ROUNDS = 6
_ROWS_PER_CALL = 4_096
_ROWS_RANKED, _DRAWS_FOR_RANKS = 1_000, 20_000
"""Numbers of held-out rows, and of draws over all of them, for the calibration under the proposal."""
_SEEDS_APART = 1_013
"""Distance of the seeds of two rounds, so that fits with neighbouring seeds share no draws."""


class Trainer(Protocol):
    """A solver that trains a network on weighted rows."""

    def train(self, target: Target, family: Family, seed: int, work: Work, stride: int) -> Solution:
        """Return the weights with the least loss on validation rows."""

    def quick(self) -> Trainer:
        """Return a cheaper copy."""


def wastes_rows(target: Target) -> bool:
    """Return whether few of the weighted rows count, and the weights are a known function of y."""
    w = target.weights
    if w is None or target.log_ratio is None or target.context is None:
        return False
    return effective_sample_size(w.to(torch.float64).log()) < _MAX_SHARE_OF_ROWS * len(w)


def train_from_proposal(solver: Trainer, target: Target, family: Family, seed: int, work: Work, stride: int) -> Solution:
    """Train on all rows without their weights, then on draws of that law, which are weighted to the prior.

    Rows (x, y) with y from a proposal have the law q̃(y|x) ∝ proposal(y) p(x|y), and every row counts for it. The target is
    p(y|x) ∝ q̃(y|x) prior(y)/proposal(y). Draws of q̃ at the x's of the rows, weighted by prior/proposal, are rows of the target,
    and there are as many as needed. If few of these draws count, the network is first trained to q̃ (prior/proposal)^t, with the
    largest t at which enough of them count, and the next round draws from this network. Every round is weighted by q̃ itself, so
    the errors of earlier rounds don't add up.

    Source: Papamakarios & Murray (2016) for the correction by prior/proposal; Cappé, Douc, Guillin, Marin & Robert (2008) for the
    rounds.
    """
    if target.samples is None or target.context is None or target.log_ratio is None:
        raise TypeError("no rows with a known ratio")
    rows = _with_rows(target, Block(target.samples, torch.ones_like(target.samples[:, 0]), target.context))
    first = solver.train(rows, family, seed, work.under("proposal"), stride)
    law = first.best.model
    if getattr(law, "is_bound", False) or not _can_be_sampled(law, target.context[:2]):
        note = "the model can't be drawn from and evaluated, so the few weighted rows that count were fitted"
        found = solver.train(target, family, seed, work.under("weighted"), stride)
        return replace(found, notes=(*found.notes, note))
    kept = replace(rows_of(rows, seed, work.workers), stride=stride).gather()
    if kept.context is None:
        raise TypeError("no x")
    contexts, said, is_last = _Contexts(target.log_ratio, kept.context, law), [], False
    for number in range(1, _MAX_ROUNDS + 1):
        work.tell(f"drawing from the network under the proposal, round {number}", math.nan)
        block, share = contexts.drawn(law, seed + _SEEDS_APART * number)
        said.append(f"{share:.0%}")
        is_last = contexts.level == 1 and share >= _MIN_LAST_SHARE
        trainer = solver if is_last or number == _MAX_ROUNDS else solver.quick()
        found = trainer.train(_with_rows(target, block), family, seed, work.under(f"round{number}"), 0)
        law = found.best.model
        if is_last:
            break
    many = "round" if number == 1 else f"{number} rounds"
    note = (
        f"few of the {len(target.samples):,} weighted rows count, so the network was trained on all of them without weights, and "
        f"then on its own draws, weighted to the prior, in {many}: {', '.join(said)} of the draws count"
    )
    doubts = [] if is_last else ["the proposal is too far from the prior: few of the network's own draws count under the prior"]
    held = None
    if first.held is not None:
        checked, doubt = _calibration(first.held, target, seed)
        note, doubts = f"{note}. {checked}", doubts + doubt
        held = Held(replace(rows_of(target, seed, work.workers), stride=stride, held=True).gather(), law)
    notes = (*found.notes, note)
    return replace(found, held=held, notes=notes, doubts=(*found.doubts, *doubts), corrects_weights=not doubts)


def _with_rows(target: Target, block: Block) -> Target:
    """Return the target with other rows, whose weights aren't a known function."""
    other = copy.copy(target)
    other.samples, other.context, other.weights = block.x.to(target.dtype), block.context, block.w
    other.log_ratio, other.repeats = None, None
    return other


def _can_be_sampled(law: Any, x: Tensor) -> bool:
    try:
        law(x).sample()
    except NotImplementedError:
        return False
    return True


def _calibration(held: Held, target: Target, seed: int) -> tuple[str, list[str]]:
    """Rank unseen rows, without weights, among draws of the network under the proposal; return a sentence, and doubts."""
    few = held.block.thinned(_ROWS_RANKED)
    names = target.names if few.x.shape[1] == len(target.names) else [str(i) for i in range(few.x.shape[1])]
    found = transform_calibration(few.x, None, few.context, held.model, names, seed, draws=_DRAWS_FOR_RANKS)
    is_off = any(one.differs_much for one in found.columns)
    return f"Under the proposal, without weights: {found}", ["the network isn't calibrated under the proposal"] if is_off else []


@dataclass
class _Contexts:
    """The x's of rows, at which laws of y are drawn from, and the chance of each x, as far as it is known."""

    log_ratio: Callable[[Tensor], Tensor]
    x: Float[Tensor, "n c"]
    proposed: Any
    """q̃, the law of y given x under the proposal."""
    level: float = 0.0
    """The exponent t of prior/proposal that the last draws are weighted to."""
    chance: Float[Tensor, " n"] = field(init=False)
    """The share of each x under proposal · (prior/proposal)^t, as the mean of the weights of its draws has it."""

    def __post_init__(self) -> None:
        self.chance = torch.full_like(self.x[:, 0], 1 / len(self.x), dtype=torch.float64)

    def drawn(self, law: Any, seed: int) -> tuple[Block, float]:
        """Draw from a law at x's chosen by their chance; return rows weighted to the next level, and the effective share."""
        count = min(max(_DRAWS_PER_ROW * len(self.x), _MIN_DRAWS), _MAX_DRAWS)
        at = _chosen(count * self.chance, seed)
        y, log_ratios = self._evaluated(law, self.x[at], seed)
        log_ratios = log_ratios - self.chance[at].log()
        power = self.log_ratio(y).to(log_ratios)

        def log_weights(level: float) -> Tensor:
            return torch.where(power > -math.inf, log_ratios + level * power, -math.inf)

        def share(level: float) -> float:
            return effective_sample_size(log_weights(level)) / len(at)

        self.level = _largest(lambda level: share(level) >= _MIN_SHARE, self.level)
        w = log_weights(self.level).softmax(0)
        total, often = (torch.zeros_like(self.chance).index_add(0, at, one) for one in (w * self.chance[at], torch.ones_like(w)))
        mean = total / often.clamp(min=1)  # 0 where no y was drawn: at such an x there is hardly any mass
        self.chance = mean / mean.sum()
        most = max(len(self.x), _MIN_DRAWS // _DRAWS_PER_ROW)
        return _thinned(Block(y, w, self.x[at]), most, seed), share(self.level)

    def _evaluated(self, law: Any, x: Float[Tensor, "m c"], seed: int) -> tuple[Float[Tensor, "m d"], Float[Tensor, " m"]]:
        """Draw a y at each x; return it, and log q̃ minus the log density of the law."""
        drawn, ratios = [], []
        with torch.no_grad(), seeded(seed):
            for block in x.split(_ROWS_PER_CALL):
                y = law(block).sample().reshape(len(block), -1)
                log_p, log_q = (log_likelihood(one, y, block).to(torch.float64) for one in (self.proposed, law))
                drawn.append(y.to(torch.float64))
                ratios.append(log_p - log_q)
        return torch.cat(drawn), torch.cat(ratios)


def _largest(is_met: Callable[[float], bool], least: float) -> float:
    """Return the largest number from `least` to 1 that meets a condition, by bisection.

    >>> round(_largest(lambda t: t * t <= 0.25, 0.0), 3)
    0.5
    """
    low, high = least, 1.0
    if is_met(high):
        return high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if is_met(middle) else (low, middle)
    return low


def _chosen(counts: Float[Tensor, " n"], seed: int) -> Int[Tensor, " m"]:
    """Return the numbers of rows, each as often as its count says, to within one (systematic resampling).

    >>> _chosen(torch.tensor([1.0, 0.0, 2.0]), 0).tolist()
    [0, 2, 2]
    """
    start = float(torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu"))
    ends = (counts.cumsum(0) + start).floor().long()
    often = ends.diff(prepend=ends.new_zeros(1))
    return torch.arange(len(counts), device=counts.device).repeat_interleave(often)


def _thinned(block: Block, most: int, seed: int) -> Block:
    """Return about `most` of the rows, or fewer: light rows by chance, with the weight of those that are left out."""
    share = block.w / block.w.sum()
    chance = (most * share).clamp(max=1.0)
    rows = _chosen(chance, seed + 1)
    return replace(block.take(rows), w=share[rows] / chance[rows])
