"""verify: saved results are checked to be whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whichkl._checks import IntegrityError
from whichkl.commands import console, exits
from whichkl.commands.options import AsJson


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A saved fit, distillation or study, or a command's --out.")],
    as_json: AsJson = False,
) -> None:
    """Check that saved results are whole: every checksum, field and table. Exit code 5: something is damaged."""
    with console.ERR.status("loading torch", spinner="dots"):
        exits.load_torch()
        from whichkl.verifying import verify as run_verify

        try:
            found = run_verify(folder)
        except IntegrityError as error:
            if as_json:
                console.print_json({"folder": str(folder), "whole": False, "damage": str(error)})
            raise
    if as_json:
        console.print_json({"folder": str(folder), "whole": True, "results": [one.to_dict() for one in found]})
        return
    for one in found:
        console.say(str(one))
