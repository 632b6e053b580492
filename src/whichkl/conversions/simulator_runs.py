"""Runs of a simulator: parts of the parameters with seeds of their own, in this process or in others, kept in a journal."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, ResourceError, TargetError, WhichklError, cannot
from whichkl.arrays import read_matrix
from whichkl.cluster import Ray
from whichkl.files.journal import Journal
from whichkl.printable import count_of
from whichkl.process.memory import refuse_if_ran_out
from whichkl.process.seeds import seeded_draws
from whichkl.progress import shown_progress
from whichkl.targets.fingerprint import tensor_hash
from whichkl.user_code import place_of, said_of

_PARTS, _MAX_ROWS_PER_PART = 256, 1_000
"""About the number of parts, and the largest number of rows of one: what an interrupted run may lose."""
_MAX_RELATIVE_ERROR = 1e-6
"""Largest relative difference of a simulation that is made again, as on another machine."""
_MAX_SHOWN = 8
"""Largest number of parameters that a message shows."""


@dataclass(frozen=True)
class Part:
    """Rows of parameters that are simulated together."""

    first: int
    """The number of its first row; its seed depends on it."""
    theta: Float[Tensor, "m d"]


@dataclass(frozen=True)
class Call:
    """A user's simulator, and how it is called."""

    simulate: Callable[..., Any]
    batched: bool
    seed: int
    names: tuple[str, ...]

    def __call__(self, part: Part) -> Float[Tensor, "m c"]:
        """Return the data of a part.

        Raises:
            TargetError: the simulator raised.
            InputError: it returned something else than a row of numbers per row of parameters.
        """
        if not self.batched:
            rows = [self._row(row, part.first + i) for i, row in enumerate(part.theta)]
            if len({row.shape[1] for row in rows}) > 1:
                raise _of_different_widths({row.shape[1] for row in rows})
            return torch.cat(rows)
        try:
            found = self._call(part.theta, part.first)
        except (KeyboardInterrupt, WhichklError):
            raise
        except BaseException as error:
            raise self._raised(error, part) from error
        x = _read(found)
        if len(x) != len(part.theta):
            wanted = count_of(len(part.theta), "row")
            because = f"`simulate` returned {count_of(len(x), 'row')} of data for {wanted} of parameters"
            instead = "Return a row of data per row of parameters, or pass `batched=False` for a simulator of one point"
            raise InputError(cannot("use these simulations", because, instead))
        return x

    def check(self, theta: Float[Tensor, "1 d"]) -> None:
        """Refuse a simulator of one point that is called with rows, so that all of them share its random numbers.

        At three equal rows such a simulator returns equal data, and other data with another seed.
        """
        rows = theta.expand(3, -1)
        one, other = self(Part(0, rows)), self(Part(1, rows))
        is_shared = [bool((x == x[:1]).all()) for x in (one, other)]
        if all(is_shared) and not torch.equal(one.nan_to_num(), other.nan_to_num()):
            because = "`simulate` gives all rows of one call the same random numbers"
            instead = "Pass `batched=False`, or draw random numbers of the shape (n, …) of its argument"
            raise InputError(cannot("use these simulations", because, instead))

    def _row(self, theta: Float[Tensor, " d"], number: int) -> Float[Tensor, "1 c"]:
        """Simulate at one point, with a seed of its own."""
        try:
            found = self._call(theta, number)
        except (KeyboardInterrupt, WhichklError):
            raise
        except BaseException as error:
            raise self._named(error, theta, number) from error
        if np.ndim(found) > 1:
            because = f"`simulate` returned shape {tuple(np.shape(found))} for one point, not a row of numbers"
            instead = "Return one row of data, or leave `batched=False` out if it takes rows"
            raise InputError(cannot("use these simulations", because, instead))
        return _read(found).T

    def _call(self, theta: Tensor, number: int) -> Any:
        """Call with a tensor, and if that raises, with an array."""
        seed = mixed_seed(self.seed, number)
        try:
            return seeded_draws(self.simulate, theta.clone(), seed, theta.device)
        except WhichklError:
            raise
        except Exception as error:
            try:
                return seeded_draws(self.simulate, theta.cpu().numpy().copy(), seed, theta.device)
            except Exception:
                raise error from None  # what the first call raised is what the user should see

    def _raised(self, error: BaseException, part: Part) -> TargetError:
        """Look for the row at which the simulator raises."""
        for i, row in enumerate(part.theta):
            try:
                self._call(row[None], part.first)
            except KeyboardInterrupt:
                raise
            except BaseException as again:
                return self._named(again, row, part.first + i)
        return self._named(error, part.theta[0], part.first, f" or at another of {len(part.theta):,} rows, none of them alone")

    def _named(self, error: BaseException, theta: Float[Tensor, " d"], number: int, more: str = "") -> TargetError:
        refuse_if_ran_out(error, "simulate")
        values = list(zip(self.names, theta.tolist(), strict=True))[:_MAX_SHOWN]
        shown = ", ".join(f"{name} = {value:.6g}" for name, value in values)
        shown += ", …" if len(self.names) > _MAX_SHOWN else ""
        because = f"{said_of(error)}{place_of(error)} at the parameters {shown} (simulation {number}){more}"
        gets = "rows (n, d), or one point (d,) with `batched=False`" if self.batched else "one point (d,)"
        instead = f"Correct `simulate`, which gets {gets}, or return NaN where a simulation fails"
        return TargetError(cannot("simulate", because, instead))


def mixed_seed(seed: int, number: int) -> int:
    """Return a seed for one part of what a seed determines; other numbers give unrelated ones.

    >>> mixed_seed(0, 1) == mixed_seed(0, 1), mixed_seed(0, 1) == mixed_seed(1, 0)
    (True, False)
    """
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) >> 1


def run_simulator(call: Call, theta: Float[Tensor, "n d"], ray: Ray | None = None, folder: Any = None) -> Float[Tensor, "n c"]:
    """Return a row of data per row of parameters, the same ones whatever does the work.

    Args:
        call: the simulator.
        theta: the parameters.
        ray: the processes that work; None is this one.
        folder: where finished parts are kept, and looked for first.

    Raises:
        TargetError: the simulator raised.
        InputError: it returned something else than rows of one width.
        ResourceError: a worker died at every retry, or the folder can't be written.
    """
    parts = _parts_of(theta)
    log = None if folder is None else Journal.of(folder, _identity(call, theta))
    found: dict[int, Tensor] = {}
    for part in parts:
        kept = None if log is None else log.load(f"simulations-{part.first}", lambda tensors, _: tensors["x"])
        if kept is not None and kept.ndim == 2 and len(kept) == len(part.theta):
            found[part.first] = kept
    if 0 in found and not torch.allclose(found[0], call(parts[0]), rtol=_MAX_RELATIVE_ERROR, equal_nan=True):
        because = f"the first simulations in `{folder}` come out otherwise now, with the same parameters and seed"
        instead = "Name a new folder; if `simulate` wasn't changed, have it draw random numbers from torch or `np.random` only"
        raise InputError(cannot("resume these simulations", because, instead))
    left = [part for part in parts if part.first not in found]
    if left and call.batched:
        call.check(theta[:1])
    with shown_progress("simulating") as tell:
        for part, x in _worked(call, left, ray):
            found[part.first] = x
            if log is not None:
                log.save(f"simulations-{part.first}", {"x": x}, {})
            tell("simulating", len(found) / len(parts))
    widths = {x.shape[1] for x in found.values()}
    if len(widths) > 1:
        raise _of_different_widths(widths)
    return torch.cat([found[part.first] for part in parts]).to(theta.device)


def _parts_of(theta: Float[Tensor, "n d"]) -> list[Part]:
    """Return the parts; the first is half as long, so that data of one point can't pass for one number per row."""
    size = min(math.ceil(len(theta) / _PARTS), _MAX_ROWS_PER_PART) if len(theta) > _PARTS else math.ceil(len(theta) / 8)
    size = max(2, size)
    starts = [0, *range(size // 2, len(theta), size)]
    return [Part(a, theta[a:b]) for a, b in zip(starts, [*starts[1:], len(theta)], strict=True)]


def _worked(call: Call, parts: Sequence[Part], ray: Ray | None) -> Iterator[tuple[Part, Tensor]]:
    """Yield every part with its data, as they are done."""
    if ray is None or not parts:
        for part in parts:
            yield part, call(part)
        return
    waiting = iter(parts)
    for part, x in ray.as_completed(call, lambda _: next(waiting, None)):
        if isinstance(x, Exception):
            last = part.first + len(part.theta) - 1
            because = f"the process that ran simulations {part.first} to {last} died {ray.retries + 1} times ({x})"
            raise ResourceError(cannot("simulate", because, "Run `simulate` at one point in a process of its own")) from x
        yield part, x


def _identity(call: Call, theta: Float[Tensor, "n d"]) -> dict[str, Any]:
    """Describe what the data depend on: the parameters, the seed, and the source of the simulator, where there is one."""
    plain = inspect.unwrap(call.simulate)
    name = getattr(plain, "__qualname__", type(plain).__qualname__)
    try:
        source = inspect.getsource(plain if inspect.isroutine(plain) else type(plain))
    except (OSError, TypeError):
        source = ""
    return {"simulate": name, "source": source, "theta": tensor_hash(theta), "seed": call.seed, "batched": call.batched}


def _read(found: Any) -> Float[Tensor, "m c"]:
    """Return data as a matrix; a number per row is a column."""
    if found is None:
        instead = "Return one row of data per row of parameters"
        raise InputError(cannot("use these simulations", "`simulate` returned None", instead))
    return read_matrix(np.asarray(found)[None] if np.ndim(found) == 0 else found, torch.float64, "cpu", "simulations")


def _of_different_widths(widths: set[int]) -> InputError:
    because = f"`simulate` returned rows of {count_of(min(widths), 'number')} and rows of {max(widths)}"
    return InputError(cannot("use these simulations", because, "Return data of one length, such as summaries of fixed size"))
