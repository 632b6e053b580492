"""Memory: what one call leaves behind is kept for the next one, rather than given back and asked for anew."""

from __future__ import annotations

from functools import lru_cache

import torch

BLOCKS = 2**23
"""Bytes: some blocks of a stream."""
CALLS = 31 * 2**20
"""Bytes: the largest intermediate results of a log density that glibc still keeps."""


@lru_cache(maxsize=4)
def keep_memory(most: int) -> None:
    """Have the C library keep up to twice so many bytes for further use: asking anew costs a page fault every 4 kB.

    glibc keeps twice as much as the largest chunk that it was ever given back, up to 64 MB (mallopt(3)); elsewhere nothing
    happens.
    """
    torch.empty(most, dtype=torch.uint8, device="cpu")
