"""Sweeps in MLflow, read back by the real client where it is installed."""

from importlib.util import find_spec

import pytest

from ascend_kit.identity import Identity
from ascend_kit.measure.rows import DEFAULTS
from ascend_kit.measure.tracking import log_sweep
from ascend_kit.params import ParameterError, build_experiment
from ascend_kit.results import RunFolder
from ascend_kit.run.checks import RunError, check_contents

needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")


def point(point_id, **changes):
    return {**DEFAULTS, "point_id": point_id, "backend": "ours", "concurrency": 4, "prompt_len": 64, "output_len": 32,
            "num_requests": 8, "repeat": 0, "quantize": "w8a8", "cards": 1, "graph_mode": True, "mfu": None,
            "output_tokens_per_s": 125.5, "ttft_p99_ms": 8.25, **changes}  # fmt: skip


@pytest.fixture
def experiment(tmp_path):
    return build_experiment({"output_root": str(tmp_path), "experiment": "tracked", "run": "a", "log_to": "mlflow"})


@pytest.fixture
def client(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # databases need more than mlflow-skinny
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    return mlflow.MlflowClient()


@pytest.fixture
def folder(experiment):
    with RunFolder.open(experiment, "04_throughput") as folder:
        folder.begin(experiment, "rows")
        (folder.path / "figures").mkdir()
        (folder.path / "figures/throughput.png").write_bytes(b"a picture")
        yield folder


def runs(client):
    """The run of the folder, and the others by their point."""
    experiment = client.get_experiment_by_name("tracked")
    every = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in every if "mlflow.parentRunId" not in run.data.tags]
    points = {run.data.params["point_id"]: run for run in every if run is not parent}
    assert len(points) == len(every) - 1, "a point stands twice"
    return parent, points


@needs_mlflow
def test_each_point_is_a_nested_run_with_its_parameters_numbers_and_identity(client, folder, experiment):
    identity = Identity(weights="abc")
    folder.append_all("rows", [point("one"), point("two", status="failed", error="out of memory")], identity)
    folder.append_all("rows", [point("never", status="pruned", error="too long")], identity)

    log_sweep(folder, experiment)

    parent, points = runs(client)
    assert points.keys() == {"one", "two"}
    one, two = points["one"], points["two"]
    assert one.data.metrics == {"output_tokens_per_s": 125.5, "ttft_p99_ms": 8.25}
    assert one.data.params.items() >= {
        "backend": "ours", "concurrency": "4", "quantize": "w8a8", "graph_mode": "True", "cards": "1", "repeat": "0",
    }.items()  # fmt: skip
    assert one.data.tags["mlflow.parentRunId"] == parent.info.run_id and one.data.tags["identity"] == identity.id
    assert one.info.run_name == "ours: concurrency 4, prompt 64, output 32, repeat 0"
    assert (one.info.status, two.info.status, parent.info.status) == ("FINISHED", "FAILED", "FAILED")
    assert two.data.params["error"] == "out of memory"
    assert parent.data.params["batch_size"] == str(experiment.batch_size) and "sweep" not in parent.data.params
    assert {one.path for one in client.list_artifacts(parent.info.run_id)} >= {
        "rows.jsonl",
        "identities.jsonl",
        "figures",
    }
    assert [one.path for one in client.list_artifacts(parent.info.run_id, "figures")] == ["figures/throughput.png"]


@needs_mlflow
def test_a_sweep_that_has_grown_adds_its_new_points_to_the_run_that_is_there(client, folder, experiment):
    folder.append_all("rows", [point("one")], Identity())
    log_sweep(folder, experiment)
    folder.append_all("rows", [point("two", concurrency=8)], Identity())

    log_sweep(folder, experiment.with_changes(sweep={"concurrency": [4, 8]}))
    log_sweep(folder, experiment)

    parent, points = runs(client)
    assert {name: run.data.params["concurrency"] for name, run in points.items()} == {"one": "4", "two": "8"}
    assert parent.info.status == "FINISHED"


@needs_mlflow
def test_nothing_is_logged_unless_it_is_asked_for(client, folder, experiment):
    folder.append_all("rows", [point("one")], Identity())

    log_sweep(folder, experiment.with_changes(log_to="none"))

    assert client.get_experiment_by_name("tracked") is None and folder.read_json("mlflow") is None


@pytest.mark.skipif(find_spec("mlflow") is not None, reason="mlflow is installed")
def test_a_missing_mlflow_is_one_error_before_any_work(folder, experiment):
    with pytest.raises(RunError, match="log_to: mlflow is not installed here: pip install"):
        check_contents(experiment, ["log_to"], converts=False)
    with pytest.raises(ParameterError, match="log_to: mlflow is not installed here"):
        log_sweep(folder, experiment)
