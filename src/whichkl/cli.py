"""The command line: an app of the functions in `commands`. Torch is imported inside them, so that --help is instant."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from whichkl import __version__
from whichkl._checks import InputError, ResourceError, cannot
from whichkl.commands import console, convert, exits
from whichkl.commands.advise import advise
from whichkl.commands.audit import audit
from whichkl.commands.capture import capture
from whichkl.commands.compare import compare
from whichkl.commands.demo import demo
from whichkl.commands.distill import distill
from whichkl.commands.estimate import estimate
from whichkl.commands.fit import fit
from whichkl.commands.score import score
from whichkl.commands.verify import verify
from whichkl.commands.wording import in_options, in_words
from whichkl.distillation.language.job_keys import help_on_keys
from whichkl.printable import one_line
from whichkl.progress import switch_off


class _Command(TyperCommand):
    """A command; what the user's code prints stays out of its results, and that code can't end the process."""

    def invoke(self, ctx: Any) -> Any:
        """Run it, and replace the errors that typer would handle itself."""
        from whichkl.user_code import said_of

        options = {str(one.name): max(one.opts, key=len) for one in self.params if one.opts[0].startswith("-")}
        try:
            with console.results_apart(), in_options(options):
                return super().invoke(ctx)
        except (SystemExit, GeneratorExit, EOFError) as error:
            because = f"in your own code, {said_of(error)}"
            raise InputError(cannot("go on", because, "Remove that from your code")) from error
        except OSError as error:
            raise ResourceError(exits.described(error)) from error


class _Group(TyperGroup):
    """The commands; a usage error repeats only printable characters of the command line."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the options before the command."""
        with _printable_usage():
            return super().make_context(*args, **kwargs)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, whose name may be two words, such as `distill capture`."""
        if " ".join(args[:2]) in self.commands:
            args = [" ".join(args[:2]), *args[2:]]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Parse the command's own options, and run it."""
        with _printable_usage():
            return super().invoke(ctx)


@contextlib.contextmanager
def _printable_usage() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "message"):
            error.message = in_words(one_line(str(error.message)))
        raise


app = typer.Typer(
    name="whichkl",
    cls=_Group,
    help="Forward or reverse KL? Say what you can do with your target; see which is possible, fit it, see if it worked.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (demo, advise, fit, score, estimate, compare, distill, capture, audit, verify):
    epilog = help_on_keys() if command is distill else None
    app.command("distill capture" if command is capture else None, cls=_Command, epilog=epilog)(command)
for kind in convert.COMMANDS:
    convert.app.command(cls=_Command)(kind)
app.add_typer(convert.app, name="convert", cls=_Group)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    context.obj = debug
    if version:
        console.say(__version__)
        raise typer.Exit


def invoke() -> None:
    """Run the command that the process's arguments name."""
    switch_off()
    app(args=[argument for argument in sys.argv[1:] if argument != "--debug"])
