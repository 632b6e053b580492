"""JAX: functions of JAX arrays, compiled for a few batch sizes and called with tensors in double precision."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.utils.dlpack
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot, require
from whichkl.adapters.pairs import Paired
from whichkl.user_code import kept_running, release_frames

if TYPE_CHECKING:
    from jax import Array

Result = TypeVar("Result")
SIZES = (16, 128, 512)
"""Compiled batch sizes. Each size is one more compilation, which takes as long as thousands of evaluations."""
FOLDERS: tuple[str, ...] = ("/jax/", "/jaxlib/", "/numpyro/")
"""Folders of JAX and of libraries on top of it, which error messages skip when they name a line."""


class Rows:
    """A JAX function of rows, called with an (n, d) tensor of any n, and compiled at most once per size in `SIZES`.

    A batch is cut into pieces of these sizes, and the last piece is padded with copies of its last row. Tensors are shared with
    JAX by DLPack; a piece that needs no padding isn't copied. `jax_enable_x64` is on during these calls only, and what JAX keeps
    of a trace is dropped, so that single precision works before and after them.

    Args:
        function: of a JAX array (n, d), to arrays, or a nest of arrays, with a first axis of n.

    >>> import jax.numpy as jnp
    >>> Rows(lambda x: jnp.exp(x))(torch.zeros(2, 1, dtype=torch.float64))
    tensor([[1.],
            [1.]], dtype=torch.float64)
    """

    def __init__(self, function: Callable[[Array], Any]) -> None:
        require("jax", "bayes")
        self.function, self.compiled = function, dict[Any, Any]()

    def __call__(self, x: Float[Tensor, "n d"]) -> Any:
        """Return what the function returns, as tensors of the dtype that JAX gave them, on the device of `x`."""
        jax = require("jax", "bayes")
        parts, start = [], 0
        for size in pieces(len(x)) or SIZES[:1]:
            rows = x[start : start + size]
            if len(rows) < size:
                filler = rows[-1:] if len(rows) else x.new_zeros(1, x.shape[1])
                rows = torch.cat([rows, filler.expand(size - len(rows), -1)])
            parts.append(self._called(rows))
            start += size
        return jax.tree.map(lambda *leaves: _joined(leaves, x), *parts)

    def _called(self, rows: Float[Tensor, "m d"]) -> Any:
        """Call the function that is compiled for this size, type and device."""
        with double_precision():
            array = to_jax(rows)
        key = array.shape, array.dtype, array.device
        if key not in self.compiled:
            self.compiled[key] = _traced(self.function, array, lambda trace: trace.lower().compile())
        with double_precision():
            return self.compiled[key](array)


def log_density(function: Callable[[Array], Array], batched: bool | None = None) -> Paired:
    """Return a log density in JAX as a tensor function; one compiled call computes value and gradient.

    `Target(log_prob=f)` does this automatically if f can't take a tensor, or returns a JAX array.

    Args:
        function: f(x), natural log, up to a constant: (d,) → () or (n, d) → (n,). JAX traces it, so it can't branch on
            numbers (no `if x[0] > 0`).
        batched: whether it takes (n, d); by default its shapes are traced to find out.

    >>> import jax.numpy as jnp
    >>> f = log_density(lambda x: -jnp.sum(x**2))
    >>> f(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    tensor([-25.], dtype=torch.float64)
    """
    rows: Rows | None = None

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal rows
        if rows is None:
            rows = Rows(_value_and_gradient(function, is_batched(function, x) if batched is None else batched))
        value, gradient = rows(x)
        return value.to(x), gradient.to(x)

    return Paired(evaluate)


def score(function: Callable[[Array], Array], batched: bool | None = None) -> Callable[[Tensor], Tensor]:
    """Return the gradient of a log density in JAX, (d,) → (d,) or (n, d) → (n, d), as a tensor function.

    Args:
        function: g(x), traced as in `log_density`.
        batched: whether it takes (n, d); by default its shapes are traced to find out.
    """
    rows: Rows | None = None

    def evaluate(x: Tensor) -> Tensor:
        nonlocal rows
        if rows is None:
            many = is_batched(function, x, gradient=True) if batched is None else batched
            rows = Rows(function if many else require("jax", "bayes").vmap(function))
        gradient: Tensor = rows(x).to(x)
        return gradient

    return evaluate


def is_batched(function: Callable[..., Any], x: Float[Tensor, "n d"], gradient: bool = False) -> bool:
    """Whether f takes rows, (n, d) → (n,), or one point, (d,) → (). JAX traces the shapes and computes nothing.

    Args:
        function: of JAX arrays.
        x: an example of its points.
        gradient: whether f is a gradient, (n, d) → (n, d) or (d,) → (d,).

    Raises:
        TargetError: f takes neither.
    """
    rows, d = 5 if x.shape[1] != 5 else 7, x.shape[1]
    failed: Exception | None = None
    shapes = []
    point, many = ((d,), (d,)[:gradient]), ((rows, d), (rows, d)[: 1 + gradient])
    for asked, wanted in (point, many):  # a point first: a function of one point may accept rows too
        try:
            shapes.append(_shape(function, asked, x.dtype))
        except Exception as error:
            failed = failed or error
            continue
        is_column = asked == many[0] and not gradient and shapes[-1] == (rows, 1)
        if shapes[-1] == wanted or is_column:
            return asked == many[0]
    if failed is not None:
        raise failed
    who, instead = ("score", "gradient") if gradient else ("log_prob", "log density")
    because = f"`{who}` returned shape {shapes[0]} for one point of dimension {d}, and {shapes[1]} for {rows}"
    raise TargetError(cannot("use this target", because, f"Return one {instead} per row, or that of one point (d,)"))


def double_precision() -> AbstractContextManager[None]:
    """Switch on JAX's double precision inside a block; the global setting stays as it is."""
    jax = require("jax", "bayes")
    context: AbstractContextManager[None] = (
        jax.enable_x64(True) if hasattr(jax, "enable_x64") else require("jax.experimental", "bayes").enable_x64()
    )
    return context


def to_jax(x: Tensor) -> Array:
    """Return a tensor as a JAX array: without a copy if JAX has the tensor's device, else on the CPU."""
    jax = require("jax", "bayes")
    if x.device.type != "cpu" and jax.default_backend() == "cpu":
        x = x.cpu()
    array: Array = jax.dlpack.from_dlpack(x.detach().contiguous())
    return array


def claims_value(value: Any) -> bool:
    """Whether a value is a JAX array. This doesn't import JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.Array)


def claims_error(error: BaseException | None) -> bool:
    """Whether JAX raised an error, as its functions do when they are called with a tensor. This doesn't import JAX."""
    if error is None or "jax" not in sys.modules:
        return False
    frames = traceback.extract_tb(error.__traceback__)
    inside = any("/jax/_src/" in frame.filename.replace("\\", "/") for frame in frames)
    return inside or "jaxlib" in str(error) or ("abstract array" in str(error) and "torch" in str(error))


def claims_function(function: Callable[..., Any], x: Float[Tensor, "n d"], gradient: bool = False) -> bool:
    """Whether JAX can trace a function as a log density or a gradient. This doesn't import JAX."""
    if "jax" not in sys.modules:
        return False
    try:
        is_batched(function, x, gradient)
    except Exception:
        return False
    return True


def pieces(n: int) -> list[int]:
    """Cut n rows into pieces of the compiled sizes: at most four of each size below the largest, with little padding.

    >>> pieces(200), pieces(1000), pieces(3)
    ([128, 128], [512, 512], [16])
    """
    cut, left = [SIZES[-1]] * (n // SIZES[-1]), n % SIZES[-1]
    for small, large in zip(reversed(SIZES[:-1]), reversed(SIZES[1:]), strict=True):
        if left > large // 2:
            return [*cut, large]
        cut, left = cut + [small] * (left // small), left % small
    return cut + [SIZES[0]] * (left > 0)


def _value_and_gradient(function: Callable[..., Any], batched: bool) -> Callable[..., Any]:
    jax = require("jax", "bayes")
    if not batched:
        return jax.vmap(jax.value_and_grad(function))  # type: ignore[no-any-return]

    def summed(x: Array) -> tuple[Array, Array]:
        value = function(x).reshape(len(x))
        return value.sum(), value

    def both(x: Array) -> tuple[Array, Array]:
        (_, value), gradient = jax.value_and_grad(summed, has_aux=True)(x)  # a row's gradient is that of the sum
        return value, gradient

    return both


def _shape(function: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    point = require("jax", "bayes").ShapeDtypeStruct(shape, str(dtype).removeprefix("torch."))
    found = _traced(function, point, lambda trace: trace.out_info)
    return tuple(getattr(found, "shape", (f"{type(found).__name__}",)))


def _traced(function: Callable[..., Any], x: Any, read: Callable[[Any], Result]) -> Result:
    """Trace a function in double precision, and return what `read` makes of the trace.

    As long as any trace has a NumPy array that a function holds, JAX gives its converted copy to every other trace, whatever
    their precision is: digits are lost, and an integer index raises. So nobody else holds the function that is traced. Where
    copies in single precision were met, and where others may stay, since inner compiled functions keep their traces, JAX's caches
    are cleared: the user's functions are compiled again at their next call.
    """
    jax = require("jax", "bayes")
    is_double = jax.config.jax_enable_x64

    def traced() -> tuple[Any, set[str]]:
        trace = jax.jit(lambda rows: function(rows)).trace(x)
        return trace, set() if is_double else _types_of_copies(trace.jaxpr)

    with double_precision(), kept_running():
        try:
            trace, types = traced()
        except Exception as error:
            release_frames(error)  # they hold copies, too
            if is_double or not (isinstance(error, TypeError) and "32" in str(error) and "64" in str(error)):
                raise
            types = {"int32"}
        if types & {"int32", "float32"}:
            trace = None
            jax.clear_caches()
            trace, types = traced()
        result = read(trace)
        del trace
        if types:
            jax.clear_caches()
    return result


def _types_of_copies(jaxpr: Any) -> set[str]:
    """Return the types of the converted NumPy arrays among the constants of a jaxpr and of those inside it."""
    types = {str(one.dtype) for one in getattr(jaxpr, "consts", ()) if isinstance(one, np.ndarray)}
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                types |= _types_of_copies(inner) if hasattr(inner, "eqns") else set()
    return types


def _joined(leaves: tuple[Any, ...], x: Tensor) -> Tensor:
    parts = [torch.utils.dlpack.from_dlpack(leaf) for leaf in leaves]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole[: len(x)].to(x.device)
