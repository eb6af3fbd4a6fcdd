"""Machines as data, for the doctor's tests: files, commands and packages of hosts in every state."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import asdict
from pathlib import Path

from packaging.requirements import Requirement

from ascend_kit.doctor.checks import PREFIX
from ascend_kit.doctor.findings import Finding, OpCheck
from ascend_kit.doctor.host import CommandResult, Host

DATA = Path(__file__).parent / "data"
ROOT = "/usr/local/Ascend/ascend-toolkit/latest"
ORDER = [
    "Machine", "Driver", "Device files", "CANN", "NNAL", "Versions", "Import", "Devices", "First operators",
    "Two ranks", "Graph", "Environment variables", "Host tuning", "Several machines", "Workbench",
]  # fmt: skip
STAGE = "python -m ascend_kit.doctor.self_test --stage "


def sample(name: str) -> str:
    return (DATA / f"npu_smi_{name}.txt").read_text()


class FakeHost(Host):
    """Answers from dictionaries; a command by the longest of `commands` it begins with."""

    def __init__(self, **known) -> None:
        self.env = dict(known.pop("env", {}))
        self.files: dict[str, str] = dict(known.pop("files", {}))
        self.commands: dict[str, CommandResult] = dict(known.pop("commands", {}))
        self.packages: dict[str, str] = dict(known.pop("packages", {}))
        self.closed: set[str] = set(known.pop("closed", ()))
        self.free_disk = known.pop("free_disk", 500 * 2**30)
        self.memory = known.pop("memory", 64 * 2**30)
        self.cpus = known.pop("cpus", 8)
        self.python, self.python_version = "python", known.pop("python_version", "3.11.9")
        self.machine, self.system = known.pop("machine", "aarch64"), "Linux 5.10"
        assert not known, f"unknown state {known}"

    def run(self, command, timeout_s=20.0, on_line=None) -> CommandResult:
        words = " ".join(command)
        names = [name for name in self.commands if words == name or words.startswith(name + " ")]
        if not names:
            return CommandResult(None, problem=f"{command[0]}: No such file or directory")
        result = self.commands[max(names, key=len)]
        for line in result.stdout.splitlines() if on_line else ():
            on_line(line)
        return result

    def which(self, program: str) -> str | None:
        found = f"/usr/bin/{program}"
        return found if found in self.files or any(n.split()[0] == program for n in self.commands) else None

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def exists(self, path: str) -> bool:
        return path in self.files or any(name.startswith(path.rstrip("/") + "/") for name in self.files)

    def glob(self, pattern: str) -> list[str]:
        parts = pattern.count("/")
        prefixes = {"/".join(name.split("/")[: parts + 1]) for name in self.files}
        return sorted(name for name in prefixes if fnmatch.fnmatch(name, pattern))

    def can_read_write(self, path: str) -> bool:
        return path not in self.closed

    def import_version(self, package: str) -> str | None:
        return self.packages.get(package.replace("-", "_"), self.packages.get(package))

    def requirements(self, package: str) -> list[Requirement] | None:
        return [Requirement("torch>=2.9")] if package == "ascend-kit" else None

    def groups(self) -> list[str]:
        return ["users"]

    def cpu_count(self) -> int:
        return self.cpus

    def total_memory_bytes(self) -> int:
        return self.memory

    def free_disk_bytes(self, path: str) -> int | None:
        return self.free_disk

    def can_create_in(self, folder: str) -> bool:
        return folder not in self.closed

    def python_include(self) -> str:
        return "/usr/include/python3"

    def home(self) -> str:
        return "/home/me"

    def hostname(self) -> str:
        return "server1"

    def resolve(self, name: str) -> str | None:
        return "192.0.2.11"


COMMON_FILES = {
    "/proc/meminfo": "MemTotal: 67108864 kB\nMemAvailable: 60000000 kB\n",
    "/proc/cpuinfo": "model name\t: Test CPU\n",
    "/usr/bin/g++": "",
    "/usr/include/python3/Python.h": "",
}


def line_of(check: OpCheck) -> str:
    return PREFIX + json.dumps(asdict(check))


def stage_output(*checks: OpCheck) -> CommandResult:
    failed = any(check.status == "fail" for check in checks)
    return CommandResult(int(failed), "\n".join(map(line_of, checks)))


def probe_output(kind: str, count: int, name: str, free: int, total: int, **versions: str) -> CommandResult:
    seen = {
        "kind": kind,
        "index": 0,
        "name": name,
        "versions": versions,
        "count": count,
        "free_bytes": free,
        "total_bytes": total,
        "peak": None if kind == "cpu" else "table",
        "threads": 8,
        "task_queue_level": 1 if kind == "npu" else None,
    }
    return CommandResult(0, PREFIX + json.dumps(seen))


def laptop(**changes) -> FakeHost:
    """No Ascend anywhere; torch works on the CPU."""
    state = {
        "files": COMMON_FILES,
        "packages": {"torch": "2.13.0+cpu", "ascend-kit": "0.1.0"},
        "machine": "x86_64",
        "commands": {
            "python -m ascend_kit.doctor.self_test --stage probe": probe_output(
                "cpu", 1, "Test CPU", 60 * 2**30, 64 * 2**30, python="3.11.9", torch="2.13.0+cpu"
            ),
            "python -m ascend_kit.doctor.self_test --stage smoke": stage_output(
                OpCheck("smoke", "linear", "bf16", "ok", 0.002, 0.008)
            ),
        },
    }
    return FakeHost(**{**state, **changes})


def ascend_server(**changes) -> FakeHost:
    """Eight healthy 910B3 with a published triple; each test breaks one thing."""
    kernels = f"{ROOT}/opp/built-in/op_impl/ai_core/tbe/kernel"
    files = {
        **COMMON_FILES,
        **{f"/dev/davinci{card}": "" for card in range(8)},
        **{path: "" for path in ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")},
        "/usr/local/Ascend/driver/version.info": "Version=26.1.0\nascendhal_version=7.35.23\n",
        f"{ROOT}/aarch64-linux/ascend_toolkit_install.info": "package_name=toolkit\nversion=9.1.0\n",
        f"{ROOT}/aarch64-linux/ascend_ops_install.info": "version=9.1.0\n",
        f"{kernels}/ascend910b/matmul.json": "",
        f"{ROOT}/set_env.sh": "",
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
        "/proc/sys/kernel/numa_balancing": "0\n",
        "/proc/sys/vm/swappiness": "0\n",
    }
    run = "python -m ascend_kit.doctor.self_test --stage "
    versions = {"python": "3.11.9", "torch": "2.12.0+cpu", "torch_npu": "2.12.0.post2", "cann": "9.1.0"}
    state = {
        "files": files,
        "env": {"ASCEND_HOME_PATH": ROOT, "OMP_NUM_THREADS": "8", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"},
        "packages": {"torch": "2.12.0+cpu", "torch_npu": "2.12.0.post2", "ascend-kit": "0.1.0"},
        "cpus": 192,
        "commands": {
            "npu-smi info": CommandResult(0, sample("info_910b")),
            "python -c": CommandResult(0),  # every package that CANN imports is there
            "npu-smi info -t topo": CommandResult(0, sample("topo_910b")),
            "python -m ascend_kit.doctor.self_test --stage probe": probe_output(
                "npu", 8, "Ascend910B3", 60 * 2**30, 64 * 2**30, **versions
            ),
            run + "smoke": stage_output(OpCheck("smoke", "paged_attention", "bf16", "ok", 0.003, 0.016)),
            run + "collective": stage_output(OpCheck("collective", "all_reduce", "2 ranks", "ok", 0.0, 0.0)),
            run + "graph": stage_output(OpCheck("graph", "update and replay", "x", "ok", 0.003, 0.016)),
        },
    }
    for name in ("files", "env", "commands", "packages"):
        merged = {**state[name], **changes.pop(name, {})}
        state[name] = {key: value for key, value in merged.items() if value is not None}  # None takes away
    return FakeHost(**{**state, **changes})


def find(findings: list[Finding], section: str, check: str) -> Finding:
    (found,) = [item for item in findings if (item.section, item.check) == (section, check)]
    return found


def trouble(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(item.section, item.check, item.status) for item in findings if item.status in ("warn", "fail")]
