"""Builds and loads the CPU kernels with the system's C++ compiler; without one the CPU table stays with torch."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from ascend_kit.files import cache_root

FOLDER = Path(__file__).with_name("kernels")
DISABLE_VARIABLE = "ASCEND_KIT_NATIVE"  # 0 = never build or use the kernels
# Reassociation lets sums use vector registers. -ffast-math is avoided: linking with it makes the whole process flush
# small numbers to zero.
FLAGS = [
    "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd", "-pthread", "-fno-math-errno",
    "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math",
]  # fmt: skip

_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
SIGNATURES = {
    "ak_linear": [_I, _P, _L, _P, _P, _P, _L, _L, _L, _I],
    "ak_linear_w8a16": [_I, _P, _L, _P, _P, _P, _P, _L, _L, _L, _I],
    "ak_linear_w4a16": [_I, _P, _L, _P, _P, _P, _P, _P, _L, _L, _L, _L, _I],
    "ak_quantize": [_I, _P, _P, _P, _L, _L, _I],
    "ak_linear_w8a8": [_I, _P, _P, _P, _P, _P, _P, _L, _L, _L, _I],
    "ak_rms_norm": [_I, _P, _L, _P, _P, _P, _P, _L, _L, _L, _F, _I],
    "ak_rotary": [_I, _P, _L, _P, _L, _P, _P, _L, _L, _L, _L, _I],
    "ak_swiglu": [_I, _P, _P, _L, _L, _I],
    "ak_argmax": [_I, _P, _L, _P, _L, _L, _I],
    "ak_store": [_P, _L, _P, _L, _P, _P, _P, _L, _L, _L, _I],
    "ak_store_int8": [_I, _P, _L, _P, _P, _L, _L, _L, _L, _I, _I],
    "ak_attend_int8": [_I, _P, _L, _P, _P, _P, _L, _P, _P, _L, _L, _L, _L, _L, _F, _I],
    "ak_gather": [_P, _P, _P, _L, _L],
    "ak_attend": [_I, _P, _L, _P, _P, _P, _L, _P, _P, _L, _L, _L, _L, _L, _F, _I],
}
PACKED_SIGNATURES = {  # only where the processor has the instructions
    "ak_pack": [_P, _P, _L, _L, _L, _I],
    "ak_gather_packed": [_P, _P, _P, _L, _L],
    "ak_packed_linear": [_I, _P, _L, _P, _P, _P, _L, _L, _L, _I],
    "ak_packed_linear_w8a16": [_I, _P, _L, _P, _P, _P, _P, _L, _L, _L, _I],
    "ak_packed_linear_w4a16": [_I, _P, _L, _P, _P, _P, _P, _P, _L, _L, _L, _L, _I],
    "ak_packed_linear_w8a8": [_I, _P, _P, _P, _P, _P, _P, _L, _L, _L, _I],
    "ak_attend_prompts": [_P, _L, _P, _P, _P, _L, _P, _P, _P, _L, _L, _L, _L, _L, _F, _I],
}


def compiler() -> str | None:
    """Path of the C++ compiler, or None."""
    return next(
        (path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))),
        None,
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, built on first use; None where they are switched off or cannot be built."""
    if os.environ.get(DISABLE_VARIABLE) == "0" or compiler() is None:
        return None
    try:
        loaded = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, arguments in (SIGNATURES | (PACKED_SIGNATURES if loaded.ak_packs() else {})).items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


@functools.cache
def packs() -> bool:
    """Whether the kernels take packed weights here: AVX-512 with BF16, VNNI and VBMI, and no AMX (see tiles.h)."""
    loaded = library()
    return loaded is not None and bool(loaded.ak_packs())


def status() -> str:
    """One line for reports: whether the kernels are in use, and if not, why."""
    if os.environ.get(DISABLE_VARIABLE) == "0":
        return f"off ({DISABLE_VARIABLE}=0)"
    if compiler() is None:
        return "off (no C++ compiler found)"
    if library() is None:
        return "off (the build failed; run the compiler by hand on kernels.cpp)"
    return "on, packed weights" if packs() else "on"


def _build() -> Path:
    """The shared library for this source, compiler and processor, from the cache or built now."""
    command = [compiler() or "c++", *FLAGS]
    sources = b"".join(path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in (".cpp", ".h"))
    key = hashlib.sha256(sources + " ".join(command).encode() + _processor().encode()).hexdigest()[:16]
    folder = cache_root() / "native"
    path = folder / f"kernels-{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary) / path.name
        command += [str(FOLDER / "kernels.cpp"), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        os.replace(built, path)  # two processes may build at once; either result is right
    return path


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return platform.machine() + next((line for line in lines if line.startswith("flags")), "")
