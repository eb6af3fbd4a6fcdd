"""Checks for any machine, a laptop included: CPU, memory, disk, compiler, packages, host tuning."""

from __future__ import annotations

import re

from ascend_kit.doctor.findings import Section
from ascend_kit.doctor.host import Host
from ascend_kit.files import GIB

SYSCTLS = (  # name, wanted value, what another value costs
    ("kernel.numa_balancing", 0, "moves pages under the launch threads"),
    ("vm.swappiness", 0, "weights in page cache may push the process to swap"),
    ("kernel.sched_migration_cost_ns", 50000, "launch threads move between CPUs"),
)
GOVERNORS = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"


def check_machine(host: Host, signs: list[str]) -> Section:
    """What kind of machine this is, its CPUs and its memory."""
    section = Section("Machine")
    kind = f"Ascend machine ({', '.join(signs)})" if signs else "no Ascend card here: everything runs on the CPU"
    if not signs and host.glob("/dev/nvidia[0-9]*"):
        kind = "NVIDIA cards, no Ascend card"
    section.ok("kind", f"{kind}; {host.system}, {host.machine}")
    _check_cpus(section, host)
    _check_memory(section, host)
    return section


def _check_cpus(section: Section, host: Host) -> None:
    match = re.search(r"(?m)^(?:model name|Hardware)\s*:\s*(.+)$", host.read("/proc/cpuinfo") or "")
    usable, quota = host.cpu_count(), _cpu_quota(host)
    shown = f"{usable} usable" + (f", {match.group(1).strip()}" if match else "")
    if quota is not None and quota < usable:
        remedy = f"OMP_NUM_THREADS={max(1, int(quota))}: more threads than that only wait for each other"
        section.warn("cpus", f"{shown}, but the container may use {quota:g}", remedy)
    else:
        section.ok("cpus", shown)
    threads = host.env.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > usable:
        section.warn("threads", f"OMP_NUM_THREADS={threads} on {usable} CPUs", f"OMP_NUM_THREADS={usable} or fewer")


def _cpu_quota(host: Host) -> float | None:
    """CPUs granted by cgroup v2, None without a limit."""
    words = (host.read("/sys/fs/cgroup/cpu.max") or "").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0].isdigit() else None


def _check_memory(section: Section, host: Host) -> None:
    match = re.search(r"MemAvailable:\s+(\d+) kB", host.read("/proc/meminfo") or "")
    total = host.total_memory_bytes()
    limit = (host.read("/sys/fs/cgroup/memory.max") or "").strip()
    total = min(total, int(limit)) if limit.isdigit() else total
    available = min(total, int(match.group(1)) * 1024) if match else total
    shown = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    low = "the demo needs about 2 GiB: close other programs" if available < 2 * GIB else ""
    tip = "converting a 7B checkpoint streams shards and needs about 6 GiB; running one on the CPU needs about 20 GiB"
    section.judge("memory", shown, warn=low, tip="" if available > 20 * GIB else tip)


def check_tuning(host: Host, is_ascend: bool) -> Section:
    """CPU governor, NUMA balancing, swapping and allocator: the host side of small launch times."""
    section = Section("Host tuning")
    governors = sorted({(host.read(path) or "").strip() for path in host.glob(GOVERNORS)} - {""})
    if not governors:
        section.na("cpu governor", "no frequency control here (virtual machine or container)")
    else:
        remedy = "cpupower frequency-set -g performance: eager decode waits for the host, and timings jump about"
        section.judge("cpu governor", ", ".join(governors), warn="" if governors == ["performance"] else remedy)
    for name, wanted, cost in SYSCTLS:
        path = f"/proc/sys/{name.replace('.', '/')}"
        value = (host.read(path) or "").strip()
        if not is_ascend:
            section.na(name, "matters for Ascend hosts only")
        elif not value:
            section.na(name, f"{path} not readable")
        else:
            section.judge(name, value, warn="" if value == str(wanted) else f"sysctl -w {name}={wanted}: {cost}")
    if is_ascend:
        preload = host.env.get("LD_PRELOAD", "")
        found = next((name for name in ("jemalloc", "tcmalloc") if name in preload), None)
        tip = "" if found else "LD_PRELOAD of jemalloc or tcmalloc shortens host time"
        section.ok("host allocator", found or "glibc", tip)
    return section


def check_workbench(host: Host) -> Section:
    """What the notebooks need: compiler, packages at the right versions, disk, a writable cache."""
    section = Section("Workbench")
    _check_compiler(section, host)
    _check_packages(section, host)
    _check_disk(section, host)
    return section


def _check_compiler(section: Section, host: Host) -> None:
    names = [host.env["CXX"]] if host.env.get("CXX") else ["g++", "clang++", "c++"]
    compiler = next((path for path in map(host.which, names) if path), None)
    if compiler is None:
        remedy = "graph_mode on a CPU compiles the decode step: install g++ (apt install g++), or set graph_mode: false"
        section.warn("c++ compiler", f"none of {', '.join(names)}", remedy)
    elif not host.exists(f"{host.python_include()}/Python.h"):
        remedy = "graph_mode on a CPU needs the headers of Python: install python3-dev, or set graph_mode: false"
        section.warn("c++ compiler", f"{compiler}, but no Python.h in {host.python_include()}", remedy)
    else:
        section.ok("c++ compiler", compiler)


def _check_packages(section: Section, host: Host) -> None:
    """Every requirement of ascend-kit's own metadata, extras left out."""
    requirements = host.requirements("ascend-kit")
    if requirements is None:
        section.warn("packages", "ascend-kit is not installed", "pip install -e . in the repository")
        return
    wrong = []
    for requirement in requirements:
        version = host.import_version(requirement.name)
        if version is None:
            wrong.append(f"{requirement.name} missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} (needs {requirement.specifier})")
    if wrong:
        section.fail("packages", "; ".join(wrong), "pip install -e . brings them to the versions asked for")
    else:
        section.ok("packages", f"{len(requirements)} requirements met")
    if host.import_version("vllm-ascend") and (host.import_version("torch") or "").startswith("2.13"):
        remedy = "no vllm-ascend release uses torch 2.13: give it an environment of its own"
        section.warn("vllm-ascend", f"vllm-ascend {host.import_version('vllm-ascend')} beside torch 2.13", remedy)
    ray = host.import_version("ray")
    section.add("ok" if ray else "n/a", "ray", ray or "not installed; needed for cards > 1 only")


def _check_disk(section: Section, host: Host) -> None:
    cache = host.env.get("XDG_CACHE_HOME") or f"{host.home()}/.cache"
    for check, folder, needed, purpose in (
        ("outputs folder", ".", 20, "a converted 7B checkpoint takes 15 GB in bf16"),
        ("cache folder", host.env.get("HF_HOME") or cache, 1, "compiled steps and data sets are kept there"),
    ):
        free = host.free_disk_bytes(folder if host.exists(folder) else host.home())
        shown = f"{folder}: {'unknown' if free is None else f'{free / GIB:.0f} GiB'} free"
        if not host.can_create_in(folder):
            remedy = "work in a folder of your own, or set XDG_CACHE_HOME and HF_HOME"
            section.fail(check, f"{folder} cannot be written", remedy)
        else:
            section.judge(check, shown, warn=purpose if free is not None and free < needed * GIB else "")
