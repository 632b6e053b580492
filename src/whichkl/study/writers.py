"""Writers: a study's rows for MLflow and TensorBoard, where they are installed."""

from __future__ import annotations

import math
import os
from typing import Any

from whichkl._checks import InputError
from whichkl.study.result import Study

_NOT_METRICS = ("seed", "budget")


def to_mlflow(study: Study, experiment: str = "whichkl") -> None:
    """Log each cell as an MLflow run: its arm and seed as parameters, its finite numbers as metrics, its status as a tag.

    Raises:
        InputError: MLflow isn't installed.
    """
    try:
        import mlflow  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        raise InputError("Cannot log to MLflow: it isn't installed. Run: pip install mlflow.") from error
    mlflow.set_experiment(experiment)
    for row in study.rows:
        with mlflow.start_run(run_name=f"{row['family']} · {row['objective']} · seed {row['seed']}"):
            mlflow.log_params({name: row[name] for name in ("family", "objective", "seed", "budget")})
            mlflow.set_tags({"cell": row["cell"], "status": row["status"], **({"error": row["error"]} if row["error"] else {})})
            mlflow.log_metrics(_numbers(row))


def to_tensorboard(study: Study, folder: str | os.PathLike[str]) -> None:
    """Write a TensorBoard run for each arm, its finite numbers as scalars over the seeds.

    Raises:
        InputError: TensorBoard isn't installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise InputError("Cannot write for TensorBoard: it isn't installed. Run: pip install tensorboard.") from error
    for row in study.rows:
        arm = f"{row['family']} {row['objective']}".replace("/", "-")
        with SummaryWriter(os.path.join(folder, arm), filename_suffix=f"-{row['seed']}") as writer:
            for name, value in _numbers(row).items():
                writer.add_scalar(name, value, row["seed"])


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The finite numbers that were measured."""
    found = {name: value for name, value in row.items() if isinstance(value, (int, float)) and name not in _NOT_METRICS}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}
