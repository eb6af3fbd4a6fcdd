"""Tensors as regions of files: nothing is read before it is asked for, and only what is asked for is read.

Files are read with pread into fresh memory, never mapped as a whole: mapped pages would count as memory in
use, and a converter that promises a bound must be able to keep it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ascend_kit import files
from ascend_kit.files import FileError, require_regular, strict_json

DTYPE_OF_CODE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class CheckpointError(FileError):
    """A checkpoint is damaged, contradicts itself or is of a kind that cannot be used; names file and tensor."""


read_json = functools.partial(files.read_json, error=CheckpointError)


def folder_version(folder: str | Path) -> tuple[int, int, int] | None:
    """What tells a folder from the one that takes its place; None where there is none."""
    try:
        stat = os.stat(folder)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns


@contextlib.contextmanager
def unreplaced(folder: str | Path, version: tuple[int, int, int] | None) -> Iterator[None]:
    """CheckpointError at the end of the block when the folder is not of this version: two may have been read."""
    fault: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        fault = error
    if folder_version(folder) != version:
        raise CheckpointError(f"{folder} was replaced while it was read; load the model again") from fault
    if fault is not None:
        raise fault


class TensorSource(Protocol):
    """A tensor that can be read, whole or in part. `origin` is the file to name in an error."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    origin: str

    def read(self) -> torch.Tensor: ...

    def read_slice(self, dim: int, start: int, stop: int) -> torch.Tensor: ...


class ReadFile:
    """One file opened for positional reads from any thread; a short read is a CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            require_regular(self.path)
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  closed with the last of its tensors
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error

    def read_into(self, buffer: memoryview, offset: int, what: str) -> None:
        """Fill `buffer` with the bytes at `offset`; `what` is named when they are not there."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._file.fileno(), [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {what} from {self.path}: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path} is truncated: {what} should end at byte {offset + len(buffer)}, "
                    f"the file ends at {offset + done}"
                )
            done += count

    def read_bytes(self, offset: int, length: int, what: str) -> bytes:
        if offset + length > self.size:  # before as many bytes are asked of the memory
            raise CheckpointError(
                f"{self.path} is truncated: {what} should end at byte {offset + length}, the file ends at {self.size}"
            )
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset, what)
        return bytes(buffer)

    def map_table(self, offset: int, shape: tuple[int, int], what: str) -> np.ndarray:
        """Bytes of the file as a table, for its columns: pages that nobody touches stay on disk."""
        try:
            return np.memmap(self._file, np.uint8, "r", offset, shape)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"cannot read {what} from {self.path}: {error}") from error


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class RawTensor:
    """A contiguous tensor at a byte offset of a file."""

    def __init__(self, file: ReadFile, name: str, dtype: torch.dtype, shape: Sequence[int], offset: int) -> None:
        self.file, self.name, self.dtype, self.offset = file, name, dtype, offset
        self.shape = tuple(int(n) for n in shape)
        self.nbytes = math.prod(self.shape) * dtype.itemsize
        self.origin = str(file.path)

    def read(self) -> torch.Tensor:
        return self._read_span(self.shape, self.offset)

    def read_slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) along `dim`, contiguous; only their bytes are read."""
        check_slice(self.name, self.shape, dim, start, stop)
        shape = (*self.shape[:dim], stop - start, *self.shape[dim + 1 :])
        inner_bytes = math.prod(self.shape[dim + 1 :]) * self.dtype.itemsize
        if math.prod(self.shape[:dim]) == 1:
            return self._read_span(shape, self.offset + start * inner_bytes)
        return self._read_columns(dim, shape, start * inner_bytes, stop * inner_bytes)

    def _read_span(self, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        result = torch.empty(shape, dtype=self.dtype)
        if result.numel():
            self.file.read_into(as_bytes(result), offset, f"tensor {self.name}")
        return result

    def _read_columns(self, dim: int, shape: tuple[int, ...], first: int, last: int) -> torch.Tensor:
        result = torch.empty(shape, dtype=self.dtype)
        if result.numel():
            rows = math.prod(self.shape[:dim])
            stored = self.file.map_table(self.offset, (rows, self.nbytes // rows), f"tensor {self.name}")
            np.copyto(np.frombuffer(as_bytes(result), np.uint8).reshape(rows, -1), stored[:, first:last])
        return result


def check_slice(name: str, shape: tuple[int, ...], dim: int, start: int, stop: int) -> None:
    """ValueError unless [start, stop) lies inside dimension `dim` of `shape`."""
    if not 0 <= dim < len(shape) or not 0 <= start <= stop <= shape[dim]:
        raise ValueError(f"slice [{start}:{stop}] of dimension {dim} is outside tensor {name} with shape {shape}")


class ByRows:
    """A tensor that is computed as it is read: `rows(start, stop)` gives any of its rows, contiguous; slices of other
    dimensions are cut out of the whole."""

    def __init__(
        self, rows: Callable[[int, int], torch.Tensor], dtype: torch.dtype, shape: tuple[int, ...], origin: str
    ) -> None:
        self._rows, self.dtype, self.shape, self.origin = rows, dtype, shape, origin

    def read(self) -> torch.Tensor:
        return self._rows(0, self.shape[0] if self.shape else 1).reshape(self.shape)

    def read_slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
        check_slice(f"from {self.origin}", self.shape, dim, start, stop)
        return self._rows(start, stop) if dim == 0 else self.read().narrow(dim, start, stop - start).contiguous()


def in_memory(tensor: torch.Tensor, origin: str) -> ByRows:
    """A tensor that is in memory already."""
    rows = lambda start, stop: torch.atleast_1d(tensor)[start:stop].contiguous()  # noqa: E731
    return ByRows(rows, tensor.dtype, tuple(tensor.shape), origin)


def open_safetensors(path: Path) -> dict[str, TensorSource]:
    """The tensors of a .safetensors file; every fault of the layout is found before one is read."""
    file = ReadFile(path)
    if file.size < 8:
        raise CheckpointError(f"{path} is truncated: {file.size} bytes, a safetensors file has a header of at least 8")
    length = int.from_bytes(file.read_bytes(0, 8, "the header length"), "little")
    if length > MAX_HEADER_BYTES or length < 2:
        raise CheckpointError(f"{path} is not a safetensors file: its header would be {length} bytes long")
    if 8 + length > file.size:
        raise CheckpointError(f"{path} is truncated: header of {length} bytes in a file of {file.size}")
    tensors: dict[str, TensorSource] = {}
    end = 8 + length
    for name, code, shape, start, stop in _header_entries(path, file.read_bytes(8, length, "the header")):
        tensor, first = RawTensor(file, name, DTYPE_OF_CODE[code], shape, end), end - 8 - length
        if start != first or stop - start != tensor.nbytes:
            raise CheckpointError(
                f"{path} has a wrong header: tensor {name} {code} {shape} claims bytes {start}..{stop}, expected "
                f"{first}..{first + tensor.nbytes}"
            )
        end, tensors[name] = end + tensor.nbytes, tensor
    if end != file.size:
        raise CheckpointError(
            f"{path} is {'truncated' if end > file.size else 'longer than its header says'}: {file.size} bytes, the "
            f"header needs {end} (last tensor: {next(reversed(tensors), 'none')})"
        )
    return tensors


def _header_entries(path: Path, text: bytes) -> list[tuple[str, str, list[int], int, int]]:
    """(name, dtype code, shape, first byte, byte after the last) in file order."""
    try:
        header = strict_json(text.decode())
        notes = header.pop("__metadata__", None) or {}
        entries = [(name, item["dtype"], list(item["shape"]), *item["data_offsets"]) for name, item in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a damaged header: {type(error).__name__}: {error}") from error
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise CheckpointError(f"{path} has a damaged header: __metadata__ must hold texts, found {notes}")
    for name, code, shape, *offsets in entries:
        if not isinstance(code, str) or code not in DTYPE_OF_CODE:
            raise CheckpointError(f"{path}: tensor {name} has dtype {code}, known: {', '.join(DTYPE_OF_CODE)}")
        if len(offsets) != 2 or not all(type(n) is int and 0 <= n < 1 << 64 for n in (*shape, *offsets)):
            raise CheckpointError(f"{path} has a wrong header: tensor {name} {shape} at {offsets}")
    return sorted(entries, key=lambda entry: (entry[3], entry[4]))
