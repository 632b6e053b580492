"""capture: a teacher language model is run once, and its laws of the next token are stored for students."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from whichkl.commands import console, exits
from whichkl.commands.options import AsJson, Seed, out_option


def capture(
    teacher: Annotated[
        str, typer.Option("--teacher", metavar="DIR", help="Folder of a language model that save_pretrained wrote.")
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="FILE",
            help="A text a line; or .jsonl: texts, objects with prompt and completion, or with messages, or lists of token ids.",
        ),
    ],
    out: Annotated[Path, out_option("Folder for the shards and teacher.json. The same command resumes.")],
    k: Annotated[int | None, typer.Option("--k", help="Tokens that are kept of each law; by default 32.")] = None,
    draws: Annotated[int | None, typer.Option("--draws", help="Draws of each next token, instead.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="Divides the logits; training uses the same.")] = 1.0,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run a teacher language model once on fixed text, and store what a student's training needs of it.

    A student is trained without the teacher by `whichkl distill JOB.yaml` with `teacher: FOLDER`, or in Python with
    `StoredTeacher.open(FOLDER)`.
    """
    with console.progress() as tell:
        exits.load_torch()
        from whichkl.distillation.language.capture import capture as run_capture
        from whichkl.distillation.language.loading import load_examples, load_model

        examples = load_examples(data)
        model, tokenizer = load_model(teacher, "teacher")
        kept: dict[str, Any] = {"k": k, "draws": draws, "temperature": temperature, "seed": seed}
        found = run_capture(teacher=model, tokenizer=tokenizer, data=examples, folder=out, tell=tell, **kept)
    console.print_json(found.to_dict()) if as_json else console.say(f"{found}\nStored in {out}")
