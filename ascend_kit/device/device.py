"""One device: which one it is, what it can do, how to wait for it, how much memory it holds.

Knows nothing of models or engines. `torch_npu` is imported only inside `import_torch_npu`, so a laptop
without it can import everything. Memory is in bytes, times in seconds, unless the name says otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ascend_kit.device.advice import advice
from ascend_kit.device.environment import VISIBLE, level_set
from ascend_kit.device.peaks import HardwarePeak, find_peak

KINDS = ("auto", "cpu", "cuda", "npu")
ALIASES = {"ascend": "npu", "gpu": "cuda"}
PACKAGES = ("transformers", "tokenizers", "lm-eval", "ascend-kit")  # beside torch, those that decide a result


# oneDNN keeps a compiled primitive for each row count of a product, a thousand of them unless told otherwise: up to a
# gigabyte where row counts vary as they do in serving. Read at the first product, so that torch may be imported before.
for _name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")


class DeviceError(ValueError):
    """The device that was asked for cannot be used; the message names the way out."""


def has_torch_npu() -> bool:
    """Whether the package is installed; says nothing about whether it can be imported."""
    return "torch_npu" in sys.modules or importlib.util.find_spec("torch_npu") is not None


def import_torch_npu() -> Any:
    """The `torch_npu` module. Raises DeviceError naming the usual cause when it is missing or cannot load."""
    if not has_torch_npu():
        raise DeviceError(
            "device npu was asked for, but torch_npu is not installed; install the wheel that matches torch "
            f"{torch.__version__.split('+')[0]} (pip install torch-npu==<same version>), or set device: cpu"
        )
    try:
        return importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        raise _broken("torch_npu is installed but cannot be imported", error) from error


def _broken(what: str, error: Exception) -> DeviceError:
    remedy = advice(str(error), "torch, torch_npu and CANN must be a published triple")
    return DeviceError(f"{what}: {error}. {remedy}. `python -m ascend_kit doctor` checks the whole installation.")


@dataclass(frozen=True)
class Device:
    """A selected device; `name` and `total_memory_bytes` were read at run time."""

    kind: str
    index: int
    name: str
    total_memory_bytes: int
    peak: HardwarePeak | None

    @property
    def torch_device(self) -> torch.device:
        """What tensors take as `device=`."""
        return torch.device("cpu") if self.kind == "cpu" else torch.device(self.kind, self.index)

    @property
    def backend(self) -> Any:
        """`torch.npu`, `torch.cuda` or `torch.cpu`."""
        return getattr(torch, self.kind)

    def make_current(self) -> None:
        """Use this device for what the calling thread does next; every thread has a current device of its own."""
        if self.kind != "cpu":
            self.backend.set_device(self.index)

    @property
    def default_block_size(self) -> int:
        """KV block size: 128 is the size the NPU kernels are written for; smaller wastes less elsewhere."""
        return 128 if self.kind == "npu" else 32

    def free_memory_bytes(self) -> int:
        """Bytes that new allocations can take, as the driver (or the kernel) sees it now."""
        return _host_available_bytes() if self.kind == "cpu" else self.backend.mem_get_info(self.index)[0]

    def memory_in_use_bytes(self) -> int:
        """Bytes held by live tensors of this process; on CPU the resident set of the process."""
        return _host_rss_bytes("VmRSS") if self.kind == "cpu" else self.backend.memory_allocated(self.index)

    def peak_memory_bytes(self) -> int:
        """High-water mark of `memory_in_use_bytes` since the last reset."""
        return _host_rss_bytes("VmHWM") if self.kind == "cpu" else self.backend.max_memory_allocated(self.index)

    def reset_peak_memory(self) -> None:
        """Start a new high-water mark. On a CPU whose kernel refuses the reset, the old mark stays."""
        if self.kind != "cpu":
            self.backend.reset_peak_memory_stats(self.index)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM (Linux proc(5))

    def synchronize(self) -> None:
        """Wait until the device has finished everything queued so far."""
        if self.kind != "cpu":
            self.backend.synchronize(self.index)

    def seed(self, seed: int) -> None:
        """Seed the host generator and this device's."""
        torch.manual_seed(seed)
        if self.kind != "cpu":
            self.backend.manual_seed(seed)

    def versions(self) -> dict[str, str]:
        """Versions of the installed packages that decide results and speed (an identity's `versions`)."""
        found = {"torch": str(torch.__version__)}
        if self.kind == "npu":
            found["torch_npu"] = import_torch_npu().__version__
        for package in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[package.replace("-", "_")] = importlib.metadata.version(package)
        return found

    def facts(self) -> dict[str, str]:
        """The hardware and what drives it (an identity's `device`): name, and driver and CANN or CUDA."""
        found = {"name": self.name}
        if self.kind == "cuda":
            found["cuda"] = str(torch.version.cuda)
        if self.kind == "npu":
            driver = _found_in("/usr/local/Ascend/driver/version.info", r"^version\s*=\s*(\S+)")
            found |= {"driver": driver or "unknown", "cann": cann_version()}
        return found

    def task_queue_level(self) -> int | None:
        """TASK_QUEUE_ENABLE in force in this process: 1 launches from a thread of its own. None without an NPU.

        See device/environment.py for who changes it.
        """
        if self.kind != "npu":
            return None
        ask = getattr(self.backend, "get_task_queue_enable", None)  # from 2.12.0.post3 on
        return int(ask()) if ask else int(level_set())

    def assert_on_device(self, tensors: torch.nn.Module | Iterable[torch.Tensor]) -> None:
        """Raise DeviceError unless every tensor (or parameter and buffer of a module) lies on this device."""
        if isinstance(tensors, torch.nn.Module):
            named = [*tensors.named_parameters(), *tensors.named_buffers()]
        else:
            named = [(f"tensor {i}", tensor) for i, tensor in enumerate(tensors)]
        for name, tensor in named:
            found = tensor.device
            if found.type != self.kind or (self.kind != "cpu" and (found.index or 0) != self.index):
                raise DeviceError(
                    f"{name} {tuple(tensor.shape)} is on {found}, not on {self.torch_device} as asked for; "
                    "timing or scoring it would report the wrong machine"
                )

    def describe(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        stack = {name: value for name, value in self.facts().items() if name != "name"}
        return {
            "kind": self.kind,
            "index": self.index,
            "name": self.name,
            "total_memory_bytes": self.total_memory_bytes,
            "peak": None if self.peak is None else dict(vars(self.peak)),
            "task_queue_level": self.task_queue_level(),
            "versions": {"python": platform.python_version(), **self.versions(), **stack},
        }


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`host` on `device`, without waiting for the device.

    It goes through page-locked memory: a copy that does not wait may run after the caller's memory was
    reused, and one that waits would empty the device's queue.
    """
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def parse_device(name: str, device_id: int = 0) -> tuple[str, int]:
    """`npu:1` -> ("npu", 1). `device_id` is the index when the name has none; two that differ are refused."""
    kind, _, suffix = name.strip().lower().partition(":")
    kind = ALIASES.get(kind, kind)
    if kind not in KINDS or (suffix and not suffix.isdigit()):
        raise DeviceError(
            f"unknown device {name!r}; use auto, cpu, cuda, cuda:N, npu, npu:N or ascend (the same as npu)"
        )
    if device_id < 0:
        raise DeviceError(f"device_id is {device_id}; it counts from 0")
    if suffix and device_id and int(suffix) != device_id:
        raise DeviceError(f"device {name!r} and device_id {device_id} name two different cards; give one of them")
    return kind, int(suffix) if suffix else device_id


def resolve_device(name: str, device_id: int = 0) -> tuple[str, int]:
    """As `parse_device`, with the kind that `auto` takes on this machine; touches no device."""
    kind, index = parse_device(name, device_id)
    return auto_kind() if kind == "auto" else kind, index


def select_device(name: str = "auto", device_id: int = 0) -> Device:
    """Pick a device and make it current.

    `auto` takes the NPU where torch_npu is installed, else CUDA, else the CPU; an accelerator that is there
    but broken is an error, not a reason to go on slowly. Raises DeviceError saying what is missing.
    """
    kind, index = resolve_device(name, device_id)
    if kind == "cpu":
        return Device("cpu", 0, _cpu_name(), _host_total_bytes(), None)
    return _select_npu(index) if kind == "npu" else _select_cuda(index)


def auto_kind() -> str:
    if has_torch_npu():
        return "npu"
    if glob.glob("/dev/davinci[0-9]*"):
        raise DeviceError(
            "this machine has Ascend cards (/dev/davinci*), but torch_npu is not installed; install it, "
            "or set device: cpu to use the CPU on purpose"
        )
    if torch.cuda.is_available():
        return "cuda"
    if glob.glob("/dev/nvidia[0-9]*"):
        warnings.warn(
            f"device auto: torch {torch.__version__} cannot use the NVIDIA card here; running on CPU", stacklevel=3
        )
    return "cpu"


def _select_npu(index: int) -> Device:
    import_torch_npu()
    npu = getattr(torch, "npu")  # noqa: B009 - torch_npu puts it there
    _check_index("npu", index, npu.device_count())
    try:
        npu.set_device(index)
        npu.set_compile_mode(jit_compile=False)  # binary kernels; True compiles once per shape
        total = npu.get_device_properties(index).total_memory
    except RuntimeError as error:
        raise _broken(f"npu:{index} cannot be opened", error) from error
    name = npu.get_device_name(index)
    return Device("npu", index, name, total, find_peak(name, total))


def _select_cuda(index: int) -> Device:
    if not torch.cuda.is_available():
        raise DeviceError(
            f"device cuda was asked for, but torch {torch.__version__} sees no CUDA card; "
            "install a CUDA build of torch and check nvidia-smi, or set device: cpu"
        )
    _check_index("cuda", index, torch.cuda.device_count())
    torch.cuda.set_device(index)
    properties = torch.cuda.get_device_properties(index)
    return Device("cuda", index, properties.name, properties.total_memory,
                  find_peak(properties.name, properties.total_memory))  # fmt: skip


def _check_index(kind: str, index: int, count: int) -> None:
    if index < count:
        return
    variable = VISIBLE[kind]
    visible = os.environ.get(variable)
    hint = f"{variable}={visible!r} hides the others" if visible is not None else f"{variable} is not set"
    if count == 0:
        raise DeviceError(f"device {kind} was asked for, but no card is visible ({hint}); check the driver")
    raise DeviceError(f"device {kind}:{index} does not exist: {count} visible, numbered from 0 ({hint})")


@functools.cache
def cann_version() -> str:
    """The CANN that torch_npu runs on, or "unknown"."""
    with contextlib.suppress(ImportError, RuntimeError):
        return importlib.import_module("torch_npu.npu.utils").get_cann_version() or "unknown"
    return "unknown"


def _found_in(path: str, pattern: str) -> str | None:
    """The first group of a pattern in a file; None where there is no such file or text."""
    with contextlib.suppress(OSError):
        if match := re.search(pattern, Path(path).read_text(errors="replace"), re.MULTILINE | re.IGNORECASE):
            return match[1].strip()
    return None


def _cpu_name() -> str:
    return _found_in("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.processor() or platform.machine()


def _cgroup_bytes(name: str) -> int | None:
    text = _found_in(f"/sys/fs/cgroup/{name}", r"^(\d+)$")
    return None if text is None else int(text)


def _host_total_bytes() -> int:
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(installed, _cgroup_bytes("memory.max") or installed)


def _host_available_bytes() -> int:
    kib = _found_in("/proc/meminfo", r"^MemAvailable:\s+(\d+) kB")
    available = int(kib) * 1024 if kib else _host_total_bytes()
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    return available if limit is None or used is None else max(0, min(available, limit - used))


def _host_rss_bytes(key: str) -> int:
    if kib := _found_in("/proc/self/status", rf"^{key}:\s+(\d+) kB"):
        return int(kib) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS reports bytes, Linux KiB
