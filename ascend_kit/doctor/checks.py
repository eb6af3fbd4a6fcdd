"""The checklist, in order, from the driver up to the workbench.

Driver, device files, CANN, NNAL, versions, import, devices, first operators, two ranks, a graph, variables,
host tuning, several machines, compiler and packages.

Each section is `ok`, `warn`, `fail` or `n/a` item by item. On a machine without any sign of Ascend the
vendor's sections are n/a and the rest still helps. Everything that touches a device runs in a child
process, where a hang, a crash or a failed import is an answer and not an end: it prints one JSON line per result as
soon as it has it, so what was finished before a hang is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ascend_kit.device.advice import explain
from ascend_kit.doctor import hardware, machine, network
from ascend_kit.doctor.findings import Finding, OpCheck, Section, Status
from ascend_kit.doctor.host import CommandResult, Host
from ascend_kit.doctor.variables import check_variables
from ascend_kit.doctor.versions import check_cann_pair, check_torch_build, check_versions

NO_ASCEND = "no Ascend card or software on this machine"
VENDOR_SECTIONS = ("Driver", "Device files", "CANN", "NNAL", "Versions")
DEVICE_SECTIONS = ("Import", "Devices", "First operators", "Two ranks", "Graph")  # each needs the one before it
MIN_FREE_SHARE = 0.85  # of a card's memory, before anything of ours runs

PREFIX = "ascend_kit-self-test "
DISTRUST = "do not trust results of this device: run doctor --self-test and compare versions"
# First calls load kernels and set up channels: minutes are normal on a new machine.
TIMEOUT_S = {"probe": 240.0, "smoke": 300.0, "ops": 1200.0, "graph": 600.0, "collective": 420.0, "model": 900.0}


def run_checks(
    host: Host | None = None,
    *,
    device: str = "auto",
    peers: Sequence[str] = (),
    use_device: bool = True,
    graph_mode: bool = True,
    on_section: Callable[[list[Finding]], None] | None = None,
) -> list[Finding]:
    """The whole checklist as findings, in order.

    `device` as in the parameters ("npu" makes a missing card a failure); `peers` are card addresses on
    other machines; `use_device=False` only reads, and starts nothing on a card; `graph_mode` as in the
    parameters; `on_section` receives each
    section when it is done.
    """
    findings: list[Finding] = []
    for section in _sections(host or Host(), device, peers, use_device, graph_mode):
        findings += section
        if on_section and section:
            on_section(section)
    return findings


def _sections(host: Host, device: str, peers: Sequence[str], use_device: bool, graph_mode: bool) -> Iterator[Section]:
    """One by one, so that each is shown when it is ready."""
    signs = hardware.ascend_signs(host)
    is_ascend = bool(signs) or device.split(":")[0] in ("npu", "ascend")
    found = hardware.Installation()
    yield machine.check_machine(host, signs)
    if is_ascend:
        yield hardware.check_driver(host, found)
        yield hardware.check_device_files(host)
        yield hardware.check_cann(host, found)
        yield hardware.check_nnal(host)
        yield check_versions(host, found.cann, found.driver)
    else:
        yield from _not_tried(VENDOR_SECTIONS, NO_ASCEND)
    if use_device:
        yield from _device_sections(host, found, "npu" if is_ascend and device == "auto" else device)
    else:
        yield from _not_tried(DEVICE_SECTIONS, "device not used (--no-device)")
    if is_ascend:
        yield check_variables(host, found.num_cards, graph_mode)
    else:
        yield from _not_tried(["Environment variables"], NO_ASCEND)
    yield machine.check_tuning(host, is_ascend)
    if is_ascend or peers:
        npu_ids = sorted({chip.npu for chip in found.smi.chips}) if found.smi else []
        yield network.check_network(host, npu_ids, peers, found.is_a3)
    else:
        yield from _not_tried([network.SECTION], NO_ASCEND)
    yield machine.check_workbench(host)


def _not_tried(names: Sequence[str], reason: str) -> Iterator[Section]:
    for name in names:
        section = Section(name)
        section.na("all", reason)
        yield section


def _device_sections(host: Host, found: hardware.Installation, device: str) -> Iterator[Section]:
    section = Section("Import")
    seen, trouble = probe_device(host, device)
    if seen is None:
        section.fail("torch", *trouble)
        yield section
        yield from _not_tried(DEVICE_SECTIONS[1:], "the import failed")
        return
    section.ok("torch", ", ".join(f"{name} {version}" for name, version in seen["versions"].items()))
    if seen["kind"] == "npu":
        check_torch_build(section, seen["versions"]["torch"])
        level = seen["task_queue_level"]  # as that process has it: conda's variables and kernels may differ
        remedy = "" if level == 1 else "export TASK_QUEUE_ENABLE=1 for the process that runs the engine"
        section.judge("task queue in force", f"level {level}", warn=remedy)
    if found.cann is None and seen["versions"].get("cann", "unknown") != "unknown":
        check_cann_pair(section, seen["versions"]["torch_npu"], seen["versions"]["cann"])
    yield section
    yield _devices(host, found, seen)
    yield from _trials(host, seen)


def _devices(host: Host, found: hardware.Installation, seen: dict) -> Section:
    """Number, name and free memory of the devices, and who else is on them."""
    section = Section("Devices")
    free, total = seen["free_bytes"], seen["total_bytes"]
    shown = f"{seen['count']} x {seen['name']}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if seen["kind"] == "cpu":
        section.ok("device", f"cpu: {seen['name']}, {seen['threads']} torch threads")
        return section
    held = "something already holds memory of this card; see the processes below"
    section.judge("device", shown, warn=held if free < MIN_FREE_SHARE * total else "")
    if seen["kind"] == "npu" and found.smi and seen["count"] < found.num_cards:
        visible = host.env.get("ASCEND_RT_VISIBLE_DEVICES")
        shown = f"{seen['count']} of {found.num_cards} cards (ASCEND_RT_VISIBLE_DEVICES={visible or 'not set'})"
        section.judge("visible", shown, warn="" if visible else "check the device files of the container")
    unknown = "" if seen["peak"] else "rooflines show n/a; add the card to PEAKS in device/peaks.py"
    section.judge("peak table", seen["peak"] or f"no figures for {seen['name']}", warn=unknown)
    if found.smi:
        hardware.check_occupancy(section, host, found.smi)
        hardware.check_links(section, host, found)
    return section


def _trials(host: Host, seen: dict) -> Iterator[Section]:
    """A few operators, a collective and a graph; the last two only where there is something to try."""
    is_cpu = seen["kind"] == "cpu"
    for name, stage, check, is_there in (
        ("First operators", "smoke", "", True),
        ("Two ranks", "collective", "all-reduce", seen["count"] > 1),
        ("Graph", "graph", "capture", not is_cpu),
    ):
        section = Section(name)
        if not is_there:
            section.na(check, "on the CPU with --self-test" if is_cpu else "one device")
        for one in run_stage(host, stage, name_of(seen)) if is_there else ():
            error = "" if one.error is None else f"error {one.error:.1e} (allowed {one.tolerance:.0e}) "
            remedy = one.remedy or (DISTRUST if one.status == "fail" else "")
            status: Status = "n/a" if one.status == "skip" else one.status
            section.add(status, one.op, f"{error}{one.detail or one.case}".strip(), remedy)
        yield section


# --- child processes -----------------------------------------------------------------------------------------------


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
