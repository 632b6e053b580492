"""Programs: commands and scripts, each in a process of its own, forked from one that has loaded torch and the package.

A process of Python loads them in three seconds, and the tests start a hundred. What a program is told is what Python would
tell it: arguments, folder, environment, streams, warnings; how it ends is what the system says. A test of loading itself
needs a fresh Python.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LANGUAGE = ("transformers.trainer", "transformers.models.llama.modeling_llama")
"""What programs with language models load."""
_LONGEST = 600
"""Seconds after which a program that hangs is killed."""


def whichkl(*arguments, cwd=None, env=None, **streams):
    """Run `python -m whichkl` with these arguments."""
    return run("-m", "whichkl", *arguments, cwd=cwd, env={"COLUMNS": "200", **(env or {})}, **streams)


def run(*command, **settings):
    """Run Python with a command line of `-m module`, `-c code` or a script, and arguments.

    `strict` makes warnings errors. `encoding` is that of the streams, as PYTHONIOENCODING has it; `stdout` is a file to write to.
    `loads` are modules that this program needs, and the next ones have loaded, too.
    """
    program = Program(*command, **settings)
    out, error = program.communicate()
    return subprocess.CompletedProcess(command, program.returncode, out, error)


class Program:
    """A program that runs beside the test, with what of `subprocess.Popen` the tests use; arguments are those of `run`."""

    def __init__(self, *command, cwd=None, env=None, strict=False, encoding=None, stdout=None, loads=()):
        self._folder = tempfile.TemporaryDirectory()
        self._encoding, self.returncode = (encoding or "utf-8").partition(":")[0], None
        self._streams = [stdout or Path(self._folder.name) / "out", Path(self._folder.name) / "error"]
        self._is_elsewhere = stdout is not None
        asked = {"command": [str(one) for one in command], "cwd": str(cwd or Path.cwd()), "env": {**os.environ, **(env or {})}}
        asked |= {"strict": strict, "encoding": encoding, "loads": list(loads)}
        asked |= {name: str(path) for name, path in zip(("out", "error"), self._streams, strict=True)}
        self.pid = _ask(asked)

    def poll(self):
        """Return how it ended, or None while it runs."""
        if self.returncode is None:
            self.returncode = _ask({"pid": self.pid, "options": os.WNOHANG})
            if self.returncode is not None:
                self._written = ("" if self._is_elsewhere else self._text(self._streams[0]), self._text(self._streams[1]))
                self._folder.cleanup()
        return self.returncode

    def wait(self, timeout=_LONGEST):
        """Wait until it ends."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.005)
        return self.returncode

    def communicate(self, timeout=_LONGEST):
        """Return what it wrote until its end."""
        self.wait(timeout)
        return self._written

    def _text(self, path):
        return Path(path).read_bytes().decode(self._encoding) if Path(path).exists() else ""

    def send_signal(self, number):
        os.kill(self.pid, number)


def _ask(asked):
    server = _server()
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@functools.cache
def _server():
    command = [sys.executable, __file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # it ends with its input


def _serve():
    """Fork a process for each line that is read, or say how one ended; return, in that process, what it is to run."""
    import jinja2
    import pandas  # noqa: F401
    import plotly.graph_objects
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401
    from typer.testing import CliRunner

    import whichkl as wk
    import whichkl.cli

    for name in wk.__all__:
        getattr(wk, name)
    CliRunner().invoke(whichkl.cli.app, ["--version"])  # typer imports half of itself at the first command
    # So do these, at the first picture and page.
    plotly.graph_objects.Figure(plotly.graph_objects.Scatter(x=[0], y=[0])).to_html()
    jinja2.Environment(autoescape=True).from_string("{{ 1 }}").render()
    # What the command line imports stays loaded; its own modules look at the streams and are loaded again by each program.
    for name in [one for one in sys.modules if one == "whichkl.cli" or one.startswith("whichkl.commands")]:
        del sys.modules[name]
    gc.freeze()  # a process that ends doesn't look through it all
    for line in sys.stdin:
        asked = json.loads(line)
        if "pid" in asked:
            child, status = os.waitpid(asked["pid"], asked["options"])
            print(json.dumps(os.waitstatus_to_exitcode(status) if child else None), flush=True)
            continue
        for name in asked["loads"]:
            importlib.import_module(name)
        gc.freeze()
        child = os.fork()
        if child == 0:
            return asked
        print(child, flush=True)
    return None


def _become(asked):
    """Take on what a fresh process would have been given, and return what it runs."""
    import runpy
    import warnings

    signal.alarm(_LONGEST)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    for number, path in enumerate((os.devnull, asked["out"], asked["error"])):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(handle, number)
        os.close(handle)
    if asked["encoding"]:
        encoding, _, errors = asked["encoding"].partition(":")
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding=encoding, errors=errors or ("strict" if stream is sys.stdout else "backslashreplace"))
    if asked["strict"]:
        warnings.simplefilter("error")
    first, *rest = asked["command"]
    where = {"-m": asked["cwd"], "-c": ""}
    sys.argv, sys.path[0] = [first, *rest], where.get(first, str(Path(first).parent))
    if first == "-m":
        sys.argv = rest
        return functools.partial(runpy.run_module, rest[0], run_name="__main__", alter_sys=True)
    if first == "-c":
        sys.argv = [first, *rest[1:]]
        return functools.partial(exec, rest[0], vars(sys.modules["__main__"]))
    return functools.partial(runpy.run_path, first, run_name="__main__")


def _end(code):
    """End as Python does, but leave the objects to the system: to take them apart takes longer than most programs."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    told = _serve()
    if told is not None:
        try:
            _become(told)()
        except SystemExit as ended:
            if not isinstance(ended.code, int | None):
                raise
            _end(ended.code or 0)
        _end(0)
