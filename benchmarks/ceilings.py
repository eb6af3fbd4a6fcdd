"""Read bandwidth and matrix rate of this machine, measured beside the engines because shared machines drift.

Run alone: python benchmarks/ceilings.py. The loops are in ceilings.c, built once with the system's C
compiler: torch's own sum and product stay below what the hardware can do, and a low ceiling would flatter
every engine.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("ceilings.c")
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
BUFFER_BYTES = 1 << 30  # far above any cache
REPEATS = 3


@functools.cache
def library() -> ctypes.CDLL:
    """The loops, built on first use for this source and machine. RuntimeError without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("measuring the ceilings needs a C compiler (cc, gcc or clang)")
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join([compiler, *FLAGS, cpu]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("ASCEND_KIT_CACHE", Path.home() / ".cache" / "ascend-kit")) / "native"
    path = folder / f"ceilings-{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / path.name
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(built)], check=True, timeout=120)
            os.replace(built, path)
    loaded = ctypes.CDLL(str(path))
    loaded.read_seconds.restype = loaded.bf16_rate.restype = loaded.int8_rate.restype = ctypes.c_double
    loaded.read_seconds.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
    loaded.bf16_rate.argtypes = loaded.int8_rate.argtypes = [ctypes.c_int]
    return loaded


def measure(threads: int, buffer_bytes: int = BUFFER_BYTES, repeats: int = REPEATS) -> dict[str, Any]:
    """Medians over `repeats`, and the samples; a rate is None where the processor lacks the instruction."""
    loops = library()
    read = _read_samples(threads, buffer_bytes, repeats)
    bf16 = [loops.bf16_rate(threads) for _ in range(repeats + 1)][1:]  # the first one wakes the threads
    int8 = [loops.int8_rate(threads) for _ in range(repeats + 1)][1:]
    return {
        "threads": threads,
        "read_bytes_per_s": statistics.median(read),
        "bf16_flops_per_s": statistics.median(bf16) or None,
        "int8_ops_per_s": statistics.median(int8) or None,
        "read_samples": read,
        "bf16_samples": bf16,
        "int8_samples": int8,
    }


def _read_samples(threads: int, buffer_bytes: int, repeats: int) -> list[float]:
    loops, sink = library(), ctypes.c_int64()
    with mmap.mmap(-1, buffer_bytes) as buffer:
        view = (ctypes.c_char * buffer_bytes).from_buffer(buffer)
        ctypes.memset(view, 1, buffer_bytes)  # untouched pages would all be the same zero page
        address = ctypes.addressof(view)
        seconds = [loops.read_seconds(address, buffer_bytes, threads, ctypes.byref(sink)) for _ in range(repeats + 1)]
        del view
    return [buffer_bytes / s for s in seconds[1:]]


if __name__ == "__main__":
    result = measure(os.cpu_count() or 1)
    print(json.dumps(result, indent=1))
