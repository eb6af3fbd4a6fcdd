"""Runs what touches a device in child processes: a hang, a crash or a failed import is an answer there, not an end.

Knows no torch: a child prints one JSON line per result as soon as it has it, so what was finished before a
hang is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from ascend_kit.device.advice import explain
from ascend_kit.doctor.findings import OpCheck, Section, Status
from ascend_kit.doctor.host import CommandResult, Host

PREFIX = "ascend_kit-self-test "
DISTRUST = "do not trust results of this device: run doctor --self-test and compare versions"
# First calls load kernels and set up channels: minutes are normal on a new machine.
TIMEOUT_S = {"probe": 240.0, "smoke": 300.0, "ops": 1200.0, "graph": 600.0, "collective": 420.0, "model": 900.0}


def run_child(host: Host, stage: str, device: str, on_row: Callable[[Any], None], *options: str) -> CommandResult:
    """How a stage ended in a process of its own; `on_row` gets each of its results as soon as it is there."""

    def take(line: str) -> None:
        if line.startswith(PREFIX):
            on_row(json.loads(line.removeprefix(PREFIX)))

    command = [host.python, "-m", "ascend_kit.doctor.self_test", "--stage", stage, "--device", device, *options]
    return host.run(command, timeout_s=TIMEOUT_S[stage], on_line=take)


def run_stage(host: Host, stage: str, device: str, on_check: Callable[[OpCheck], None] | None = None) -> list[OpCheck]:
    """Results of one stage on a device; one more, failed, that explains a process that hung or died."""
    checks: list[OpCheck] = []

    def add(row: dict[str, Any]) -> None:
        checks.append(OpCheck(**row))
        if on_check:
            on_check(checks[-1])

    result = run_child(host, stage, device, add)
    if not result.is_ok and not any(check.status == "fail" for check in checks):
        evidence, remedy = trouble(result)
        add(dict(stage=stage, op=f"{stage} process", case=device, status="fail", detail=evidence, remedy=remedy))
    return checks


def probe_device(host: Host, device: str) -> tuple[dict | None, tuple[str, str]]:
    """What torch says of itself and of the device, asked in a child; None and the trouble where it came not so far."""
    rows: list[dict] = []
    result = run_child(host, "probe", device, rows.append)
    return (rows[-1], ("", "")) if rows else (None, trouble(result))


def name_of(seen: dict) -> str:
    """What `select_device` takes for the device that was probed."""
    return seen["kind"] if seen["kind"] == "cpu" else f"{seen['kind']}:{seen['index']}"


def plain_ops_line(checks: Iterable[OpCheck]) -> str:
    """The line for a parameter file that keeps the operators that failed plain; empty when none failed."""
    failed = sorted({check.op for check in checks if check.stage == "ops" and check.status == "fail"})
    return f"plain_ops: [{', '.join(failed)}]" if failed else ""


def trouble(result: CommandResult) -> tuple[str, str]:
    """(evidence, remedy) for a child that did not end well, with the known error when there is one."""
    found = explain(result.text)
    if found:
        return f"{found[0].matched} ({found[0].key})", f"{found[0].meaning} {'; '.join(found[0].actions)}"
    if result.code is None and result.problem.startswith("no end"):
        return result.problem, (
            "a hang: try again with graph_mode: false and HCCL_OP_EXPANSION_MODE unset; look for a peer or "
            "a process that holds the card"
        )
    return result.last_line()[:300], "python -m ascend_kit doctor --explain <file with the full text>"


def add_stage(section: Section, host: Host, stage: str, device: str) -> None:
    """Run a stage and add one finding per result."""
    for check in run_stage(host, stage, device):
        status: Status = "n/a" if check.status == "skip" else check.status
        error = "" if check.error is None else f"error {check.error:.1e} (allowed {check.tolerance:.0e}) "
        remedy = check.remedy or (DISTRUST if check.status == "fail" else "")
        section.add(status, check.op, f"{error}{check.detail or check.case}".strip(), remedy)
