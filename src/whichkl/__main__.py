"""The entry point: says what is missing where the command line's packages aren't installed."""

from __future__ import annotations

import sys

from whichkl._checks import missing_extra


def main() -> None:
    """Run the command line."""
    try:
        from whichkl.cli import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.stderr.write(missing_extra(error.name, "app") + "\n")
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()
