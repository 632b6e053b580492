"""Token draws: one token per row of logits from the softmax, by the inverse of its distribution function."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl._checks import InputError, cannot

_TOKENS_PER_GROUP = 256
"""A draw chooses a group of neighbouring tokens, then one of its tokens: sums in float64 are over groups, not over all tokens."""


def drawn_tokens(logits: Float[Tensor, "n v"], who: str) -> Int[Tensor, " n"]:
    """Draw a token of every row from torch's global random state; a token of probability 0 is never drawn.

    It takes two uniform numbers per row, where `torch.multinomial` takes v exponential ones, which takes ten times as long.

    Raises:
        InputError: a row is NaN or has no finite logit.

    >>> drawn_tokens(torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]]), "student")
    tensor([0, 1])
    """
    chances = torch.softmax(logits.float(), -1)
    n, padding = len(chances), -chances.shape[1] % _TOKENS_PER_GROUP
    groups = torch.nn.functional.pad(chances, (0, padding)).view(n, -1, _TOKENS_PER_GROUP)
    mass = groups.sum(-1)
    if not bool(mass.isfinite().all()):
        because = "its logits of the next token are NaN, or infinite"
        raise InputError(cannot(f"draw from the {who}", because, "Look at its weights and its dtype"))
    group = _inverse(mass)
    token = _inverse(groups[torch.arange(n, device=group.device), group])
    return group * _TOKENS_PER_GROUP + token


def _inverse(mass: Float[Tensor, "n k"]) -> Int[Tensor, " n"]:
    """Return per row the first place whose cumulative mass reaches a share of the total, uniform in (0, 1]."""
    total = mass.double().cumsum(-1)
    share = 1 - torch.rand(len(mass), 1, dtype=torch.float64, device=mass.device)
    return torch.searchsorted(total, share * total[:, -1:])[:, 0]
