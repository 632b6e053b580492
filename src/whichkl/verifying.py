"""Verifying: check every checksum, field and table of a saved fit, distillation, study or stored teacher."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from whichkl._checks import InputError, IntegrityError, cannot
from whichkl.distillation.language.result import LANGUAGE_DISTILLATION, LanguageFields
from whichkl.distillation.language.stored_teacher import MANIFEST, StoredTeacher
from whichkl.distillation.result import DISTILLATION, DistillationFields
from whichkl.families.family import Family
from whichkl.files.reading import read_file
from whichkl.files.saving import Saved
from whichkl.fitting import Fit
from whichkl.fitting.saved_fit import FIT, read_fit
from whichkl.study.ledger import STUDY
from whichkl.study.measures import NEEDS_OF_STUDENTS
from whichkl.study.result import Study
from whichkl.study.writers import table_files


@dataclass(frozen=True)
class Whole:
    """A result in which nothing is damaged."""

    kind: str
    """``"fit"``, ``"distillation"``, ``"study"`` or ``"stored teacher"``."""
    folder: str
    checked: str
    """What was checked, in words."""
    finished: bool = True
    """Whether a study has all its cells and tables. An interrupted study is whole but not finished."""

    def __str__(self) -> str:
        """One sentence."""
        return f"The {self.kind} in {self.folder} is whole: {self.checked}."

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)


def verify(folder: str | os.PathLike[str]) -> tuple[Whole, ...]:
    """Check every result in a folder that `Fit.save`, `Distillation.save`, `compare`, `capture` or a command's `--out` wrote.

    Raises:
        InputError: there is no result.
        IntegrityError: a file is missing, was changed or cut short, or holds impossible values; the message names every
            damaged result.
        ResourceError: a file can't be read.
    """
    path = Path(folder)
    if not path.is_dir():
        because = "it is a file" if path.exists() else "there is no such folder"
        raise InputError(cannot(f"verify `{path}`", because, "Name the folder of a result"))
    results: list[tuple[Callable[[Path], Whole], Path]] = [(_study, path)] if (path / STUDY).exists() else []
    results += [(_fit, one) for one in (path, path / "fit") if _holds(one, FIT)]
    saved = (DISTILLATION, LANGUAGE_DISTILLATION)
    results += [(_distillation, one) for one in (path, path / "student") if any(_holds(one, kind) for kind in saved)]
    results += [(_stored_teacher, path)] if (path / MANIFEST).exists() else []
    if not results:
        because = f"it holds no {FIT.file}, no {DISTILLATION.file}, no {LANGUAGE_DISTILLATION.file} and no {STUDY}"
        students = [f"student/{one.file}" for one in saved]
        inside = [one.parent for name in (f"fit/{FIT.file}", *students, STUDY) for one in path.glob(f"*/{name}")]
        instead = "Name a folder that `save`, `fit --out`, `distill --out` or `compare --out` wrote"
        if inside:
            instead = f"Name the folder inside it, such as `{min(inside).parent if min(inside).name in _PARTS else min(inside)}`"
        raise InputError(cannot(f"verify `{path}`", because, instead))
    found, damage = [], []
    for check, one in results:
        try:
            found.append(check(one))
        except IntegrityError as error:
            damage.append(str(error))
    if damage:
        raise IntegrityError(" ".join(damage))
    return tuple(found)


_PARTS = ("fit", "student")
"""Folders of a result inside the folder that `--out` names."""


def _holds(folder: Path, saved: Saved) -> bool:
    """Whether a folder holds a result, or weights whose JSON file is missing."""
    return (folder / saved.file).exists() or next(folder.glob(f"{saved.weights}-*.safetensors"), None) is not None


def _fit(folder: Path) -> Whole:
    if not (folder / FIT.file).exists():
        raise FIT.damaged(folder, f"`{FIT.file}` is missing")
    fields, tensors = read_fit(folder)
    if fields["family"].get("family") not in Family.kinds or fields["family"]["family"] == "Module":
        return Whole("fit", str(folder), f"checksums and fields of {FIT.file} and {fields['weights']}; the module is your own")
    count = len(Fit.load(folder).diagnostics.optima)
    optima = "1 optimum" if count == 1 else f"{count} optima"
    return Whole("fit", str(folder), f"checksums, fields and {len(tensors)} tensors of {optima}")


def _distillation(folder: Path) -> Whole:
    """Check a distillation of a classifier, or of a language model."""
    is_of_language = (folder / LANGUAGE_DISTILLATION.file).exists()
    if not is_of_language and not (folder / DISTILLATION.file).exists():
        because = f"`{DISTILLATION.file}`, or `{LANGUAGE_DISTILLATION.file}`, is missing"
        raise DISTILLATION.damaged(folder, because)
    saved, kind = (LANGUAGE_DISTILLATION, LanguageFields) if is_of_language else (DISTILLATION, DistillationFields)
    _, tensors = saved.read(folder, kind)
    return Whole("distillation", str(folder), f"checksums, fields and {len(tensors)} weights")


def _stored_teacher(folder: Path) -> Whole:
    found = StoredTeacher.open(folder)
    shards = found.manifest["shards"]
    of = f"{len(shards):,} shard{'s' * (len(shards) != 1)}, {found.manifest['tokens']:,} tokens"
    return Whole("stored teacher", str(folder), f"checksums and laws of {of}")


def _study(folder: Path) -> Whole:
    study = Study.load(folder)
    of_students = study.config["target"].get("source") in NEEDS_OF_STUDENTS
    for cell in study.cells:
        if cell.folder is not None and cell.row["status"] != "failed" and cell.config["target"].get("keep_students", True):
            (_distillation if of_students else _fit)(cell.folder / "fit")
    planned = len(study.config["families"]) * len(study.config["objectives"]) * len(study.config["seeds"])
    _check_listed(folder, {cell.key for cell in study.cells})
    is_finished = (len(study.cells) == planned or bool(study.config.get("pilot"))) and (folder / "table.csv").exists()
    count = f"{len(study.cells)} of {planned} cells" if len(study.cells) < planned else f"all {planned} cells"
    tables = "and no table yet; the same command resumes it"
    if is_finished:
        absent = _check_tables(folder, study)
        tables = "and the tables made of them" + (f", except {', '.join(absent)}, which there isn't" if absent else "")
    return Whole("study", str(folder), f"checksums and fields of {count}, {tables}", is_finished)


def _check_listed(folder: Path, keys: set[str]) -> None:
    """Refuse a study without a cell that its table lists."""
    if not (folder / "table.csv").exists():
        return
    text = read_file(folder / "table.csv").decode(errors="replace")
    lost = [row["cell"] for row in csv.DictReader(io.StringIO(text)) if row.get("cell") and row["cell"] not in keys]
    if lost:
        others = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        because = f"`cells/{lost[0][:80]}`, which table.csv lists, is missing{others}"
        instead = "Restore them, or run the study's command again, which computes them again"
        raise IntegrityError(cannot(f"trust `{folder}`", because, instead))


def _check_tables(folder: Path, study: Study) -> list[str]:
    """Compare the tables with the cells; return the names of tables that aren't there."""
    absent = []
    for name, content in table_files(study.cells, study.table).items():
        try:
            found = read_file(folder / name)
        except FileNotFoundError:
            absent.append(name)  # as Parquet where pyarrow wasn't installed
            continue
        if not _is_same(name, found, content):
            because = f"`{name}` isn't what its cells say"
            raise IntegrityError(cannot(f"trust `{folder}`", because, "Run the study's command again, which writes it again"))
    return absent


def _is_same(name: str, found: bytes, content: bytes) -> bool:
    """Compare bytes, or the values of Parquet files that different versions of pyarrow wrote."""
    if not name.endswith(".parquet") or found == content:
        return found == content
    from pyarrow import ArrowException, parquet

    try:
        if len({parquet.read_metadata(io.BytesIO(one)).created_by for one in (found, content)}) == 1:
            return False
        tables = [parquet.read_table(io.BytesIO(one), page_checksum_verification=True) for one in (found, content)]
    except (ArrowException, OSError):
        return False
    return bool(tables[0].equals(tables[1]))
