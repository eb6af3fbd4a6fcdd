"""A sweep in MLflow: a run for the run folder, below it one for each measured point with its parameters and numbers.

Where it is kept is MLflow's own matter (MLFLOW_TRACKING_URI). MLflow never changes a parameter: those that may grow
within a run folder are in the artifact params.yaml and, where they are of a point, in the point's run.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.measure.rows import KEY, Point, asked_rows, key_of
from ascend_kit.params.engines import OWN_SETTINGS
from ascend_kit.params.values import ParameterError
from ascend_kit.stages import FREE, GROWING

if TYPE_CHECKING:
    from ascend_kit.params import Experiment
    from ascend_kit.results import RunFolder

NUMBERS = (*KEY, *OWN_SETTINGS, "num_devices", "slots", "cpu_cores")  # columns that are parameters though numbers
TABLES = ("rows", "identities")
MOST = 100  # parameters in one call
LONGEST = 500  # characters of a parameter that every version of MLflow takes


def require_tracker(experiment: Experiment) -> None:
    """ParameterError where `log_to` asks for a package that is not installed."""
    if experiment.log_to == "mlflow" and find_spec("mlflow") is None:
        raise ParameterError("log_to: mlflow is not installed here: pip install ascend-kit[mlflow], or leave it out")


def log_sweep(folder: RunFolder, experiment: Experiment) -> None:
    """Write what the folder's sweep has measured to where `log_to` says; points that are there stay as they are.

    Raises what MLflow raises where its server cannot be reached; the folder is complete without it.
    """
    require_tracker(experiment)
    if experiment.log_to != "mlflow":
        return
    mlflow = import_module("mlflow")  # known to no type checker: it may not be installed
    client = mlflow.MlflowClient()

    def log(run_id: str, parameters: dict[str, Any], metrics: dict[str, float]) -> None:
        params = [mlflow.entities.Param(name, str(value)[:LONGEST]) for name, value in parameters.items()]
        for start in range(0, len(params), MOST):
            client.log_batch(run_id, params=params[start : start + MOST])
        client.log_batch(run_id, metrics=[mlflow.entities.Metric(name, value, 0, 0) for name, value in metrics.items()])

    found = client.get_experiment_by_name(experiment.experiment)
    place = client.create_experiment(experiment.experiment) if found is None else found.experiment_id
    known = folder.read_json("mlflow") or {}
    if known.get("tracking_uri") != client.tracking_uri:
        run = client.create_run(place, run_name=experiment.run, tags={"run_folder": str(folder.path)})
        known = {"tracking_uri": client.tracking_uri, "run_id": run.info.run_id, "points": {}}
        fixed = {name: value for name, value in experiment.model_dump().items() if name not in FREE | GROWING}
        log(known["run_id"], fixed, {})
    rows = [row for row in asked_rows(folder) if row["status"] != "pruned"]
    try:
        for row in rows:
            if row["point_id"] not in known["points"]:
                tags = {"mlflow.parentRunId": known["run_id"], "identity": str(row["identity"])}
                name = f"{row['backend']}: {Point(*key_of(row))}"
                point = client.create_run(place, tags=tags, run_name=name).info.run_id
                log(point, *_split(row))
                client.set_terminated(point, "FINISHED" if row["status"] == "ok" else "FAILED")
                known["points"][row["point_id"]] = point
    finally:  # what is there must not be written twice
        folder.write_json("mlflow", known)
    files = [*folder.path.glob("*.yaml"), folder.path / f"{folder.stage}.json", *map(folder.written_path, TABLES)]
    client.log_text(known["run_id"], experiment.to_yaml(), "params.yaml")
    for path in filter(Path.exists, files):
        client.log_artifact(known["run_id"], str(path))
    for path in (folder.path / "figures").glob("*.png"):
        client.log_artifact(known["run_id"], str(path), "figures")
    client.set_terminated(known["run_id"], "FINISHED" if all(row["status"] == "ok" for row in rows) else "FAILED")


def _split(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """The parameters and the metrics of a row."""
    known = {name: value for name, value in row.items() if value is not None}
    numbers = {name for name, value in known.items() if type(value) in (int, float)}.difference(NUMBERS)
    metrics = {name: float(known[name]) for name in known if name in numbers}
    return {name: value for name, value in known.items() if name not in numbers}, metrics
