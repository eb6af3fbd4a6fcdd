"""MindSpore's `.ckpt` files: protobuf messages, found without reading the tensors and without protobuf.

A file is a row of `Checkpoint` messages of one `Value` each (mindspore/ccsrc/utils/checkpoint.proto):
    Checkpoint { repeated Value value = 1 }    Value { string tag = 1; TensorProto tensor = 2; MapTensor = 3 }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }
A tensor above 512 MiB comes in slices: its tag again, with the dims of the whole; their bytes follow each other. A file
saved with a checksum ends with `crc_num` and ten big-endian bytes, the CRC-32 of all before.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from ascend_kit.checkpoint.pieces import row_pieces
from ascend_kit.checkpoint.tensor_file import ByRows, CheckpointError, RawTensor, ReadFile, TensorSource

_TYPES = "Float16 BFloat16 Float32 Float64 Int8 UInt8 Int16 Int32 Int64 Bool"
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name.lower()) for name in _TYPES.split()}
MAX_TENSORS, MAX_TEXT_BYTES, MAX_DIMS = 1_000_000, 4096, 16
VARINT, BYTES = 0, 2  # wire types
HEAD_BYTES = 20  # a field's key and its length, at most ten bytes each
CHECKSUM_MARK, CHECKSUM_BYTES = b"crc_num", 17
BLOCK_BYTES = 4 << 20


def sliced_tensor(dtype: torch.dtype, shape: tuple[int, ...], runs: list[RawTensor]) -> ByRows:
    """A tensor whose bytes lie in several runs of one file; a run need not end between two numbers."""
    row_bytes, whole = math.prod(shape[1:]) * dtype.itemsize, row_pieces([(run, 0, run.nbytes) for run in runs])

    def rows(start: int, stop: int) -> torch.Tensor:
        return whole.read_slice(0, start * row_bytes, stop * row_bytes).view(dtype).reshape(stop - start, *shape[1:])

    return ByRows(rows, dtype, shape, whole.origin)


class Messages:
    """Protobuf messages in a file, found with small reads: no length is believed beyond what surrounds it."""

    def __init__(self, file: ReadFile, what: str) -> None:
        self.file, self.what = file, what

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file.path} is no readable {self.what} of MindSpore: {what}. It may be truncated, of another kind, "
            "or encrypted (saved with enc_key: load it in MindSpore and save it without)"
        )

    def messages(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(field number, first byte, byte after the last) of the messages and byte strings in [start, stop)."""
        for number, kind, first, last in self.fields(start, stop):
            if kind != BYTES:
                raise self.damaged(f"field {number} before byte {last} is no message")
            yield number, first, last

    def fields(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(number, wire type, first byte of a byte string or the value of a number, byte after the field)."""
        while start < stop:
            head = self.file.read_bytes(start, min(HEAD_BYTES, stop - start), "a field")
            key, used = self._varint(head, 0, start)
            number, kind = key >> 3, key & 7
            if kind not in (VARINT, BYTES):
                raise self.damaged(f"wire type {kind} at byte {start}")
            value, used = self._varint(head, used, start)
            start += used
            if kind == VARINT:
                yield number, kind, value, start
                continue
            if value > stop - start:
                raise self.damaged(f"a field at byte {start} claims {value} bytes, {stop - start} are left")
            yield number, kind, start, start + value
            start += value

    def _varint(self, data: bytes, position: int, start: int) -> tuple[int, int]:
        value = shift = 0
        for index in range(position, min(len(data), position + 10)):
            value |= (data[index] & 127) << shift
            shift += 7
            if data[index] < 128:
                return value, index + 1
        raise self.damaged(f"no number ends at byte {start + position}")

    def text(self, start: int, stop: int) -> str:
        if stop - start > MAX_TEXT_BYTES:
            raise self.damaged(f"a name of {stop - start} bytes at byte {start}")
        try:
            return self.file.read_bytes(start, stop - start, "a name").decode()
        except UnicodeDecodeError:
            raise self.damaged(f"the name at byte {start} is no text") from None

    def numbers(self, fields: Iterator[tuple[int, int, int, int]], wanted: int) -> list[int]:
        """The whole numbers of a repeated field, packed or not."""
        found: list[int] = []
        for number, wire, first, last in fields:
            if number == wanted:
                found += [first] if wire == VARINT else self.packed(first, last)
        return [value - (1 << 64) if value >> 63 else value for value in found]

    def packed(self, start: int, stop: int) -> list[int]:
        if stop - start > 10 * MAX_DIMS:
            raise self.damaged(f"a list of {stop - start} bytes at byte {start}")
        data, position, found = self.file.read_bytes(start, stop - start, "a list"), 0, []
        while position < len(data):
            value, position = self._varint(data, position, start)
            found.append(value)
        return found


class MindSporeFile:
    """The tensors of one `.ckpt` file as regions of it, and the names of what is no plain tensor."""

    def __init__(self, path: Path) -> None:
        self.file = ReadFile(path)
        self._proto = Messages(self.file, "checkpoint")
        self.tensors: dict[str, TensorSource] = {}
        self.others: list[str] = []  # text and map entries, which hold no weights
        self._found: dict[str, tuple[torch.dtype, tuple[int, ...], list[RawTensor]]] = {}
        for number, start, stop in self._proto.messages(0, self.file.size - checksum_bytes(self.file)):
            if number != 1:
                raise self._proto.damaged(f"field {number} at byte {start} is none of a checkpoint's")
            self._value(start, stop)
        if not self._found:
            raise self._proto.damaged("it holds no tensor")
        for name, (dtype, shape, runs) in self._found.items():
            self.tensors[name] = self._tensor(name, dtype, shape, runs)

    def _value(self, start: int, stop: int) -> None:
        parts = {number: (first, last) for number, first, last in self._proto.messages(start, stop)}
        if 1 not in parts or not parts.keys() <= {1, 2, 3}:
            raise self._proto.damaged(f"the entry at byte {start} has no name")
        name = self._proto.text(*parts[1])
        if 2 not in parts:
            self.others.append(name)
            return
        dims: list[int] = []
        kind, content = "", (stop, stop)
        for number, wire, first, last in self._proto.fields(*parts[2]):
            if number == 1 and wire == VARINT:
                dims.append(first)
            elif number == 1:
                dims += self._proto.packed(first, last)
            elif number == 2 and wire == BYTES:
                kind = self._proto.text(first, last)
            elif number == 3 and wire == BYTES:
                content = (first, last)
            else:
                raise self._proto.damaged(f"{name} has a field {number}")
            if len(dims) > MAX_DIMS or max(dims, default=0) >= 1 << 40:
                raise self._proto.damaged(f"{name} has the dimensions {dims}")
        self._add(name, dims, kind, *content)

    def _add(self, name: str, dims: list[int], kind: str, start: int, stop: int) -> None:
        if kind not in DTYPES:
            self.others.append(name)
            return
        if len(self._found) >= MAX_TENSORS:
            raise self._proto.damaged(f"more than {MAX_TENSORS} tensors")
        dtype = DTYPES[kind]
        # Older writers give a single number no dimension, or one of zero.
        shape = () if dims in ([], [0]) and stop - start == dtype.itemsize else tuple(dims)
        *form, runs = self._found.setdefault(name, (dtype, shape, []))
        if form != [dtype, shape]:
            raise self._proto.damaged(f"{name} comes twice, in unlike forms")
        runs.append(RawTensor(self.file, name, torch.uint8, (stop - start,), start))

    def _tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], runs: list[RawTensor]) -> TensorSource:
        size, wanted = sum(run.nbytes for run in runs), math.prod(shape) * dtype.itemsize
        if size != wanted:
            raise self._proto.damaged(f"{name} has {size} bytes, its shape {list(shape)} of {dtype} needs {wanted}")
        if len(runs) == 1:
            return RawTensor(self.file, name, dtype, shape, runs[0].offset)
        return sliced_tensor(dtype, shape, runs)


def checksum_bytes(file: ReadFile) -> int:
    """17 where the file ends with a checksum, else 0."""
    if file.size < CHECKSUM_BYTES:
        return 0
    tail = file.read_bytes(file.size - CHECKSUM_BYTES, len(CHECKSUM_MARK), "the end")
    return CHECKSUM_BYTES if tail == CHECKSUM_MARK else 0


def check_mindspore_file(path: Path) -> None:
    """Compare a `.ckpt` file with its checksum, where it has one; CheckpointError names a file that was changed."""
    file = ReadFile(path)
    if not checksum_bytes(file):
        return
    end, found = file.size - CHECKSUM_BYTES, 0
    for start in range(0, end, BLOCK_BYTES):
        found = zlib.crc32(file.read_bytes(start, min(BLOCK_BYTES, end - start), "the contents"), found)
    if found != int.from_bytes(file.read_bytes(file.size - 10, 10, "the checksum"), "big"):
        raise CheckpointError(f"{path} is damaged: its checksum does not fit; copy or download it again")
