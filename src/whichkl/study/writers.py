"""Writers: a study's rows as CSV, Parquet and JSON lines, the same bytes for the same cells; and for MLflow and TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whichkl._checks import InputError, plain
from whichkl.files.writing import write_whole
from whichkl.printable import printable
from whichkl.study.arms import arm_of
from whichkl.study.ledger import Stored

if TYPE_CHECKING:
    from whichkl.study.result import Study

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
_NOT_METRICS = ("seed", "budget")
_MAX_METRICS_PER_CALL = 1_000
"""Limit of MLflow."""
_MAX_FOLDER_NAME = 200


def csv_text(columns: Mapping[str, Sequence[Any]]) -> str:
    """Write columns as CSV. A text that a spreadsheet would run as a formula gets an apostrophe; control characters are shown.

    >>> csv_text({"a": [0.1, -2.0, None], "b": ["=1+1", "-3", "x,y"]}).split()
    ['a,b', "0.1,'=1+1", '-2.0,-3', ',"x,y"']
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([printable(safe(name)) for name in columns])
    writer.writerows([[printable(_cell(value)) for value in row] for row in zip(*columns.values(), strict=True)])
    return out.getvalue()


def safe(text: str) -> str:
    """Return a text that no spreadsheet reads as a formula; numbers stay."""
    if not text.startswith(_FORMULA_STARTS):
        return text
    try:
        return text if math.isfinite(float(text)) and text == text.strip() else f"'{text}"
    except ValueError:
        return f"'{text}"


def table_files(cells: Sequence[Stored], columns: Mapping[str, Sequence[Any]]) -> dict[str, bytes]:
    """Return `table.csv`, `metrics.jsonl`, `times.jsonl` and, where pyarrow is installed, `table.parquet`."""
    lines = [json.dumps(plain({**one.row, "details": one.details}), allow_nan=False) for one in cells]
    times = [json.dumps({"cell": one.key, **{name: round(value, 6) for name, value in one.seconds.items()}}) for one in cells]
    files = {
        "table.csv": csv_text(columns).encode(),
        "metrics.jsonl": ("\n".join(lines) + "\n").encode(),
        "times.jsonl": ("\n".join(times) + "\n").encode(),
    }
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError:
        return files
    stream = io.BytesIO()
    table = pa.table({name: pa.array(list(values)) for name, values in columns.items()})
    parquet.write_table(table, stream, write_page_checksum=True)
    return {**files, "table.parquet": stream.getvalue()}


def write_tables(folder: Path, cells: Sequence[Stored], columns: Mapping[str, Sequence[Any]]) -> None:
    """Write what `table_files` returns."""
    for name, content in table_files(cells, columns).items():
        write_whole(folder / name, content, is_own=is_table)


def is_table(content: bytes) -> bool:
    """Whether content is that of a study's table, even of a damaged one: it names cells in its first line, or is empty."""
    first = content.partition(b"\n")[0]
    is_csv = {b"cell", b"seed", b"objective"} <= set(first.split(b","))
    is_parquet = content.startswith(b"PAR1") and b"objective" in content
    return not content or is_csv or is_parquet or re.search(rb'"cell": "[0-9a-f]{64}"', first) is not None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return safe(value) if isinstance(value, str) else repr(value)


def to_mlflow(study: Study, experiment: str = "whichkl") -> None:
    """Log each cell as an MLflow run, where the tracking URI says: a failed cell is a failed run.

    Its arm and seed are parameters, its finite numbers metrics, its status, key and error tags, and the loss of each iteration,
    where the solver recorded it, is the metric `training`. Neither an active run nor the active experiment is touched. MLflow
    allows letters, digits and a few signs in names of metrics; others become `_`.

    Raises:
        InputError: MLflow isn't installed.
    """
    try:
        from mlflow import MlflowClient  # type: ignore[import-not-found,unused-ignore]
        from mlflow.entities import Metric, Param  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        raise InputError("Cannot log to MLflow: it isn't installed. Run: pip install mlflow.") from error
    client = MlflowClient()
    found = client.get_experiment_by_name(experiment)
    where = client.create_experiment(experiment) if found is None else found.experiment_id
    for cell in study.cells:
        row, now = cell.row, int(1_000 * time.time())
        tags = {"cell": row["cell"], "status": row["status"], **({"error": row["error"]} if row["error"] else {})}
        run = client.create_run(where, tags=tags, run_name=f"{arm_of(row)} · seed {row['seed']}").info.run_id
        params = [Param(name, str(row[name])) for name in ("family", "objective", "seed", "budget")]
        client.log_batch(run, params=params)
        numbers = [Metric(_named(name), value, now, 0) for name, value in _numbers(row).items()]
        numbers += [Metric("training", loss, now, i + 1) for i, loss in _training(cell)]
        for i in range(0, len(numbers), _MAX_METRICS_PER_CALL):
            client.log_batch(run, metrics=numbers[i : i + _MAX_METRICS_PER_CALL])
        client.set_terminated(run, "FAILED" if row["status"] == "failed" else "FINISHED")


def to_tensorboard(study: Study, folder: str | os.PathLike[str]) -> None:
    """Write a TensorBoard run for each arm: its finite numbers as scalars over the seeds, and each seed's loss over iterations.

    Name a new folder: written again into the same one, everything is in it twice.

    Raises:
        InputError: TensorBoard isn't installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise InputError("Cannot write for TensorBoard: it isn't installed. Run: pip install tensorboard.") from error
    arms: dict[str, list[Stored]] = {}
    for cell in study.cells:
        if _numbers(cell.row):
            arms.setdefault(arm_of(cell.row), []).append(cell)
    for arm, cells in arms.items():
        with SummaryWriter(os.path.join(folder, re.sub(r"[/\\:\x00-\x1f]", "-", arm)[:_MAX_FOLDER_NAME])) as writer:
            for cell in cells:
                seed = cell.row["seed"]
                for name, value in _numbers(cell.row).items():
                    writer.add_scalar(name, value, seed)
                for i, loss in _training(cell):
                    writer.add_scalar(f"training/seed {seed}", loss, i + 1)


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return the finite numbers that were measured."""
    found = {name: value for name, value in row.items() if isinstance(value, (int, float)) and name not in _NOT_METRICS}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def _training(cell: Stored) -> list[tuple[int, float]]:
    """Return the finite losses of the recorded iterations, with their numbers."""
    losses = enumerate(float(one) for one in cell.details.get("training", []))
    return [(i, loss) for i, loss in losses if math.isfinite(loss)]


def _named(metric: str) -> str:
    return re.sub(r"[^\w.\- ]", "_", metric).strip(". ")[:250] or "_"
