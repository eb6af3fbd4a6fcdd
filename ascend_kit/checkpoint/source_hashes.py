"""Hashes of the source files, taken from the bytes that the conversion reads anyway.

A conversion reads safetensors files from front to back, so their hashes cost no second pass over the disk.
Files read in another order (Megatron shards, .bin, several shards at once) are hashed beside it in a
thread.
"""

from __future__ import annotations

import threading
from pathlib import Path

import xxhash

from ascend_kit.checkpoint.huggingface import Checkpoint
from ascend_kit.checkpoint.tensor_file import RawTensor, ReadFile
from ascend_kit.checkpoint.torch_file import check_torch_file
from ascend_kit.identity import HASH_BLOCK_BYTES, hash_file


class StreamHash:
    """The hash of a file whose parts are reported in rising order; what is skipped is read here."""

    def __init__(self, path: Path) -> None:
        self.file, self.position = ReadFile(path), 0
        self._digest = xxhash.xxh3_128()

    def feed(self, offset: int, data: memoryview) -> None:
        """Bytes at `offset` were read; parts seen before are ignored."""
        self._read_up_to(offset)
        if self.position < offset + len(data):
            self._digest.update(data[self.position - offset :])
            self.position = offset + len(data)

    def finish(self) -> str:
        """Hexadecimal hash of the whole file."""
        self._read_up_to(self.file.size)
        self.file.close()
        return self._digest.hexdigest()

    def _read_up_to(self, offset: int) -> None:
        while self.position < offset:
            size = min(HASH_BLOCK_BYTES, offset - self.position)
            self._digest.update(self.file.read_bytes(self.position, size, "data to hash"))
            self.position += size


class SourceHashes:
    """Collects the hashes of all files of a checkpoint while it is converted."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._readers = {
            source.file.path: source.file
            for source in checkpoint.sources.values()
            if isinstance(source, RawTensor) and source.file.path.suffix == ".safetensors"
        }
        self._files = checkpoint.files
        self._streams: dict[Path, StreamHash] = {}
        self._hashes: dict[Path, str] = {}
        self._error: BaseException | None = None
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._hash_others, name="source-hash", daemon=True)

    def start(self, in_stream: bool) -> None:
        """Begin. With `in_stream` the files must be read in order, by one thread."""
        if in_stream:
            self._streams = {path: StreamHash(path) for path in self._readers}
            for path, stream in self._streams.items():
                self._readers[path].observer = stream.feed
        self._thread.start()

    def cancel(self) -> None:
        """Stop observing; for a conversion that failed."""
        self._cancelled.set()
        self._thread.join()
        self._detach()

    def result(self) -> dict[Path, str]:
        """Path -> hash of every source file."""
        self._thread.join()
        self._detach()
        if self._error is not None:
            raise self._error
        return self._hashes | {path: stream.finish() for path, stream in self._streams.items()}

    def _detach(self) -> None:
        for reader in self._readers.values():
            reader.observer = None

    def _hash_others(self) -> None:
        try:
            for path in (path for path in self._files if path not in self._streams):
                if path.suffix != ".safetensors":
                    check_torch_file(path, self._stop_if_cancelled)
                self._hashes[path] = hash_file(path, self._stop_if_cancelled)
        except BaseException as error:
            self._error = error

    def _stop_if_cancelled(self, _: int) -> None:
        if self._cancelled.is_set():
            raise InterruptedError("the conversion stopped")
