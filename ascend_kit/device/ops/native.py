"""Builds and loads the CPU kernels with the system's C++ compiler; without one the CPU table stays with torch.

Kernels are called through ctypes on raw addresses. While a `Recording` is open every call is also noted, so that a
decode step over fixed buffers can be repeated as a bare list of calls: the CPU's counterpart of a captured graph.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ascend_kit.files import cache_root

FOLDER = Path(__file__).with_name("kernels")
DISABLE_VARIABLE = "ASCEND_KIT_NATIVE"  # 0 = never build or use the kernels
# Reassociation lets sums use vector registers. -ffast-math is avoided: linking with it makes the whole process flush
# small numbers to zero.
FLAGS = [
    "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd", "-pthread", "-fno-math-errno",
    "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math",
]  # fmt: skip
DTYPES = {torch.bfloat16: 0, torch.float32: 1}

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


def call(name: str, *arguments: Any) -> None:
    """Run one kernel; tensors are passed as addresses and must stay alive while a recording holds them."""
    function = getattr(library(), name)
    addresses = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
    if Recording.active is not None:
        Recording.active.note(function, addresses, arguments)
    _run(function, addresses)


def _run(function: Any, addresses: tuple) -> None:
    """Call it; under a profiler by its name, which torch would not see."""
    if torch.autograd.profiler._is_profiler_enabled:
        with torch.autograd.profiler.record_function(getattr(function, "__name__", "operator")):
            function(*addresses)
    else:
        function(*addresses)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A result of a kernel; from the arena of the open recording, if there is one."""
    if Recording.active is None:
        return torch.empty(shape, dtype=dtype)
    return Recording.active.arena.empty(shape, dtype)


class Arena:
    """Memory that all recordings of one model share: only one of their steps runs at a time."""

    CHUNK_BYTES = 16 << 20

    def __init__(self) -> None:
        self.chunks: list[torch.Tensor] = []
        self.rewind()

    def rewind(self) -> None:
        """Give everything out again from the start."""
        self.chunk, self.used = 0, 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        while self.chunk < len(self.chunks) and self.used + size > self.chunks[self.chunk].numel():
            self.chunk, self.used = self.chunk + 1, 0
        if self.chunk == len(self.chunks):
            self.chunks.append(torch.empty(max(size, self.CHUNK_BYTES), dtype=torch.uint8))
        piece = self.chunks[self.chunk][self.used : self.used + size]
        self.used += -(-size // 64) * 64
        return piece.view(dtype).view(shape)


class Recording:
    """The kernel calls of one step over fixed buffers, to be repeated without the Python in between."""

    active: Recording | None = None

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.calls: list[tuple[Any, tuple]] = []
        self.kept: list[Any] = []  # keeps buffers alive: the calls hold bare addresses

    def __enter__(self) -> Recording:
        self.arena.rewind()
        Recording.active = self
        return self

    def __exit__(self, *_: object) -> None:
        Recording.active = None

    def note(self, function: Any, addresses: tuple, arguments: Any) -> None:
        self.calls.append((function, addresses))
        self.kept.append(arguments)

    def replay(self) -> None:
        if torch.autograd.profiler._is_profiler_enabled:
            for function, addresses in self.calls:
                _run(function, addresses)
            return
        for function, addresses in self.calls:
            function(*addresses)


class NotRecordable(RuntimeError):
    """An operator whose result depends on the host's reading of the device; the message names it."""


class TorchCalls(TorchDispatchMode):
    """Notes the torch operators between the kernels of a recording, collectives among them.

    A replay computes each again and copies the result to where the recording has it. Views of buffers stay what they
    are. NotRecordable where the host reads numbers, or where a result's size depends on them.
    """

    ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "detach")

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        if name.removeprefix("aten::") in self.ALLOCATING:
            return result
        if name.startswith("c10d::"):
            self._note(lambda: _waited(func(*args, **kwargs)), args)
            return _waited(result)
        if not isinstance(result, torch.Tensor | list | tuple) or torch.Tag.dynamic_output_shape in func.tags:
            raise NotRecordable(f"{name} reads numbers that a recorded step cannot know")
        if func._schema.is_mutable:
            self._note(lambda: func(*args, **kwargs), args)
            return result
        kept = [result] if isinstance(result, torch.Tensor) else list(result)
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if not all(tensor.untyped_storage().data_ptr() in given for tensor in kept):
            self._note(lambda: _refill(kept, func(*args, **kwargs)), kept)
        return result

    def _note(self, repeat: Any, kept: Any) -> None:
        self.recording.note(repeat, (), kept)


def _refill(kept: list[torch.Tensor], result: Any) -> None:
    for target, source in zip(kept, [result] if isinstance(result, torch.Tensor) else result, strict=True):
        target.copy_(source)


def _waited(result: Any) -> Any:
    """The result of a collective once it is there."""
    for part in result if isinstance(result, tuple) else (result,):
        if hasattr(part, "wait"):
            part.wait()
    return result


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
