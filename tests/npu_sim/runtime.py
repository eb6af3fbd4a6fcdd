"""The stub CANN runtime as seen from Python: its libraries, its callbacks, its memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from npu_sim.install import LIBRARIES

(
    CAPTURE_BEGIN,
    CAPTURE_END,
    REPLAY,
    DESTROY,
    GROUP_BEGIN,
    GROUP_END,
    UPDATE_BEGIN,
    UPDATE_END,
    VALUE_WAIT,
    VALUE_WRITE,
    SYNCHRONIZE,
    IS_DONE,
) = range(12)
FAILED = 507899  # ACL_ERROR_RT_INTERNAL_ERROR
Hook = Callable[[int, int, int, int, int], int]
_HOOK_TYPE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, *[ctypes.c_uint64] * 4)


class Runtime:
    """The loaded stub. It has to exist before torch_npu is imported, whose symbols resolve against it."""

    def __init__(self, folder: Path) -> None:
        loaded = [ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES]
        self._library = loaded[0]
        self._library.npu_sim_error.argtypes = [ctypes.c_char_p]
        self._library.npu_sim_is_pinned.argtypes = [ctypes.c_void_p]
        self._hook = None
        self.mark_thread()

    def mark_thread(self) -> None:
        """Let calls of this thread reach the hook at once; those of torch_npu's launch thread wait for `taken`."""
        self._library.npu_sim_mark_thread()

    def taken(self) -> Iterator[tuple[int, ...]]:
        """The calls of the launch thread that were not taken yet, in order."""
        call = (ctypes.c_uint64 * 5)()
        while self._library.npu_sim_take(call):
            yield tuple(call)

    def set_hook(self, hook: Hook) -> None:
        """`hook(kind, object, stream, value, flag)` answers the runtime; an exception becomes its error."""

        def guarded(*call: int) -> int:
            try:
                return hook(*call)
            except Exception as error:
                self._library.npu_sim_error(f"{type(error).__name__}: {error}".encode())
                return FAILED

        self._hook = _HOOK_TYPE(guarded)  # kept alive: C holds a bare pointer
        self._library.npu_sim_set_hook(self._hook)

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a host tensor lies in page-locked memory."""
        return bool(self._library.npu_sim_is_pinned(tensor.data_ptr()))


def host_alias(tensor: Tensor) -> Tensor:
    """A CPU tensor over the bytes of an npu tensor. Does not keep them alive."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if size == 0 or tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    raw = (ctypes.c_char * size).from_address(storage.data_ptr())
    flat = torch.frombuffer(raw, dtype=torch.uint8, count=size // tensor.element_size() * tensor.element_size())
    return torch.as_strided(flat.view(tensor.dtype), tensor.size(), tensor.stride(), tensor.storage_offset())


def read_word(address: int) -> int:
    """The 64-bit word that device-side waits look at."""
    return ctypes.c_uint64.from_address(address).value


def write_word(address: int, value: int) -> None:
    ctypes.c_uint64.from_address(address).value = value
