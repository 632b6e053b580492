"""User code: functions from the user's own files, named FILE.py:FUNCTION, and the errors that they raise."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from whichkl._checks import InputError, TargetError, WhichklError, cannot
from whichkl.process.memory import refuse_if_ran_out


def looks_like_code(text: str) -> bool:
    """Whether a text has the form FILE.py:FUNCTION.

    >>> looks_like_code("model.py:log_prob"), looks_like_code("model.py")
    (True, False)
    """
    path, colon, name = text.rpartition(":")
    return bool(colon) and path.endswith(".py") and name.isidentifier()


def said_of(error: BaseException) -> str:
    """Return a clause on what a user's code raised, or that it tried to end the process.

    >>> said_of(KeyError("a")), said_of(SystemExit(0))
    ("it raised KeyError: 'a'", 'it called sys.exit(0)')
    """
    if isinstance(error, SystemExit):
        return f"it called sys.exit({'' if error.code is None else repr(error.code)})"
    first = (str(error).splitlines() or [""])[0]
    return f"it raised {type(error).__name__}: {first}"


def place_of(error: BaseException, libraries: Sequence[str] = ()) -> str:
    """Return " (file:line)", the innermost line of the user's own code that an error passed through; "" if there is none.

    Args:
        error: what a user's function raised.
        libraries: parts of paths, such as ``"/jax/"``, whose files aren't the user's.
    """
    inner = (*libraries, "/torch/autograd/", "/torch/distributions/", Path(__file__).parent.as_posix())
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(one in frame.filename.replace("\\", "/") for one in inner)]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def release_frames(error: BaseException | None) -> None:
    """Empty the frames that an error and its causes passed through: what they hold would live as long as the error."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def call_user(function: Callable[..., Any], do: str, instead: str = "Correct it", error: type[WhichklError] = InputError) -> Any:
    """Call a user's function without arguments; whatever it raises, also `SystemExit`, becomes an `error` of this library.

    Errors of this library pass unchanged, and memory that ran out becomes a `ResourceError`. `do` names what can't be done if the
    function raises, such as ``"read `data`"``. The error has the line of the user's code.
    """
    try:
        return function()
    except (KeyboardInterrupt, WhichklError):
        raise
    except BaseException as raised:
        refuse_if_ran_out(raised, do)
        because = said_of(raised) + place_of(raised, ("/site-packages/",))
        raise error(cannot(do, because, instead)) from raised


@contextlib.contextmanager
def kept_running() -> Iterator[None]:
    """Turn `SystemExit` and the like inside the block into a `TargetError`, which is handled like any other exception."""
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as raised:
        raise TargetError(cannot("call this function", said_of(raised), "Remove that from it")) from raised


def load_function(place: str, said: str, folder: Path | None = None) -> Callable[..., Any]:
    """Import FILE.py and return FUNCTION from it.

    Args:
        place: FILE.py:FUNCTION.
        said: what the user wrote, for messages, such as ``--log-prob model.py:f``.
        folder: where a relative path starts; by default the working directory.

    Raises:
        InputError: the text isn't of that form, there is no such file or function, or importing the file raises.
    """
    if not looks_like_code(place):
        raise InputError(cannot(f"read `{said}`", "it isn't of the form FILE.py:FUNCTION", "Write, say, model.py:log_prob"))
    path, _, name = place.rpartition(":")
    file = (folder or Path()) / path
    if not os.path.isfile(file):  # Path.is_file raises if the name is too long
        raise InputError(cannot(f"read `{path}`", "there is no such file", "Correct the path"))
    spec = importlib.util.spec_from_file_location(f"whichkl_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(cannot(f"read `{path}`", "Python can't import it", "Give a .py file"))
    module = importlib.util.module_from_spec(spec)
    parent = str(file.resolve().parent)
    sys.path.insert(0, parent)
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        refuse_if_ran_out(error, f"import `{path}`")
        guard = 'Put what runs when it is a script under `if __name__ == "__main__":`'
        instead = guard if isinstance(error, SystemExit) else "Correct the file"
        raise InputError(cannot(f"import `{path}`", said_of(error), instead)) from error
    finally:
        with contextlib.suppress(ValueError):  # the file may have changed `sys.path`
            sys.path.remove(parent)
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_")))
        raise InputError(cannot(f"find `{name}` in `{path}`", f"its functions are {there or 'none'}", "Name one of them"))
    return function  # type: ignore[no-any-return]
