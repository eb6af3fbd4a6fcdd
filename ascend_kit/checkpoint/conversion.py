"""One conversion run: write the shards, add the small files, describe everything, publish."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascend_kit.checkpoint.huggingface import Checkpoint, check_contents
from ascend_kit.checkpoint.manifest import MANIFEST_NAME, describe_file, new_manifest, source_name
from ascend_kit.checkpoint.recipe import Recipe, plan_jobs, result_config, summarise
from ascend_kit.checkpoint.sensitivity import Progress
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.checkpoint.writer import PartialFolder, Shard, plan_shards, write_shard, writing
from ascend_kit.files import file_hash, hash_file, remember_hash, to_json, write_atomic

MAX_WORKERS = 4
MAX_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class ConversionResult:
    """What `convert` did."""

    folder: Path
    reused: bool
    manifest: dict[str, Any] = field(repr=False)
    bytes_written: int = 0
    seconds: float = 0.0
    resumed_shards: tuple[str, ...] = ()

    def to_row(self) -> dict[str, Any]:
        """What is kept of the conversion for whoever shows it later."""
        return {"folder": str(self.folder), "scheme": self.scheme, "reused": self.reused, "seconds": self.seconds,
                "mb_per_s": self.mb_per_s}  # fmt: skip

    def __str__(self) -> str:
        if self.reused:
            return f"{self.folder} ({self.scheme}): taken over as it was, made alike earlier"
        rate = f", {self.mb_per_s:.0f} MB/s" if self.mb_per_s else ""
        kept = f", {len(self.resumed_shards)} shards kept from an earlier run" if self.resumed_shards else ""
        text = f"{self.folder} ({self.scheme}): {self.bytes_written} bytes in {self.seconds:.1f} s{rate}{kept}"
        return "\n".join([text, *self.left_out])

    @property
    def scheme(self) -> str:
        """none, w8a8, w8a16 or mixed."""
        return self.manifest["quantization"]["scheme"]

    @property
    def left_out(self) -> list[str]:
        """What the source holds and the result does not, in words."""
        return self.manifest["source"].get("left_out", [])

    @property
    def mb_per_s(self) -> float | None:
        """Bytes written per second in 10^6; None when nothing was written."""
        return self.bytes_written / self.seconds / 1e6 if self.seconds and self.bytes_written else None


@dataclass
class Conversion:
    """Writes one plan to one destination."""

    checkpoint: Checkpoint
    recipe: Recipe
    settings: dict[str, Any]
    destination: Path
    companions: list[Path]  # config.json first, see `companion_files`
    left_out: Sequence[str] = ()  # what the source holds and the result does not, in words
    adapter: Path | None = None  # the folder of the adapter that `checkpoint` has merged
    max_shard_bytes: int = MAX_SHARD_BYTES
    on_progress: Progress | None = None

    def __post_init__(self) -> None:
        self._stopped, self._counting = threading.Event(), threading.Lock()
        self.shards = plan_shards(plan_jobs(self.checkpoint, self.recipe), self.max_shard_bytes)
        self.total_bytes, self.done_bytes = sum(shard.file_bytes for shard in self.shards), 0

    @property
    def num_workers(self) -> int:
        """Shards written at the same time: one where a disk keeps a core busy, more where there are cores."""
        return max(1, min(MAX_WORKERS, (os.cpu_count() or 1) // 4, len(self.shards)))

    def run(self, before_publish: Callable[[Path], object] | None) -> ConversionResult:
        started = time.perf_counter()
        with PartialFolder(self.destination, self._fingerprint()) as partial:
            self._check_space(partial)
            # Beside the conversion, which reads the same files: the disk is asked once.
            with ThreadPoolExecutor(1, "source-hash") as pool:
                hashing = {path: pool.submit(_checked_hash, path) for path in self.checkpoint.files}
                try:
                    resumed = self._write_shards(partial)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                sources = {path: running.result() for path, running in hashing.items()}
            with writing(partial.path):
                self._write_small_files(partial.path)
                manifest = self._write_manifest(partial, sources)
            seconds = time.perf_counter() - started  # of reading and writing; a check of the result is not conversion
            if before_publish:
                before_publish(partial.path)
            partial.publish()
        for entry in manifest["files"]:
            remember_hash(self.destination / entry["name"], entry["hash"])
        return ConversionResult(
            self.destination,
            False,
            manifest,
            resumed_shards=tuple(resumed),
            seconds=seconds,
            bytes_written=sum(entry["size"] for entry in manifest["files"]),
        )

    def _fingerprint(self) -> str:
        plan = {
            "settings": self.settings,
            "recipe": self.recipe.digest(),
            "shards": [[shard.name, shard.header()[8:].decode()] for shard in self.shards],
            "source": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in self.checkpoint.files],
        }
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

    def _check_space(self, partial: PartialFolder) -> None:
        missing = sum(shard.file_bytes for shard in self.shards if shard.name not in partial.finished)
        free = shutil.disk_usage(partial.path).free
        if missing > free:
            raise CheckpointError(
                f"the result needs {missing} bytes, {self.destination.parent} has {free} free; free "
                "space or choose another output_model"
            )

    def _write_shards(self, partial: PartialFolder) -> list[str]:
        """Write all shards; the names of those that an earlier run had finished."""
        with ThreadPoolExecutor(self.num_workers, "shard") as pool:
            running = [pool.submit(self._write, shard, partial) for shard in self.shards]
            try:
                return [shard.name for shard, kept in zip(self.shards, running, strict=True) if kept.result()]
            except BaseException:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _write(self, shard: Shard, partial: PartialFolder) -> bool:
        """True if the shard was there already, finished by an earlier run."""
        if partial.is_finished(shard.name):
            self._advance(shard.file_bytes)
            return True
        partial.record(shard.name, write_shard(shard, partial.path, self._advance))
        return False

    def _advance(self, count: int) -> None:
        if self._stopped.is_set():
            raise CheckpointError("the conversion was stopped because another part of it failed")
        with self._counting:
            self.done_bytes += count
            if self.on_progress:
                self.on_progress(self.done_bytes, self.total_bytes, "bytes written")

    def _write_small_files(self, folder: Path) -> None:
        if len(self.shards) > 1:
            _write_json(folder / "model.safetensors.index.json", self._index())
        for path in self.companions[1:]:  # the first is config.json, which is written anew
            shutil.copyfile(path, folder / path.name)
        _write_json(folder / "config.json", result_config(self.checkpoint, self.recipe))

    def _index(self) -> dict[str, Any]:
        weight_map = {output.name: shard.name for shard in self.shards for output in shard.outputs}
        total = sum(shard.nbytes for shard in self.shards)
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

    def _write_manifest(self, partial: PartialFolder, source_hashes: dict[Path, str]) -> dict[str, Any]:
        def described(path: Path, full_hash: str) -> dict[str, Any]:
            return {**describe_file(path, full_hash), "name": source_name(self.checkpoint.folder, path)}

        finished = {name: entry["hash"] for name, entry in partial.finished.items()}
        written = sorted(path for path in partial.path.iterdir() if not path.name.startswith("."))
        manifest = new_manifest(
            source={
                "folder": str(self.checkpoint.folder),
                "framework": self.checkpoint.framework,
                "files": [described(path, source_hashes[path]) for path in self.checkpoint.files],
                "companions": [described(path, file_hash(path)) for path in self.companions],
                "left_out": list(self.left_out),
                **({"adapter": str(self.adapter)} if self.adapter else {}),
            },
            settings=self.settings,
            quantization=summarise(self.recipe, self.checkpoint.model),
            num_tensors=sum(len(shard.outputs) for shard in self.shards),
            files=[describe_file(path, finished.get(path.name) or hash_file(path)) for path in written],
        )
        _write_json(partial.path / MANIFEST_NAME, manifest)
        return manifest


def _checked_hash(path: Path) -> str:
    """The content hash of a source file, after its checksums where it has any."""
    check_contents(path)
    return file_hash(path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomic(path, to_json(value, indent=2) + "\n")
