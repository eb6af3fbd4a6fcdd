"""Checks of an Ascend installation below Python: driver, device files, CANN, NNAL, use of the cards."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ascend_kit.device.npu_smi import IDLE_HBM_MB, SmiInfo, SmiProcess, parse_info, parse_topo
from ascend_kit.doctor.findings import Section
from ascend_kit.doctor.host import Host
from ascend_kit.doctor.versions import numbers, stack

DRIVER_INFO = "/usr/local/Ascend/driver/version.info"
CANN_ROOTS = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann", "/usr/local/Ascend/latest")
CONTROL_FILES = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
CONTAINER_REMEDY = (
    "start the container with --device /dev/davinci0 (and each further card), --device /dev/davinci_manager, --device "
    "/dev/devmm_svm, --device /dev/hisi_hdc, and mount /usr/local/Ascend/driver/lib64, "
    "/usr/local/Ascend/driver/version.info, /usr/local/dcmi, /usr/local/bin/npu-smi and /etc/ascend_install.info"
)


@dataclass
class Installation:
    """What the hardware sections found, for the sections after them."""

    smi: SmiInfo | None = None
    driver: str | None = None
    cann: str | None = None

    @property
    def num_cards(self) -> int:
        return len(self.smi.chips) if self.smi else 0

    @property
    def is_a3(self) -> bool:
        """Atlas A3 prints two chips per NPU, all named Ascend910; 910B cards print their full name."""
        return self.smi is not None and any(chip.name == "Ascend910" for chip in self.smi.chips)


def ascend_signs(host: Host) -> list[str]:
    """Why this machine looks like an Ascend machine; empty on a plain one."""
    signs = {
        "device files": bool(device_files(host)),
        "npu-smi": host.which("npu-smi") is not None,
        "driver folder": host.exists(DRIVER_INFO),
        "CANN": find_cann(host) is not None,
        "ASCEND_HOME_PATH": "ASCEND_HOME_PATH" in host.env,
        "torch_npu": host.import_version("torch_npu") is not None,
    }
    return [name for name, is_there in signs.items() if is_there]


def device_files(host: Host) -> list[str]:
    """/dev/davinci0, /dev/davinci1, ... (the manager and virtual cards have other names)."""
    return [path for path in host.glob("/dev/davinci*") if re.fullmatch(r"/dev/davinci\d+", path)]


def is_container(host: Host) -> bool:
    """Whether this is inside a container, as far as the usual marks tell."""
    marks = host.exists("/.dockerenv") or host.exists("/run/.containerenv")
    return marks or "KUBERNETES_SERVICE_HOST" in host.env


def check_driver(host: Host, found: Installation) -> Section:
    """npu-smi, driver version and card health; fills `smi` and `driver`."""
    section = Section("Driver")
    inside = "mount the driver and npu-smi into the container, see Device files below" if is_container(host) else ""
    result = host.run(["npu-smi", "info"], timeout_s=60)
    if result.is_ok:
        _read_smi(section, result.stdout, found)
    else:
        remedy = "install the driver (HDK) and put npu-smi on PATH; it needs the group HwHiAiUser"
        section.fail("npu-smi", result.last_line(), inside or remedy)
    match = re.search(r"(?im)^version\s*=\s*(\S+)", host.read(DRIVER_INFO) or "")
    found.driver = match.group(1) if match else (found.smi.version if found.smi else None)
    if found.driver is None:
        remedy = "install the driver that the CANN release notes name"
        section.fail("driver version", f"{DRIVER_INFO} cannot be read", inside or remedy)
    else:
        is_old = numbers(found.driver) < numbers(stack()["graph_driver"])
        remedy = "25.5.1 or newer for graph_mode: older drivers run out of streams with many captured graphs (207008)"
        section.judge("driver version", found.driver, warn=remedy if is_old else "")
    return section


def _read_smi(section: Section, text: str, found: Installation) -> None:
    try:
        found.smi = parse_info(text)
    except ValueError as error:
        section.warn("npu-smi", str(error), "run `npu-smi info` by hand; the format may be newer than this doctor")
        return
    chips = found.smi.chips
    names = ", ".join(sorted({chip.name for chip in chips}))
    if not chips:
        remedy = "check the cards with `npu-smi info -l` and dmesg"
        section.fail("npu-smi", f"version {found.smi.version}, no card listed", remedy)
        return
    section.ok("npu-smi", f"version {found.smi.version}, {len(chips)} x {names}")
    sick = [f"NPU {chip.npu} chip {chip.chip}: {chip.health}" for chip in chips if not chip.is_healthy]
    remedy = "npu-smi info -t health -i N, then reset or replace the card; do not measure on it" if sick else ""
    section.judge("health", "; ".join(sick) or f"{len(chips)} of {len(chips)} OK", fail=remedy)
    hot = [f"NPU {chip.npu}: {chip.temperature_c:.0f} C" for chip in chips if (chip.temperature_c or 0) >= 90]
    if hot:
        section.warn("temperature", "; ".join(hot), "check the cooling: hot cards lower their clock")


def check_device_files(host: Host) -> Section:
    """/dev/davinci*, the control files, and whether this user may open them."""
    section = Section("Device files")
    cards = device_files(host)
    missing = [path for path in CONTROL_FILES if not host.exists(path)]
    if not cards or missing:
        lost = ([] if cards else ["/dev/davinci0 ..."]) + missing
        remedy = CONTAINER_REMEDY if is_container(host) else "load the driver (reboot after installing it), see dmesg"
        section.fail("present", f"missing: {', '.join(lost)}", remedy)
    else:
        evidence = f"{len(cards)} cards and {', '.join(path.removeprefix('/dev/') for path in CONTROL_FILES)}"
        section.ok("present", evidence)
    closed = [path for path in [*cards, *CONTROL_FILES] if host.exists(path) and not host.can_read_write(path)]
    if closed:
        evidence = f"cannot open {', '.join(closed)} (groups: {', '.join(host.groups()) or 'none'})"
        section.fail("permission", evidence, "usermod -aG HwHiAiUser <user>, then log in again")
    elif cards:
        section.ok("permission", "readable and writable")
    if len(cards) > 10 and host.import_version("ray"):
        remedy = f"Ray may count only single-digit cards: give ray start --resources '{{\"NPU\": {len(cards)}}}'"
        section.warn("ray", f"{len(cards)} device files", remedy)
    return section


def find_cann(host: Host) -> str | None:
    """Root folder of CANN: what the environment names, else the usual places."""
    named = host.env.get("ASCEND_HOME_PATH") or host.env.get("ASCEND_TOOLKIT_HOME")
    places = [*([named] if named else []), *CANN_ROOTS, f"{host.home()}/Ascend/ascend-toolkit/latest"]
    places += reversed(host.glob("/usr/local/Ascend/cann-[0-9]*"))  # the newest of several versions first
    return next((place for place in places if host.exists(place)), None)


def check_cann(host: Host, found: Installation) -> Section:
    """CANN root, set_env.sh sourced or not, version, operator package; fills `cann`."""
    section = Section("CANN")
    root, home = find_cann(host), host.env.get("ASCEND_HOME_PATH")
    if root is None:
        evidence = f"not found (ASCEND_HOME_PATH={home or 'not set'}, {', '.join(CANN_ROOTS)})"
        remedy = "install the CANN toolkit and the 910b operator package, or use a CANN image"
        section.fail("toolkit", evidence, remedy)
        return section
    section.ok("toolkit", root)
    if home is None:
        remedy = f"source {_set_env(host, root)} before starting Python, also in the notebook kernel and in services"
        section.fail("set_env.sh", "ASCEND_HOME_PATH is not set in this process", remedy)
    elif not host.exists(home):
        remedy = "an old CANN was removed: open a new shell and source set_env.sh of the one installed"
        section.fail("set_env.sh", f"ASCEND_HOME_PATH={home} does not exist", remedy)
    else:
        section.ok("set_env.sh", f"ASCEND_HOME_PATH={home}")
    found.cann = _cann_version(host, root)
    unknown = "" if found.cann else "the import section below asks torch_npu for it"
    section.judge("version", found.cann or f"no version file below {root}", warn=unknown)
    _check_operator_package(section, host, root, found)
    return section


def _set_env(host: Host, root: str) -> str:
    candidates = (f"{root}/set_env.sh", f"{root}/../set_env.sh", f"{root}/bin/setenv.bash")
    return next((path for path in candidates if host.exists(path)), "/usr/local/Ascend/ascend-toolkit/set_env.sh")


def _cann_version(host: Host, root: str) -> str | None:
    """Version of the toolkit; the file lies in a folder named after the processor, or in the root."""
    names = ("*/ascend_toolkit_install.info", "ascend_toolkit_install.info", "version.cfg", "version.info")
    versions = (_version_in(host.read(path) or "") for name in names for path in host.glob(f"{root}/{name}"))
    return next(filter(None, versions), None)


def _version_in(text: str) -> str | None:
    """ "version=9.1.0", "Version=8.3.RC1" or "toolkit_running_version=[9.1.0:9.1.0]"."""
    match = re.search(r"(?im)version\s*=\s*\[?(\d+\.\d+[\w.]*)", text)
    return match.group(1) if match else None


def _check_operator_package(section: Section, host: Host, root: str, found: Installation) -> None:
    """The binary kernels of this card (ascend910b for A2, ascend910_93 for A3), of the toolkit's version."""
    wanted = "ascend910_93" if found.is_a3 else "ascend910b"
    base = f"{root}/opp*/built-in/op_impl/ai_core/tbe/kernel"
    info = next(iter(host.glob(f"{root}/*/ascend_ops_install.info")), None)
    version = _version_in(host.read(info) or "") if info else None
    if version and found.cann and version != found.cann:
        remedy = "install both at one version: a mixed installation fails at the first call (500001)"
        section.fail("operator package", f"version {version}, toolkit {found.cann}", remedy)
    elif host.glob(f"{base}/{wanted}*") or host.glob(f"{base}/config/{wanted}*"):
        section.ok("operator package", wanted + (f", version {version}" if version else ""))
    else:
        have = sorted({path.rsplit("/", 1)[-1] for path in host.glob(f"{base}/ascend*")})
        remedy = (
            "install the 910b (A3: 910_93) operator package of the toolkit's version; "
            "without it the first call fails with 500001"
        )
        evidence = f"no {wanted} kernels below {root}/opp (found: {', '.join(have) or 'none'})"
        section.warn("operator package", evidence, remedy)


def check_nnal(host: Host) -> Section:
    """NNAL is optional: only `_npu_*` operators need it, and ascend_kit uses none of them."""
    section = Section("NNAL")
    home = host.env.get("ATB_HOME_PATH")
    if home and host.exists(home):
        section.ok("atb", f"ATB_HOME_PATH={home}")
    elif home:
        section.warn("atb", f"ATB_HOME_PATH={home} does not exist", "unset it, or source nnal/atb/set_env.sh again")
    elif host.exists("/usr/local/Ascend/nnal/atb"):
        section.ok("atb", "installed, set_env.sh not sourced; not needed here")
    else:
        section.na("atb", "not installed; optional, nothing here needs it")
    return section


def check_occupancy(section: Section, host: Host, smi: SmiInfo) -> None:
    """Memory in use and processes on the cards: leftovers of ended jobs use up memory early."""
    listed = "; ".join(_describe(host, process) for process in smi.processes)
    remedy = "end your own with kill <pid>; a pid not visible here belongs to another container or is already gone"
    section.judge("other processes", listed or "none listed by npu-smi", warn=remedy if listed else "")
    busy = {process.npu for process in smi.processes}
    full = [chip for chip in smi.chips if (chip.hbm_used_mb or 0) > IDLE_HBM_MB and chip.npu not in busy]
    held = [f"NPU {chip.npu} chip {chip.chip}: {chip.hbm_used_mb} of {chip.hbm_total_mb} MB" for chip in full]
    if held:
        remedy = (
            "leftovers of a killed job, or a process in another container: npu-smi info -t proc-mem -i N on the host"
        )
        section.warn("memory without a process", "; ".join(held), remedy)


def _describe(host: Host, process: SmiProcess) -> str:
    command = (host.read(f"/proc/{process.pid}/cmdline") or "").replace("\0", " ").strip()[:60]
    shown = command or f"{process.name or 'no name'} (pid not visible here)"
    return f"NPU {process.npu} pid {process.pid} {process.memory_mb or '?'} MB {shown}"


def check_links(section: Section, host: Host, found: Installation) -> None:
    """Links between the cards: a 910B machine has HCCS everywhere; slower links hurt tensor parallel."""
    links = parse_topo(host.run(["npu-smi", "info", "-t", "topo"], timeout_s=60).stdout)
    if not links:
        section.na("links", "npu-smi info -t topo prints no matrix")
        return
    slow = sorted((a, b) for (a, b), link in links.items() if a < b and link not in ("HCCS", "SIO", "HCCS_SW"))
    shown = ", ".join(f"{a}-{b} {links[a, b]}" for a, b in slow[:6]) + (" ..." if len(slow) > 6 else "")
    well = f"HCCS between all {len({a for a, _ in links})} cards"
    remedy = "keep tensor_parallel inside a group joined by HCCS" if slow else ""
    section.judge("links", f"{len(slow)} pairs without HCCS: {shown}" if slow else well, warn=remedy)
