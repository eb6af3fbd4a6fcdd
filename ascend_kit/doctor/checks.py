"""The checklist, in order, from the driver up to the workbench.

Driver, device files, CANN, NNAL, versions, import, devices, first operators, two ranks, a graph, variables,
host tuning, several machines, compiler and packages.

Each section is `ok`, `warn`, `fail` or `n/a` item by item. On a machine without any sign of Ascend the
vendor's sections are n/a and the rest still helps. Everything that touches a device runs in a child
process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ascend_kit.doctor import hardware, machine
from ascend_kit.doctor.findings import Finding, Section
from ascend_kit.doctor.host import Host
from ascend_kit.doctor.network import SECTION as NETWORK_SECTION
from ascend_kit.doctor.network import check_network
from ascend_kit.doctor.stages import add_stage, probe_device, trouble
from ascend_kit.doctor.variables import check_variables
from ascend_kit.doctor.versions import check_cann_pair, check_torch_build, check_versions

NO_ASCEND = "no Ascend card or software on this machine"
VENDOR_SECTIONS = ("Driver", "Device files", "CANN", "NNAL", "Versions")
MIN_FREE_SHARE = 0.85  # of a card's memory, before anything of ours runs

OnSection = Callable[[list[Finding]], None]


def run_checks(
    host: Host | None = None,
    *,
    device: str = "auto",
    peers: Sequence[str] = (),
    use_device: bool = True,
    graph_mode: bool = True,
    on_section: OnSection | None = None,
) -> list[Finding]:
    """The whole checklist as findings, in order.

    `device` as in the parameters ("npu" makes a missing card a failure); `peers` are card addresses on
    other machines; `use_device=False` only reads, and starts nothing on a card; `graph_mode` as in the
    parameters; `on_section` receives each
    section when it is done.
    """
    host = host or Host()
    findings: list[Finding] = []

    def done(section_findings: list[Finding]) -> None:
        findings.extend(section_findings)
        if on_section and section_findings:
            on_section(section_findings)

    signs = hardware.ascend_signs(host)
    is_ascend = bool(signs) or device.split(":")[0] in ("npu", "ascend")
    found = hardware.Installation()
    done(machine.check_machine(host, signs).findings)
    for section in _vendor_sections(host, found, is_ascend):
        done(section.findings)
    for section in _device_sections(host, found, device, is_ascend, use_device):
        done(section.findings)
    done(check_variables(host, found.num_cards, graph_mode) if is_ascend else _not_here("Environment variables"))
    done(machine.check_tuning(host, is_ascend).findings)
    npu_ids = sorted({chip.npu for chip in found.smi.chips}) if found.smi else []
    done(check_network(host, npu_ids, peers, found.is_a3) if is_ascend or peers else _not_here(NETWORK_SECTION))
    done(machine.check_workbench(host).findings)
    return findings


def _not_here(name: str) -> list[Finding]:
    return [Finding(name, "all", "n/a", NO_ASCEND)]


def _vendor_sections(host: Host, found: hardware.Installation, is_ascend: bool):
    """Sections below Python, one by one, so that each is shown when it is ready."""
    if not is_ascend:
        for name in VENDOR_SECTIONS:
            section = Section(name)
            section.na("all", NO_ASCEND)
            yield section
        return
    yield hardware.check_driver(host, found)
    yield hardware.check_device_files(host, found)
    yield hardware.check_cann(host, found)
    yield hardware.check_nnal(host, found)
    section = Section("Versions")
    check_versions(section, host, found.cann, found.driver)
    yield section


def _device_sections(host: Host, found: hardware.Installation, device: str, is_ascend: bool, use_device: bool):
    """Import, devices, first operators, two ranks, graph: each needs the one before it."""
    wanted = "npu" if is_ascend and device == "auto" else device
    names = ("Import", "Devices", "First operators", "Two ranks", "Graph")
    if not use_device:
        yield from _skip(names, "device not used (--no-device)")
        return
    section = Section("Import")
    seen, result = probe_device(host, wanted)
    if seen is None:
        section.fail("torch", *trouble(result))
        yield section
        yield from _skip(names[1:], "the import failed")
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


def _skip(names: Sequence[str], reason: str):
    for name in names:
        section = Section(name)
        section.na("all", reason)
        yield section


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


def _trials(host: Host, seen: dict):
    """A few operators, a collective and a graph; the last two only where there is something to try."""
    device = seen["kind"] if seen["kind"] == "cpu" else f"{seen['kind']}:{seen['index']}"
    section = Section("First operators")
    add_stage(section, host, "smoke", device)
    yield section
    section = Section("Two ranks")
    if seen["count"] > 1:
        add_stage(section, host, "collective", device)
    else:
        section.na("all-reduce", "one device" if seen["kind"] != "cpu" else "on the CPU with --self-test")
    yield section
    section = Section("Graph")
    if seen["kind"] == "cpu":
        section.na("capture", "on the CPU with --self-test")
    else:
        add_stage(section, host, "graph", device)
    yield section
