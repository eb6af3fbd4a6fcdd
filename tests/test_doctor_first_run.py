"""The first hour on a card: what is run, what the report holds, and what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from doctor_hosts import ascend_server, stage_output

from ascend_kit.device.device import select_device
from ascend_kit.doctor.checks import PREFIX, plain_ops_line
from ascend_kit.doctor.findings import OpCheck
from ascend_kit.doctor.first_run import SMALL, first_run, measure_model, without_names
from ascend_kit.doctor.host import CommandResult

SELF_TEST = "python -m ascend_kit.doctor.self_test --stage "
ROW = {
    "batch": 1, "graph_mode": True, "mode": "npu_graph", "steps": 100, "step_ms": 1.0, "tokens_per_s": 1000.0,
    "floor_ms": 0.8, "times_floor": 1.25, "bandwidth_gb_per_s": 1300.0, "weight_bytes": 1, "task_queue_level": 1,
}  # fmt: skip
STEPS = ["doctor", "device", "self-test", "capture", "two-card all-reduce", "random model"]


def server(*, ops: tuple[OpCheck, ...] = (OpCheck("ops", "rms_norm", "bf16", "ok", 0.001, 0.01),), **row: float):
    model = CommandResult(0, PREFIX + json.dumps({**ROW, **row}))
    return ascend_server(commands={SELF_TEST + "ops": stage_output(*ops), SELF_TEST + "model": model})


def run(host, folder: Path) -> tuple[int, dict, list[str]]:
    shown: list[str] = []
    code = first_run(host, "auto", folder / "report.json", seconds=1, small=False, show=shown.append)
    return code, json.loads((folder / "report.json").read_text()), shown


def test_all_parts_run_in_order_and_leave_versions_findings_and_numbers_in_one_file(tmp_path):
    code, report, shown = run(server(), tmp_path)

    assert code == 0 and [step["step"] for step in report["steps"]] == STEPS
    assert report["device"]["versions"]["torch_npu"] == "2.12.0.post2"
    assert len(report["steps"][0]["findings"]) > 20
    assert report["steps"][-1]["numbers"]["step_ms"] == 1.0 and "floor 0.80 ms" in report["steps"][-1]["evidence"]
    assert len(shown) == len(STEPS) + 1


def test_a_wrong_operator_ends_in_the_line_for_the_parameter_file_and_the_rest_goes_on(tmp_path):
    wrong = OpCheck("ops", "rotary", "bf16 T=1", "fail", 0.7, 0.02)

    code, report, _ = run(server(ops=(wrong,)), tmp_path)

    self_test = report["steps"][2]
    assert (code, self_test["status"], self_test["remedy"]) == (1, "fail", "plain_ops: [rotary]")
    assert [step["step"] for step in report["steps"]] == STEPS


def test_a_step_far_above_its_floor_is_a_warning_with_the_settings_to_look_at(tmp_path):
    code, report, _ = run(server(times_floor=9.0), tmp_path)

    assert (
        code == 0 and report["steps"][-1]["status"] == "warn" and "TASK_QUEUE_ENABLE=1" in report["steps"][-1]["remedy"]
    )


def test_the_report_names_no_host_no_address_and_no_path(tmp_path):
    run(server(), tmp_path)

    text = (tmp_path / "report.json").read_text()
    assert "server1" not in text and "192.0.2.11" not in text and "/usr/local" not in text and "/home/me" not in text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("server1 at 10.0.0.3", "<host> at <address>"),
        ("source /usr/local/Ascend/set_env.sh first", "source <path>/set_env.sh first"),
        ("~/.cache/x: 3 GiB", "<path>/x: 3 GiB"),
        ("see https://example.org/whl/cpu, params/demo.yaml", "see https://example.org/whl/cpu, params/demo.yaml"),
        ("13.5 of 64.0 GiB, 8/8 cards", "13.5 of 64.0 GiB, 8/8 cards"),
    ],
)
def test_names_are_cut_and_the_rest_is_left(text, wanted):
    assert without_names({"a": [text]}, ascend_server()) == {"a": [wanted]}


def test_plain_operators_are_those_that_failed_their_self_test():
    def check(op: str, status: str) -> OpCheck:
        return OpCheck("ops", op, "", status)  # type: ignore[arg-type]

    assert plain_ops_line([check("swiglu", "fail"), check("rotary", "fail"), check("linear", "ok")]) == (
        "plain_ops: [rotary, swiglu]"
    )
    assert plain_ops_line([check("linear", "ok")]) == ""


def test_a_random_model_is_measured_eager_and_in_graphs_beside_its_floor(device):
    rows = measure_model(select_device(device), SMALL, seconds=0.5)

    assert [(row["batch"], row["graph_mode"]) for row in rows] == [(1, False), (8, False), (1, True), (8, True)]
    assert all(row["steps"] >= 1 and row["step_ms"] > 0 and row["floor_ms"] > 0 for row in rows)
    assert rows[1]["floor_ms"] > rows[0]["floor_ms"], "more sequences, more keys and values to read"
