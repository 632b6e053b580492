"""Verify: whether a saved fit, distillation or study is whole, down to every checksum, field and table."""

from __future__ import annotations

import io
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from whichkl._checks import InputError, IntegrityError, cannot
from whichkl.distillation.result import DISTILLATION, DistillationFields
from whichkl.families.family import Family
from whichkl.fit_file import FIT, read_fit
from whichkl.fitting import Fit
from whichkl.saving import Saved
from whichkl.study.ledger import STUDY
from whichkl.study.result import Study
from whichkl.study.table import table_files


@dataclass(frozen=True)
class Whole:
    """A result in which nothing is damaged."""

    kind: str
    """``"fit"``, ``"distillation"`` or ``"study"``."""
    folder: str
    checked: str
    """What was checked, in words."""
    finished: bool = True
    """Whether a study has all its cells and tables. One that was interrupted is whole, and not finished."""

    def __str__(self) -> str:
        """One sentence."""
        return f"The {self.kind} in {self.folder} is whole: {self.checked}."

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)


def verify(folder: str | os.PathLike[str]) -> tuple[Whole, ...]:
    """Check every saved result in a folder: of `Fit.save`, of `Distillation.save`, of `compare`, or of a command's `--out`.

    Raises:
        InputError: there is none.
        IntegrityError: a file is missing, was changed or cut short, or holds what no such result can hold.
        ResourceError: a file can't be read.
    """
    path = Path(folder)
    found = []
    if (path / STUDY).exists():
        found.append(_study(path))
    found += [_fit(one) for one in (path, path / "fit") if _holds(one, FIT)]
    found += [_distillation(one) for one in (path, path / "student") if _holds(one, DISTILLATION)]
    if not found:
        because = f"it holds no {FIT.file}, no {DISTILLATION.file} and no {STUDY}"
        raise InputError(cannot(f"verify `{path}`", because, "Name a folder that `save`, `compare` or `--out` wrote"))
    return tuple(found)


def _holds(folder: Path, saved: Saved) -> bool:
    """Whether a folder holds a result, or the weights of one whose JSON file is gone."""
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
    if not (folder / DISTILLATION.file).exists():
        raise DISTILLATION.damaged(folder, f"`{DISTILLATION.file}` is missing")
    _, tensors = DISTILLATION.read(folder, DistillationFields)
    return Whole("distillation", str(folder), f"checksums, fields and {len(tensors)} weights")


def _study(folder: Path) -> Whole:
    study = Study.load(folder)
    of_distillations = study.config["target"].get("source") == "distillation"
    for cell in study.cells:
        if cell.folder is not None and cell.row["status"] != "failed":
            (_distillation if of_distillations else _fit)(cell.folder / "fit")
    planned = len(study.config["families"]) * len(study.config["objectives"]) * len(study.config["seeds"])
    is_finished = (len(study.cells) == planned or bool(study.config.get("pilot"))) and (folder / "table.csv").exists()
    if is_finished:
        _check_tables(folder, study)
    count = f"{len(study.cells)} of {planned} cells" if len(study.cells) < planned else f"all {planned} cells"
    tables = "and the tables made of them" if is_finished else "and no table yet; the same command resumes it"
    return Whole("study", str(folder), f"checksums and fields of {count}, {tables}", is_finished)


def _check_tables(folder: Path, study: Study) -> None:
    for name, content in table_files(study.cells, study.table).items():
        try:
            found = (folder / name).read_bytes()
        except FileNotFoundError:
            continue  # without pyarrow there is no Parquet
        if not _is_same(name, found, content):
            because = f"`{name}` isn't what its cells say"
            raise IntegrityError(cannot(f"trust `{folder}`", because, "Run the study's command again, which writes it again"))


def _is_same(name: str, found: bytes, content: bytes) -> bool:
    """Compare bytes; Parquet that another version of pyarrow wrote by its values."""
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
