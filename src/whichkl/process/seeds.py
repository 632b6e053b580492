"""Seeds: global random states are set for a block and restored, and samplers are called under them."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from whichkl.process.lock import PROCESS_LOCK


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set torch's and NumPy's global seeds inside the block, and restore their states after it.

    Other threads of this library wait, so that a seed gives the same numbers whatever else runs. Threads of the user don't wait:
    they can draw from the global states meanwhile.
    """
    with PROCESS_LOCK.held(), torch.random.fork_rng():
        numpy_state = np.random.get_state()
        # without an accelerator `torch.manual_seed` spends most of its time on storing the seed for a later one
        (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def kept_random_states() -> Iterator[None]:
    """Restore the global random states after a block that sets them; nobody waits for it."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def seeded_draws(draw: Callable[..., Any], n: Any, seed: int, device: torch.device) -> Any:
    """Call a sampler for n draws, or a simulator at parameters n: with a generator if it takes one, else under global seeds."""
    try:
        parameters = inspect.signature(draw).parameters.values()
    except ValueError:
        parameters = {}.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) >= 2 and positional[1].default in (inspect.Parameter.empty, None):
        return draw(n, torch.Generator(device).manual_seed(seed))
    with seeded(seed):
        return draw(n)
