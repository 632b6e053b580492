"""Labels: draws of a model, each of which passed or failed → the distribution of the model's draws that pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.arrays import tensor_of
from whichkl.conversions.reweighted import Reweighted
from whichkl.printable import count_of
from whichkl.targets import Target
from whichkl.targets.origin import Origin, inherited

_MIN_ROWS = 20
"""Fewest draws that passed, and fewest that failed, from which P(pass | x) is learnt."""
_DO = "use these labels"


@dataclass(frozen=True, eq=False)
class Labels:
    """Draws of a model q₀, and whether each of them passed.

    `convert` makes of them the distribution of draws that pass, p(x) ∝ q₀(x) P(pass | x). The draws that passed are its samples.
    With `model=`, log q₀(x) + log P(pass | x) is its log density, where P comes from logistic regression on the columns, their
    products and cosines of them, as far as these lower the log loss of unseen draws.

    Args:
        draws: (n, d) draws of q₀: an array, a DataFrame or a file.
        passed: (n,), True or False, or 1 or 0.
        model: q₀, a torch distribution or a `Target` with a log density; None for samples alone.

    Raises:
        InputError: the labels aren't one True or False per draw, all draws passed or none did, or the model has no log density.

    Source: Sugiyama, Suzuki & Kanamori (2012), "Density ratio estimation in machine learning", for the ratio by a classifier.

    >>> from torch.distributions import Normal
    >>> from whichkl import convert
    >>> x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> convert(Labels(draws=x, passed=x[:, 0] > 0, model=Normal(0.0, 1.0))).access
    <Access: samples, log_prob, differentiable>
    """

    draws: Any
    passed: Any
    model: Any = None

    def as_target(self, *, n: int | None = None, seed: int = 0) -> Target:
        """Return the distribution of the draws that pass as a target.

        Args:
            n: refused; the draws are given.
            seed: fixes the folds of the cross-validation.

        Raises:
            InputError: as the class.
        """
        if n is not None:
            raise InputError(cannot("use `n=` with labels", "the draws are given", "Leave it out"))
        drawn = Target.of(self.draws)
        x = drawn.samples
        if x is None or drawn.weights is not None or drawn.chains is not None or drawn.context_names:
            because = "they aren't independent draws of equal weight in memory"
            instead = "Pass an (n, d) array, a DataFrame or a file of draws of the model itself, without weights"
            raise InputError(cannot("use these `draws`", because, instead))
        passed = _read_passed(self.passed, len(x)).to(x.device)
        yes, no = int(passed.sum()), int((~passed).sum())
        if yes == 0 or no == 0:
            because = "no draw passed" if yes == 0 else "every draw passed, so that the target is the model itself"
            instead = "Draw more, or from a model that passes more often" if yes == 0 else "Use the model as the target"
            raise InputError(cannot(_DO, because, instead))
        support, learnt, density, model = drawn.bijection.constraints, None, None, None
        if self.model is not None:
            model = self._model(drawn.dim)
            if min(yes, no) < _MIN_ROWS:
                because = f"{count_of(yes, 'draw')} passed and {no:,} failed, and P(pass | x) needs at least {_MIN_ROWS} of each"
                raise InputError(cannot("learn which draws pass", because, "Label more draws, or leave `model=` out"))
            from whichkl.conversions.acceptance import fit_acceptance

            learnt = fit_acceptance(x.to(torch.float64), passed, seed)
            support, density = model.bijection.constraints, Reweighted(model, learnt)
        target = Target(samples=x[passed], log_prob=density, support=support, names=drawn.names)
        first = {"draws": drawn.origin, "model": None if model is None else model.origin}
        target.origin = inherited(self._origin(yes, no, learnt), **first)
        return target

    def _model(self, dim: int) -> Target:
        model = Target.of(self.model)
        if model.density is None or model.dim != dim:
            because = f"it has {count_of(model.dim, 'column')}, and the draws have {dim}"
            because = "it has no log density" if model.density is None else because
            raise InputError(cannot("use this `model`", because, "Pass the model of the draws, or leave `model=` out"))
        return model

    def _origin(self, yes: int, no: int, learnt: Any) -> Origin:
        assumed = ["The draws are independent draws of the model, and the draw alone decides whether it passes."]
        left_out = f"{count_of(no, 'draw')} that failed: not samples of the target."
        trust = f"{yes / (yes + no):.1%} of the draws passed, and they are draws of the target itself."
        if learnt is not None:
            assumed.append(f"log P(pass | x) is logistic regression on {learnt.label}.")
            left_out = f"{count_of(no, 'draw')} that failed: not samples of the target, and used for P(pass | x) alone."
            trust += (
                f" On unseen draws the log loss of P(pass | x) is {learnt.loss:.4g} nats, and {learnt.loss_without:.4g} nats"
                " without features."
            )
        return Origin(
            f"{yes:,} of {yes + no:,} draws of a model, which passed.",
            assumed=tuple(assumed),
            unknown=("Which points pass where the model drew nothing.",),
            left_out=(left_out,),
            trust=trust,
        )


def _read_passed(passed: Any, n: int) -> Bool[Tensor, " n"]:
    """Read one True or False per draw."""
    instead = "Give one True or False per draw; probabilities of passing are weights: `Target(samples=x, weights=p)`"
    if passed is None or isinstance(passed, (str, bytes)):
        raise InputError(cannot(_DO, f"`passed` is a `{type(passed).__name__}`", instead))
    given = tensor_of(passed)
    if given.is_complex() or tuple(given.shape) != (n,):
        raise InputError(cannot(_DO, f"`passed` has shape {tuple(given.shape)}, and there are {count_of(n, 'draw')}", instead))
    wrong = (given != 0) & (given != 1)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise InputError(cannot(_DO, f"row {row} of `passed` is {given[row].item():g}, neither true nor false", instead))
    return given == 1
