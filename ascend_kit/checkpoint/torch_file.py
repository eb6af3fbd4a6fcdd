"""Files written by torch.save, read without executing anything that the file names.

A `.pt` or `.bin` file is a zip archive: one pickle and one stored member per tensor storage. The pickle is
walked by an unpickler that knows a short list of harmless names; tensors become regions of the file, read
on demand. Names outside the list are refused (`.bin`), or replaced by inert stand-ins (Megatron's training
arguments carry enums and classes of the training code, which is neither needed nor wanted here).
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ascend_kit.checkpoint.tensor_file import CheckpointError, MemoryTensor, RawTensor, ReadFile

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
TORCH_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
}
PLAIN_BUILTINS = {
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "list": list,
    "tuple": tuple,
    "bytearray": bytearray,
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "complex": complex,
    "slice": slice,
}
LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class StandIn:
    """Takes the place of an object of an unknown class: keeps arguments and state, has no behaviour."""

    qualified_name = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.saved_args, self.saved_kwargs, self.saved_state = args, kwargs, None

    def __setstate__(self, state: Any) -> None:
        self.saved_state = state
        if isinstance(state, dict):
            self.__dict__.update({key: value for key, value in state.items() if isinstance(key, str)})

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __hash__(self) -> int:
        return id(self)


class LazyStorage:
    """Where one tensor storage lies; holds no data."""

    def __init__(self, dtype: torch.dtype, offset: int, num_elements: int) -> None:
        self.dtype, self.offset, self.num_elements = dtype, offset, num_elements


class StridedTensor(RawTensor):
    """A tensor saved as a view (a transpose, a stride): its whole span is read, then viewed."""

    def __init__(self, base: RawTensor, stride: tuple[int, ...]) -> None:
        super().__init__(base.file, base.name, base.dtype, base.shape, base.offset)
        self.stride = stride

    def read(self) -> torch.Tensor:
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        flat = RawTensor(self.file, self.name, self.dtype, (span,), self.offset).read()
        return flat.as_strided(self.shape, self.stride).contiguous()

    def read_slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
        return self.read().narrow(dim, start, stop - start).contiguous()


def read_torch_file(path: Path, *, unknown: str = "refuse") -> Any:
    """The pickled object of a torch.save file, tensors as lazy TensorSource objects; executes nothing.

    `unknown` is what to do with a class outside the list: "refuse" (CheckpointError) or "stand_in".
    """
    path = Path(path)
    file = ReadFile(path)
    if file.size == 0 or not zipfile.is_zipfile(path):
        return _read_legacy(path, unknown)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
            _check_archive(path, members, archive)
            storages = _StorageTable(path, file, members)
            with archive.open(members["data.pkl"]) as stream:
                return _Unpickler(stream, path, file, storages, unknown).load()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable torch file: {type(error).__name__}: {error}") from error


def _check_archive(path: Path, members: dict[str, zipfile.ZipInfo], archive: zipfile.ZipFile) -> None:
    if "data.pkl" not in members:
        raise CheckpointError(f"{path} is a zip archive without data.pkl: not written by torch.save")
    if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
        raise CheckpointError(f"{path} was saved on a big-endian machine; save it again on a little-endian one")


class _StorageTable:
    """Data offsets of the stored archive members, looked up by storage key."""

    def __init__(self, path: Path, file: ReadFile, members: dict[str, zipfile.ZipInfo]) -> None:
        self.path, self.file, self.members = path, file, members

    def locate(self, key: str, dtype: torch.dtype, num_elements: int) -> LazyStorage:
        info = self.members.get(f"data/{key}")
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.path}: storage {key} is missing or compressed")
        if info.file_size < num_elements * dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: storage {key} holds {info.file_size} bytes, {num_elements * dtype.itemsize} are needed"
            )
        local = LOCAL_HEADER.unpack(self.file.read_bytes(info.header_offset, LOCAL_HEADER.size, f"storage {key}"))
        return LazyStorage(dtype, info.header_offset + LOCAL_HEADER.size + local[-2] + local[-1], num_elements)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, path: Path, file: ReadFile, storages: _StorageTable, unknown: str) -> None:
        super().__init__(stream)
        self.path, self.file, self.storages, self.unknown = path, file, storages, unknown
        self.stand_ins: dict[str, type] = {}

    def persistent_load(self, pid: Any) -> LazyStorage:
        kind, storage_type, key, _, num_elements = pid
        if kind != "storage" or not isinstance(storage_type, torch.dtype):
            raise CheckpointError(f"{self.path}: unknown kind of storage {pid!r}")
        return self.storages.locate(str(key), storage_type, int(num_elements))

    def find_class(self, module: str, name: str) -> Any:
        found = self._known(module, name)
        if found is not None:
            return found
        if self.unknown == "refuse":
            raise CheckpointError(
                f"{self.path} asks for {module}.{name}; only tensors and plain containers are "
                "loaded. Save the weights alone, best as safetensors"
            )
        qualified = f"{module}.{name}"
        if qualified not in self.stand_ins:
            self.stand_ins[qualified] = type(name.rpartition(".")[2], (StandIn,), {"qualified_name": qualified})
        return self.stand_ins[qualified]

    def _known(self, module: str, name: str) -> Any:
        rebuilders: dict[str, Callable] = {
            "_rebuild_tensor_v2": self._rebuild_tensor,
            "_rebuild_tensor": self._rebuild_tensor,
            "_rebuild_parameter": _first_argument,
            "_rebuild_parameter_with_state": _first_argument,
            "_rebuild_from_type_v2": _rebuild_inner,
        }
        if module in ("torch._utils", "torch._tensor") and name in rebuilders:
            return rebuilders[name]
        if module in ("torch", "torch.storage"):
            if name in STORAGE_DTYPES:
                return STORAGE_DTYPES[name]
            return {"Size": tuple, "Tensor": StandIn, "UntypedStorage": torch.uint8, **TORCH_DTYPES}.get(name)
        if (module, name) == ("torch.nn.parameter", "Parameter"):
            return StandIn
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return PLAIN_BUILTINS.get(name) if module in ("builtins", "__builtin__") else None

    def _rebuild_tensor(self, storage: LazyStorage, offset: int, size: Any, stride: Any, *_: Any) -> RawTensor:
        start = storage.offset + offset * storage.dtype.itemsize
        tensor = RawTensor(self.file, f"at byte {start}", storage.dtype, size, start)
        stride = tuple(int(s) for s in stride)
        span = 0 if 0 in tensor.shape else 1 + sum((n - 1) * s for n, s in zip(tensor.shape, stride, strict=True))
        if min(stride, default=0) < 0 or offset < 0 or offset + span > storage.num_elements:
            raise CheckpointError(f"{self.path}: a tensor of shape {tensor.shape} reaches outside its storage")
        return tensor if _is_contiguous(tensor.shape, stride) else StridedTensor(tensor, stride)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _first_argument(tensor: Any, *_: Any) -> Any:
    return tensor


def _rebuild_inner(function: Any, _type: Any, args: tuple, _state: Any = None) -> Any:
    # `function` comes from the same list, so this can only call one of the rebuilders above or make a
    # stand-in.
    return function(*args)


def _read_legacy(path: Path, unknown: str) -> Any:
    if unknown != "refuse":
        raise CheckpointError(
            f"{path} is not a zip archive as torch.save has written since version 1.6, or it is "
            "truncated; load it with the training code and save it again"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged, truncated or holds more than tensors: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected a dictionary of tensors")
    return {key: MemoryTensor(value, str(path)) for key, value in loaded.items() if isinstance(value, torch.Tensor)}
