"""Writers: a study's rows and training curves for MLflow and TensorBoard, where they are installed."""

from __future__ import annotations

import math
import os
import re
import time
from typing import Any

from whichkl._checks import InputError
from whichkl.study.arms import arm_of
from whichkl.study.ledger import Stored
from whichkl.study.result import Study

_NOT_METRICS = ("seed", "budget")
_MAX_METRICS_PER_CALL = 1_000
"""Limit of MLflow."""
_MAX_FOLDER_NAME = 200


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
