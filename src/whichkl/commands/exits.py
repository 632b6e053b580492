"""Exits: however a command ends, it prints one line on standard error and returns an exit code.

Only the command line uses this module: it installs signal handlers and replaces `sys.stdout` and `sys.stderr`, which a library
must not do. It imports nothing but the standard library, so that signals are handled from the first moment.
"""

from __future__ import annotations

import _thread
import codecs
import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from whichkl._checks import ResourceError, WhichklError, cannot
from whichkl.printable import ENCODING_ERRORS, one_line, printable, spell
from whichkl.process.memory import memory_message, ran_out

_CLOSED_PIPE = 141
"""Exit code if the reader of standard output is gone: 128 + SIGPIPE, as for other programs."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS_BETWEEN_SIGNALS = 0.5
"""Seconds after which a signal whose exception was swallowed is raised again."""
_MAX_TRIES = 10
"""How often a signal is raised before the process ends without unwinding; files on disk are whole even then."""


class OutputLost(BaseException):
    """Standard output can't be written. It is a `BaseException`, so that no library handles it."""


@dataclass
class Kept:
    """What a command leaves on disk."""

    folder: Path | None = None
    """The folder of results, which may hold a journal or the cells of a study."""
    saved: list[str] = field(default_factory=list)
    """Sentences about results that are on disk."""

    def sentence(self) -> str:
        """Return what is kept, for a command that was stopped."""
        if self.saved:
            text = " and ".join(f"{one[0].lower()}{one[1:]}" for one in self.saved)
            return f"{text}: run the same command again for the rest"
        if self.folder is not None and _holds_work(self.folder):
            return f"what was done is kept in `{self.folder}`: run the same command again to resume"
        return "nothing was finished that could be kept"


KEPT = Kept()
_received: list[int] = []
"""Signals that this process has received."""
_is_loading = threading.Event()
"""Set while torch is imported: an exception in the middle of it would abort the process in C++."""


def run(command: Callable[[], None]) -> None:
    """Run a command and end the process: 0, 1 (see the command), 2 input, 3 target, 4 resources, 5 integrity, 128 + signal.

    Raises:
        SystemExit: always.
    """
    try:
        with _signals_raise(), _streams() as is_open:
            code = _code_of(command) if is_open else 4
    except KeyboardInterrupt:  # in the moments before and after the command
        code = _stopped()
    raise SystemExit(code) from None


def _code_of(command: Callable[[], None]) -> int:
    """Run a command, print a line if it failed, and return its exit code."""
    try:
        try:
            command()
            code = 0
        except SystemExit as end:  # how typer ends
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                _say(end.code)
        sys.stdout.flush()
    except BaseException as error:
        return _report(error)
    if code == 130 or (code and _received):  # typer takes a KeyboardInterrupt itself
        return _stopped()
    return code


def _report(error: BaseException) -> int:
    """Print the line of an error, and return its code."""
    if _received or isinstance(error, KeyboardInterrupt):  # on its way here, the exception may have become another
        return _stopped()
    if isinstance(error, OutputLost):
        _drop_output()
        if isinstance(error.__cause__, BrokenPipeError):
            return _CLOSED_PIPE
    if "--debug" in sys.argv:
        _write("".join(traceback.format_exception(error)))
    for sentence in KEPT.saved:
        _write(f"{sentence}.\n")
    code, message = _described(error)
    _say(message)
    return code


def _described(error: BaseException) -> tuple[int, str]:
    if ran_out(error) and not isinstance(error, ResourceError):
        return 4, memory_message()
    if isinstance(error, WhichklError):
        return error.exit_code, str(error)
    if isinstance(error, OutputLost):
        return 4, cannot("print the result", _reason(error.__cause__), "Free some space, or redirect the output elsewhere")
    if isinstance(error, OSError):
        return 4, described(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    because = f"an error that whichkl doesn't expect, {type(error).__name__}: {error}{place}"
    return 1, cannot("go on", because, "Run the same command with `--debug`, and report what it prints")


def described(error: OSError) -> str:
    """Return the sentence for an unforeseen error of the operating system."""
    return memory_message() if ran_out(error) else cannot("go on", _reason(error), "Check this path, and the disk")


def _reason(error: BaseException | None) -> str:
    if not isinstance(error, OSError):
        return str(error)
    name = f" (`{error.filename}`)" if error.filename is not None else ""
    return f"{error.strerror or error}{name}"


def _stopped() -> int:
    """Print the line of a command that was stopped; a second signal then ends the process at once."""
    for number in _SIGNALS:
        with contextlib.suppress(ValueError, OSError):
            signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(OutputLost):
        sys.stdout.flush()
    _write(f"stopped; {one_line(KEPT.sentence())}\n")
    return 128 + (_received[0] if _received else signal.SIGINT)


def _holds_work(folder: Path) -> bool:
    """Whether a folder holds a finished cell of a study, or the state of a fit."""
    with contextlib.suppress(OSError):
        cells = (folder / "cells").glob("*/DONE")
        return any(cells) or any(one.is_file() for one in (folder / ".journal").rglob("*"))
    return False


def _say(message: str) -> None:
    """Print an error in one line."""
    is_styled = os.name != "nt" and sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    before, after = ("\x1b[1;31m", "\x1b[0m") if is_styled else ("", "")
    sys.stderr.write(f"{before}error:{after} {one_line(message)}\n")
    sys.stderr.flush()


def _write(text: str) -> None:
    sys.stderr.write(printable(text))
    sys.stderr.flush()


# Signals


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Have SIGINT and SIGTERM unwind the command, so that locks are released and temporary files removed."""
    home, hook, is_over = os.getpid(), sys.unraisablehook, threading.Event()

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != home:  # a forked process ends as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if not _received:
            threading.Thread(target=_insist, args=(number, is_over), daemon=True).start()
        _received.append(number)
        if not _is_loading.is_set():
            raise KeyboardInterrupt

    def unraisable(found: Any) -> None:
        if not (_received and isinstance(found.exc_value, KeyboardInterrupt)):
            hook(found)

    is_main = threading.current_thread() is threading.main_thread()
    watched = [one for one in _SIGNALS if is_main and signal.getsignal(one) not in (signal.SIG_IGN, None)]
    before = {one: signal.signal(one, stop) for one in watched}
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        is_over.set()
        sys.unraisablehook = hook
        for one, handler in before.items():
            if signal.getsignal(one) is stop:
                signal.signal(one, handler)


def load_torch() -> None:
    """Import torch. A signal that arrives meanwhile stops the command afterwards.

    Raises:
        KeyboardInterrupt: a signal arrived.
    """
    _is_loading.set()
    try:
        importlib.import_module("torch")
    finally:
        _is_loading.clear()
    if _received:
        raise KeyboardInterrupt


def _insist(number: int, is_over: threading.Event) -> None:
    """Raise a signal again while its exception is swallowed, in a destructor or in a bare `except`."""
    for _ in range(_MAX_TRIES):
        while _unwinds():
            if is_over.wait(_SECONDS_BETWEEN_SIGNALS):
                return
        if is_over.wait(_SECONDS_BETWEEN_SIGNALS):
            return
        _thread.interrupt_main(signal.Signals(number))
    _stopped()
    os._exit(128 + number)


def _unwinds() -> bool:
    """Whether the main thread is handling a `KeyboardInterrupt`, which a second one would disturb."""
    found: Any = sys._current_exceptions().get(threading.main_thread().ident or 0)
    error = found[1] if isinstance(found, tuple) else found
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


# Streams


class OutputStream:
    """A text stream whose failures become `OutputLost`, or are ignored."""

    def __init__(self, stream: TextIO, *, must_work: bool) -> None:
        """Take the stream, and whether a failure is one of the command."""
        self._stream, self._must_work = stream, must_work

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text."""
        with self._watched():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush what was written."""
        with self._watched():
            self._stream.flush()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if self._must_work:
                raise OutputLost from error


@contextlib.contextmanager
def _streams() -> Iterator[bool]:
    """Make standard output and error take any text; yield whether there is a standard output.

    A closed descriptor is opened to the null device: otherwise the next file would get its number, and with it stray output.
    """
    codecs.register_error(ENCODING_ERRORS, spell)
    before = sys.stdout, sys.stderr
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    is_open = sys.stdout is not None
    with open(os.devnull, "w") as null:  # noqa: PTH123
        for stream in before:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors=ENCODING_ERRORS)
        sys.stdout = OutputStream(before[0] or null, must_work=True)
        sys.stderr = OutputStream(before[1] or null, must_work=False)  # if it fails, nothing can be reported
        try:
            if not is_open:
                because = "standard output is closed"
                _say(cannot("print the result", because, "Redirect it to a file, or to the null device"))
            yield is_open
        finally:
            sys.stdout, sys.stderr = before


def _drop_output() -> None:
    """Send buffered standard output to the null device, so that Python doesn't fail to flush it at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
