"""Runs the self-test in child processes: a hang, a crash or a failed import is an answer there, not an end.

Knows no torch: a child prints one JSON line per result as soon as it has it, so what was finished before a
hang is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from ascend_kit.device.advice import explain
from ascend_kit.doctor.findings import Section, Status
from ascend_kit.doctor.host import CommandResult, Host

PREFIX = "ascend_kit-self-test "
DISTRUST = "do not trust results of this device: run doctor --self-test and compare versions"
# First calls load kernels and set up channels: minutes are normal on a new machine.
TIMEOUT_S = {"probe": 240.0, "smoke": 300.0, "ops": 1200.0, "graph": 600.0, "collective": 420.0}


@dataclass(frozen=True)
class OpCheck:
    """One comparison: `error` is the largest difference over the largest wanted value (None: not run)."""

    stage: str
    op: str
    case: str
    status: Literal["ok", "fail", "skip"]
    error: float | None = None
    tolerance: float | None = None
    seconds: float = 0.0
    detail: str = ""
    remedy: str = ""

    def to_line(self) -> str:
        return PREFIX + json.dumps(asdict(self))

    def describe(self) -> str:
        """One row of the self-test's table."""
        error = "" if self.error is None else f"{self.error:9.2e}"
        bound = "" if self.tolerance is None else f"<= {self.tolerance:.0e}"
        text = f"{self.detail}. {self.remedy}" if self.remedy else self.detail
        return f"  [{self.status:^4}] {self.op:<18} {self.case:<46} {error:>9} {bound:<9} {text}".rstrip()


def run_stage(host: Host, stage: str, device: str, on_check: Callable[[OpCheck], None] | None = None) -> list[OpCheck]:
    """Results of one stage on a device; one more, failed, that explains a process that hung or died."""
    checks: list[OpCheck] = []

    def add(check: OpCheck) -> None:
        checks.append(check)
        if on_check:
            on_check(check)

    def take(line: str) -> None:
        if line.startswith(PREFIX):
            add(OpCheck(**json.loads(line.removeprefix(PREFIX))))

    command = [host.python, "-m", "ascend_kit.doctor.self_test", "--stage", stage, "--device", device]
    result = host.run(command, timeout_s=TIMEOUT_S[stage], on_line=take)
    if not result.is_ok and not any(check.status == "fail" for check in checks):
        evidence, remedy = trouble(result)
        add(OpCheck(stage, f"{stage} process", device, "fail", detail=evidence, remedy=remedy))
    return checks


def probe_device(host: Host, device: str) -> tuple[dict | None, CommandResult]:
    """What torch says of itself and of the device, asked in a child; None when it did not get that far."""
    command = [host.python, "-m", "ascend_kit.doctor.self_test", "--stage", "probe", "--device", device]
    result = host.run(command, timeout_s=TIMEOUT_S["probe"])
    lines = [line for line in result.stdout.splitlines() if line.startswith(PREFIX)]
    return (json.loads(lines[-1].removeprefix(PREFIX)) if lines else None), result


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
