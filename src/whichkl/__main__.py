"""The entry point; it names the install command if the packages of the command line are missing."""

from __future__ import annotations

import gc

from whichkl._checks import InputError, missing_extra
from whichkl.commands import exits


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: always, with the exit code.
    """
    try:
        exits.run(_command)
    finally:
        gc.freeze()  # the process ends: walking through all of torch's objects once more would take half a second


def _command() -> None:
    try:
        from whichkl.cli import invoke

        invoke()
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] not in ("typer", "rich", "click", "pydantic"):  # typer itself imports pydantic
            raise
        raise InputError(missing_extra(str(error.name), "app")) from error


if __name__ == "__main__":
    main()
