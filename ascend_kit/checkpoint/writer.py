"""Safetensors shards written as one forward stream, hashed on the way, resumable shard by shard.

Everything is written into `.<name>.partial` beside the destination, on the same file system, and renamed at
the end. Until then the destination does not exist; afterwards it is complete. A shard counts as finished
once its size and hash are in `.progress.json`; a rerun with the same plan keeps finished shards whose hash
is still right.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock, Timeout
from torch import Tensor

from ascend_kit.checkpoint.tensor_file import CODE_OF_DTYPE, CheckpointError, as_bytes
from ascend_kit.checkpoint.tensor_jobs import OutputTensor, TensorJob
from ascend_kit.files import hash_file

PROGRESS_NAME = ".progress.json"
WRITING_SUFFIX, NEW_SUFFIX = ".writing", ".new"
FLUSH_BYTES = 64 << 20
KEPT_BYTES = 24 << 20  # glibc learns from blocks of at most 32 MiB


@dataclass
class Shard:
    """The jobs whose results share a file."""

    jobs: list[TensorJob] = field(default_factory=list)
    name: str = ""

    @property
    def order(self) -> list[tuple[TensorJob, list[int]]]:
        """(job, those of its outputs that follow here) in file order: job by job, unless that leaves a tensor at an odd
        address. Readers view the bytes in place: then widest types first, as safetensors itself does."""
        order, offset, is_aligned = [(job, list(range(len(job.outputs)))) for job in self.jobs], 0, True
        for output in self.outputs:
            is_aligned &= offset % output.dtype.itemsize == 0
            offset += output.nbytes
        if is_aligned:
            return order
        alone = [(job, [index]) for job, indices in order for index in indices]
        return sorted(alone, key=lambda item: -item[0].outputs[item[1][0]].dtype.itemsize)

    @property
    def outputs(self) -> list[OutputTensor]:
        return [output for job in self.jobs for output in job.outputs]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    def header(self) -> bytes:
        """The file's header, in the order in which the tensors are written."""
        return shard_header([job.outputs[index] for job, indices in self.order for index in indices])

    @property
    def file_bytes(self) -> int:
        return len(self.header()) + self.nbytes

    def blocks(self) -> Iterator[Tensor]:
        """The tensors block by block in file order; a job runs again where its results are apart."""
        for job, wanted in self.order:
            yield from (block for index, block in job.blocks() if index in wanted)


def plan_shards(jobs: list[TensorJob], max_bytes: int) -> list[Shard]:
    """Jobs in order, cut into files of at most `max_bytes` (one larger tensor still gets its own file)."""
    shards: list[Shard] = []
    for job in jobs:
        if not shards or shards[-1].nbytes + sum(output.nbytes for output in job.outputs) > max_bytes:
            shards.append(Shard())
        shards[-1].jobs.append(job)
    for number, shard in enumerate(shards, start=1):
        shard.name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    return shards


def shard_header(outputs: list[OutputTensor]) -> bytes:
    """The safetensors header of tensors stored in the given order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in outputs:
        header[output.name] = {
            "dtype": CODE_OF_DTYPE[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [offset, offset + output.nbytes],
        }
        offset += output.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class PartialFolder:
    """The work folder of one conversion, locked against a second process."""

    def __init__(self, destination: Path, fingerprint: str) -> None:
        self.destination = destination
        self.path = destination.parent / f".{destination.name}.partial"
        self.lock_path = destination.parent / f".{destination.name}.lock"
        self.fingerprint = fingerprint
        self.finished: dict[str, dict[str, Any]] = {}
        self._lock = FileLock(self.lock_path, timeout=0)  # outside the folder that is renamed: held until after that
        self._recording = threading.Lock()

    def __enter__(self) -> PartialFolder:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock()  # before the folder is made: a conversion that is ending would take it along
            try:
                self.path.mkdir(exist_ok=True)
                self._load()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def lock(self) -> None:
        """Own the destination until `close`; CheckpointError where another conversion does."""
        try:
            self._lock.acquire()
        except Timeout:
            raise CheckpointError(
                f"{self.path} is in use: another conversion to {self.destination} is running"
            ) from None

    def close(self) -> None:
        """Give the destination free."""
        self.lock_path.unlink(missing_ok=True)  # while it is held: who waits for this file finds that it is gone
        self._lock.release()

    def _load(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            progress = json.loads((self.path / PROGRESS_NAME).read_text(encoding="utf-8"))
            if progress["fingerprint"] == self.fingerprint:
                self.finished = progress["shards"]
                return
        for path in self.path.iterdir():
            path.unlink()

    def is_finished(self, name: str) -> bool:
        """True when the shard was finished by an earlier run and its hash is still right."""
        entry, path = self.finished.get(name), self.path / name
        if entry is None or not path.is_file() or path.stat().st_size != entry["size"]:
            return False
        return hash_file(path) == entry["hash"]

    def record(self, name: str, entry: dict[str, Any]) -> None:
        """Note a finished shard, in a way that survives a kill at any moment."""
        temporary = self.path / (PROGRESS_NAME + NEW_SUFFIX)
        with self._recording, writing(temporary):
            self.finished[name] = entry
            text = json.dumps({"fingerprint": self.fingerprint, "shards": self.finished})
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.path / PROGRESS_NAME)

    def publish(self) -> None:
        """Rename the complete folder to the destination; an old destination is removed after the exchange."""
        old = set_aside(self.destination)
        with writing(self.destination):
            for leftover in (PROGRESS_NAME, PROGRESS_NAME + NEW_SUFFIX):
                (self.path / leftover).unlink(missing_ok=True)
            _sync_folder(self.path)
            shutil.rmtree(old, ignore_errors=True)
            if self.destination.exists():
                os.rename(self.destination, old)
            os.rename(self.path, self.destination)
            _sync_folder(self.destination.parent)
        shutil.rmtree(old, ignore_errors=True)


def set_aside(destination: Path) -> Path:
    """Where the old folder lies while the new one takes its place."""
    return destination.parent / f".{destination.name}.old"


def undo_exchange(destination: Path) -> str | None:
    """Clear up after an exchange that was stopped halfway; what was done in words.

    The old folder is removed, or put back where the new one is not in its place. None where there is nothing to do, or
    where a conversion is running and owns it.
    """
    old, owner = set_aside(destination), PartialFolder(destination, "")
    if not old.exists():
        return None
    try:
        owner.lock()
    except CheckpointError:
        return None
    with contextlib.closing(owner):
        if destination.exists():
            shutil.rmtree(old)
            return f"removed {old}, which a stopped conversion left behind"
        os.rename(old, destination)
        shutil.rmtree(owner.path, ignore_errors=True)  # what was to take its place, of no use to a resumption
        return f"put {destination} back, which a stopped conversion had set aside as {old.name}"


def write_shard(shard: Shard, folder: Path, on_bytes: Callable[[int], None]) -> dict[str, Any]:
    """Write one shard; its size and hash.

    Reading, converting, hashing and writing a block follow each other in one thread, while the block is in the
    processor's cache: handing blocks to other threads costs more than it hides. What is written goes to the disk in the
    background, so that the final fsync has little left to do.
    """
    path, temporary = folder / shard.name, folder / (shard.name + WRITING_SUFFIX)
    digest, size, done, flushed = xxhash.xxh3_128(), shard.file_bytes, 0, 0
    # Makes glibc keep freed memory up to twice this size. It learns so from the largest mapped block that was freed;
    # else each block's memory goes back to the system and costs a page fault per 4 KiB again, a third of the time.
    torch.empty(KEPT_BYTES, dtype=torch.uint8)
    try:
        with writing(path), open(temporary, "wb") as file, ThreadPoolExecutor(1, "flush") as pool:
            reserve(file.fileno(), size)
            flushing = pool.submit(os.fdatasync, file.fileno())
            for view in itertools.chain([memoryview(shard.header())], map(as_bytes, shard.blocks())):
                digest.update(view)
                file.write(view)
                done += len(view)
                on_bytes(len(view))
                if done - flushed >= FLUSH_BYTES and flushing.done():
                    flushing.result()  # raises what the disk reported
                    flushed, flushing = done, pool.submit(os.fdatasync, file.fileno())
            if done != size:
                raise CheckpointError(f"{path}: wrote {done} bytes, the header promises {size}")
            flushing.result()
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    return {"size": size, "hash": digest.hexdigest()}


def reserve(fd: int, size: int) -> None:
    """Claim the whole file's space now, so that a full disk shows before an hour of work and not after."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating system error into a CheckpointError that names `path` and what to do."""
    try:
        yield
    except OSError as error:
        free = ""
        with contextlib.suppress(OSError):
            free = f"; {shutil.disk_usage(path.parent).free} bytes are free there"
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}{free}. Free space or choose another output_model; "
            "finished shards are kept for the next run"
        ) from error


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
