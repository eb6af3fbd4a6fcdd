"""Files written by torch.save, read without executing anything that the file names.

torch's own weights-only reader walks the pickle onto the meta device, which reads no data and says where each storage
lies; tensors become regions of the file. Classes outside torch's list are refused (`.bin`), or replaced by inert
stand-ins (Megatron's training arguments carry enums and classes of the training code). MSAdapter, torch's interface on
MindSpore, writes the same archives, but names storages by text instead of by class, and classes under `mindtorch`.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch._utils import _rebuild_tensor_v2
from torch._weights_only_unpickler import Unpickler
from torch.serialization import StorageType, get_unsafe_globals_in_checkpoint, safe_globals

from ascend_kit.checkpoint.tensor_file import ByRows, CheckpointError, RawTensor, ReadFile, TensorSource, in_memory

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
CRC_BLOCK_BYTES = 4 << 20
MSADAPTER_ROOTS = ("mindtorch", "msadapter", "mindspore")
LEGACY_PICKLES = 4  # magic number, protocol, system, contents


class StandIn:
    """Takes the place of an object of an unknown class: keeps its state, has no behaviour."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({key: value for key, value in state.items() if isinstance(key, str)})


def _rebuild_plain(rebuild: Callable[..., torch.Tensor], _kind: Any, arguments: tuple[Any, ...], _state: Any) -> Any:
    return rebuild(*arguments)


# What MSAdapter's pickles name under its own module, by the last part of the name.
MSADAPTER_NAMES: dict[str, Any] = {
    "_rebuild_tensor_v2": _rebuild_tensor_v2,
    "_rebuild_from_type_v2": _rebuild_plain,
    "Tensor": torch.Tensor,
    "StubTensor": torch.Tensor,
    "Parameter": torch.Tensor,
}


class TorchFile:
    """One file of torch.save: `content` with tensors on the meta device, and `replaced`, the unknown classes in it."""

    def __init__(self, path: Path, *, replace_unknown: bool = False) -> None:
        self.path, self.file = Path(path), ReadFile(path)
        self.replaced: list[str] = []
        self._sizes: dict[int, int] = {}  # first byte of a storage -> its bytes
        try:
            self.content = self._read(replace_unknown)
        except CheckpointError:
            raise
        except Exception as error:
            # torch wraps what happened in advice to load the file unsafely.
            text = (str(error).rpartition("WeightsUnpickler error: ")[2].splitlines() or [""])[0]
            raise CheckpointError(f"{path} is not a readable torch file: {type(error).__name__}: {text}") from error

    def tensors(self, mapping: Mapping[Any, Any]) -> dict[str, TensorSource]:
        """The tensors among a mapping's values, by name, as regions of the file."""
        return {
            str(name): self._region(str(name), value)
            for name, value in mapping.items()
            if isinstance(value, torch.Tensor)
        }

    def _read(self, replace_unknown: bool) -> Any:
        if not zipfile.is_zipfile(self.path):
            return self._read_legacy(replace_unknown)
        with zipfile.ZipFile(self.path) as archive:
            members = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
            if "data.pkl" not in members:
                raise CheckpointError(f"{self.path} is a zip archive without data.pkl: not written by torch.save")
            places = {name: self._place(name, info) for name, info in members.items()}
        self._sizes = {offset: size for offset, size in places.values()}
        if "byteorder" in places and self._bytes(places["byteorder"]) != b"little":
            raise CheckpointError(f"{self.path} was saved on a big-endian machine; save it again")
        pickled = io.BytesIO(self._bytes(places["data.pkl"]))
        _refuse_hungry_pickle(self.path, pickled)
        pickled.seek(0)
        unknown = sorted(get_unsafe_globals_in_checkpoint(self.path))
        known = {name: found for name in unknown if (found := _msadapter_global(name)) is not None}
        unknown = [name for name in unknown if name not in known]
        if unknown and not replace_unknown:
            raise CheckpointError(
                f"{self.path} asks for {', '.join(unknown)}; only tensors and plain containers are loaded. Save the "
                "weights alone, best as safetensors"
            )
        self.replaced = unknown
        classes: list[Any] = [(type(name.rpartition(".")[2], (StandIn,), {}), name) for name in unknown]
        unpickler = Unpickler(pickled, encoding="utf-8")
        unpickler.persistent_load = lambda found: _storage(self.path, found, places)  # type: ignore[attr-defined]
        with safe_globals([*classes, *((found, name) for name, found in known.items())]):
            return unpickler.load()

    def _place(self, name: str, info: zipfile.ZipInfo) -> tuple[int, int]:
        """(first byte, number of bytes) of a member, which torch.save never compresses."""
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.path}: {name} is compressed: not written by torch.save")
        local = LOCAL_HEADER.unpack(self.file.read_bytes(info.header_offset, LOCAL_HEADER.size, name))
        return info.header_offset + LOCAL_HEADER.size + local[-2] + local[-1], info.file_size

    def _bytes(self, place: tuple[int, int]) -> bytes:
        return self.file.read_bytes(*place, "a part")

    def _read_legacy(self, replace_unknown: bool) -> Any:
        if replace_unknown:
            raise CheckpointError(
                f"{self.path} is not a zip archive as torch.save has written since version 1.6, or it is truncated; "
                "load it with the training code and save it again"
            )
        with open(self.path, "rb") as stream:
            for _ in range(LEGACY_PICKLES):
                _refuse_hungry_pickle(self.path, stream)
        return torch.load(self.path, map_location="cpu", weights_only=True)

    def _region(self, name: str, tensor: torch.Tensor) -> TensorSource:
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{self.path}: tensor {name} is sparse or of torch's own quantisation; save it dense")
        if tensor.device.type != "meta":
            return in_memory(tensor.detach(), str(self.path))
        storage = tensor.untyped_storage()
        first: int = getattr(storage, "_checkpoint_offset", -1)
        shape, stride = tuple(tensor.shape), tensor.stride()
        span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        size, start = tensor.element_size(), int(tensor.storage_offset())
        if (start + span) * size > self._sizes.get(first, -1):
            raise CheckpointError(f"{self.path}: tensor {name} of shape {shape} reaches outside its storage")
        place = first + start * size
        if tensor.is_contiguous():
            return RawTensor(self.file, name, tensor.dtype, shape, place)
        # Saved as a view (a transpose, a stride): its whole span is read, then viewed.
        whole = RawTensor(self.file, name, tensor.dtype, (span,), place)
        rows = lambda start, stop: whole.read().as_strided(shape, stride)[start:stop].contiguous()  # noqa: E731
        return ByRows(rows, tensor.dtype, shape, whole.origin)


def _msadapter_global(name: str) -> Any | None:
    return MSADAPTER_NAMES.get(name.rpartition(".")[2]) if name.partition(".")[0] in MSADAPTER_ROOTS else None


def _storage(path: Path, found: Any, places: Mapping[str, tuple[int, int]]) -> torch.TypedStorage:
    """The storage that a pickle names, on the meta device, with its first byte in the file noted on it."""
    if not isinstance(found, tuple) or len(found) != 5 or found[0] != "storage" or f"data/{found[2]}" not in places:
        raise CheckpointError(f"{path} names the storage {found!r:.100}, which the archive does not hold")
    kind, key, numel = found[1], found[2], found[4]
    dtype = (
        torch.uint8 if kind is torch.UntypedStorage else (StorageType(kind) if isinstance(kind, str) else kind).dtype
    )
    raw = torch.UntypedStorage(numel * dtype.itemsize, device="meta")
    raw._checkpoint_offset = places[f"data/{key}"][0]
    return torch.TypedStorage(wrap_storage=raw, dtype=dtype, _internal=True)


def _refuse_hungry_pickle(path: Path, stream: IO[bytes]) -> None:
    """A few bytes of pickle can ask for a bytearray of any size, which the weights-only reader would make."""
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name in ("GLOBAL", "INST") and str(argument).split()[-1] == "bytearray":
            raise CheckpointError(f"{path} asks for {argument}, which may claim any amount of memory; not loaded")


def check_torch_file(path: Path) -> None:
    """Read a whole file of torch.save and compare each part with the checksum in its zip directory.

    CheckpointError names the file when a byte has changed. Files before torch 1.6 have no checksums.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.CRC == 0:  # saved without checksums
                    continue
                with archive.open(info) as stream:
                    while stream.read(CRC_BLOCK_BYTES):
                        pass
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy or download it again") from error
