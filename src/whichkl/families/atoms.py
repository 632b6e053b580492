"""Atoms: torch's laws of whole numbers, with log probability −∞ wherever they have no mass."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Poisson


class Codes(Categorical):
    """Categories 0 … K−1; torch's own raises for other values, and gives a category of probability 0 the log of 2e-16.

    >>> law = Codes(logits=torch.tensor([0.25, 0.75, 0.0]).log(), validate_args=False)
    >>> law.log_prob(torch.tensor([2.0, 3.0, 0.5])).tolist()
    [-inf, -inf, -inf]
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p of each value."""
        value = _numbers(value)
        inside = (value >= 0) & (value < self._num_events) & (value == value.round())
        return torch.where(inside, super().log_prob(torch.where(inside, value, 0)), -math.inf)


class Coin(Bernoulli):
    """0 or 1; exact where the probability is 0 or 1, which torch's own clamps.

    >>> Coin(probs=torch.tensor(0.0), validate_args=False).log_prob(torch.tensor([0.0, 1.0])).tolist()
    [0.0, -inf]
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p of each value."""
        if "logits" in self.__dict__:
            zero, one = -torch.nn.functional.softplus(self.logits), -torch.nn.functional.softplus(-self.logits)
        else:
            zero, one = torch.log1p(0 - self.probs), self.probs.log()
        return torch.where(value == 0, zero, torch.where(value == 1, one, -math.inf))


class Counts(Poisson):
    """Whole numbers from 0; torch's own gives a number for fractions too.

    >>> Counts(torch.tensor(2.0), validate_args=False).log_prob(torch.tensor([0.0, 0.5, -1.0])).tolist()
    [-2.0, -inf, -inf]
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p of each value."""
        value = _numbers(value)
        inside = (value >= 0) & (value == value.round())
        return torch.where(inside, super().log_prob(torch.where(inside, value, 0)), -math.inf)


def _numbers(value: Tensor) -> Tensor:
    """Return True and False as 1 and 0."""
    return value.long() if value.dtype == torch.bool else value


def codes(probs: Tensor) -> Codes:
    """Build the law of categories with these probabilities; some may be 0."""
    return Codes(logits=probs.log(), validate_args=False)
