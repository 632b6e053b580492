"""The entry point: says what is missing where the command line's packages aren't installed."""

from __future__ import annotations

from whichkl import exits
from whichkl._checks import InputError, missing_extra


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: always, with the exit code.
    """
    exits.run(_command)


def _command() -> None:
    try:
        from whichkl.cli import invoke
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        raise InputError(missing_extra(error.name, "app")) from error
    invoke()


if __name__ == "__main__":
    main()
