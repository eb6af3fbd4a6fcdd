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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout
from torch import Tensor

from ascend_kit.checkpoint.tensor_file import CODE_OF_DTYPE, CheckpointError, as_bytes
from ascend_kit.checkpoint.tensor_jobs import OutputTensor, TensorJob
from ascend_kit.identity import hash_file

PROGRESS_NAME = ".progress.json"
WRITING_SUFFIX, NEW_SUFFIX = ".writing", ".new"
FLUSH_BYTES = 64 << 20


class Shard:
    """The jobs whose results share a file."""

    def __init__(self, jobs: list[TensorJob]) -> None:
        self.jobs, self.name = jobs, ""

    @property
    def outputs(self) -> list[OutputTensor]:
        return [output for job in self.jobs for output in job.outputs]

    @property
    def nbytes(self) -> int:
        return sum(job.write_bytes for job in self.jobs)

    def header(self) -> bytes:
        """The file's header, in the order in which the tensors are written."""
        return shard_header([job.outputs[index] for job, index in write_order(self)])

    @property
    def file_bytes(self) -> int:
        return len(self.header()) + self.nbytes

    def describe(self) -> list[Any]:
        return [self.name, [[o.name, CODE_OF_DTYPE[o.dtype], list(o.shape)] for o in self.outputs]]


def plan_shards(jobs: list[TensorJob], max_bytes: int) -> list[Shard]:
    """Jobs in order, cut into files of at most `max_bytes` (one larger tensor still gets its own file)."""
    shards: list[Shard] = []
    for job in jobs:
        if not shards or shards[-1].nbytes + job.write_bytes > max_bytes:
            shards.append(Shard([]))
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


def write_order(shard: Shard) -> list[tuple[TensorJob, int]]:
    """(job, output) in file order. Job by job, unless that would leave a tensor at an odd address."""
    order = [(job, index) for job in shard.jobs for index in range(len(job.outputs))]
    offset = 0
    for job, index in order:
        if offset % job.outputs[index].dtype.itemsize:
            # Readers view the bytes in place, which needs alignment: widest types first, as safetensors
            # itself does.
            return sorted(order, key=lambda item: -item[0].outputs[item[1]].dtype.itemsize)
        offset += job.outputs[index].nbytes
    return order


def stream_shard(shard: Shard) -> Iterator[Tensor]:
    """The shard's tensors block by block in file order; a job is run again where its results are not
    adjacent.
    """
    order = write_order(shard)
    position = 0
    while position < len(order):
        job, first = order[position]
        run = 1
        while position + run < len(order) and order[position + run] == (job, first + run):
            run += 1
        yield from (block for index, block in job.blocks() if first <= index < first + run)
        position += run


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

    Reading, converting, hashing and writing a block follow each other in one thread, while the block is in
    the processor's cache: handing blocks to other threads costs more than it hides.
    """
    path, temporary = folder / shard.name, folder / (shard.name + WRITING_SUFFIX)
    digest, header, size = xxhash.xxh3_128(), shard.header(), shard.file_bytes
    try:
        with writing(path), open(temporary, "wb", buffering=0) as file, Flusher(file.fileno()) as flusher:
            reserve(file.fileno(), size)
            for view in itertools.chain([memoryview(header)], map(as_bytes, stream_shard(shard))):
                digest.update(view)
                _write_all(file, view)
                flusher.advance(len(view))
                on_bytes(len(view))
            if file.tell() != size:
                raise CheckpointError(f"{path}: wrote {file.tell()} bytes, the header promises {size}")
            flusher.finish()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    return {"size": size, "hash": digest.hexdigest()}


class Flusher:
    """Sends a growing file to the disk in the background, so that the final fsync has little left to do."""

    def __init__(self, fd: int) -> None:
        self._fd, self._since_flush = fd, 0
        self._pool = ThreadPoolExecutor(1, "flush")
        self._running: Future[None] | None = None

    def __enter__(self) -> Flusher:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()

    def advance(self, count: int) -> None:
        """`count` more bytes were written."""
        self._since_flush += count
        if self._since_flush >= FLUSH_BYTES and (self._running is None or self._running.done()):
            if self._running is not None:
                self._running.result()  # raises what the disk reported
            self._running, self._since_flush = self._pool.submit(os.fdatasync, self._fd), 0

    def finish(self) -> None:
        """Return when every byte is on the disk."""
        self._pool.submit(os.fsync, self._fd).result()


def reserve(fd: int, size: int) -> None:
    """Claim the whole file's space now, so that a full disk shows before an hour of work and not after."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_all(file: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += file.write(view[done:])


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
