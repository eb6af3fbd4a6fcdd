"""Convert a checkpoint: any readable source to the standard Hugging Face layout in a chosen precision."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascend_kit.checkpoint.huggingface import Checkpoint, open_checkpoint
from ascend_kit.checkpoint.manifest import (
    MANIFEST_NAME,
    describe_file,
    hash_file,
    new_manifest,
    read_manifest,
    verify,
)
from ascend_kit.checkpoint.megatron import ITERATION_FILE, is_megatron, open_megatron
from ascend_kit.checkpoint.quantized_layouts import MSMODELSLIM_FILE
from ascend_kit.checkpoint.recipe import DTYPES, Recipe, plan_jobs, result_config, summarise
from ascend_kit.checkpoint.schema import check_tensors, kept_linears, linear_names
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.checkpoint.writer import PartialFolder, Shard, plan_shards, write_shard
from ascend_kit.model.config import ModelConfig

QUANTIZE = ("none", "w8a8", "w8a16", "auto")
IF_EXISTS = ("reuse", "refuse", "overwrite")
FRAMEWORKS = ("auto", "huggingface", "megatron")
MAX_SHARD_BYTES = 4 << 30
COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".merges", ".md")
NOT_COPIED = ("config.json", MANIFEST_NAME, MSMODELSLIM_FILE)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class ConversionResult:
    """What `convert` did."""

    folder: Path
    reused: bool
    manifest: dict[str, Any] = field(repr=False)
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    resumed_shards: tuple[str, ...] = ()

    @property
    def scheme(self) -> str:
        """none, w8a8, w8a16 or mixed."""
        return self.manifest["quantization"]["scheme"]

    @property
    def mb_per_s(self) -> float | None:
        """Bytes written per second in 10^6; None when nothing was written."""
        return self.bytes_written / self.seconds / 1e6 if self.seconds and self.bytes_written else None


def convert(
    input_model: str | Path,
    output_model: str | Path,
    *,
    precision: str = "bf16",
    quantize: str = "none",
    quantize_keep: Sequence[str] = ("lm_head",),
    framework: str = "auto",
    tokenizer_path: str | Path | None = None,
    if_exists: str = "refuse",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Progress | None = None,
    before_publish: Callable[[Path], None] | None = None,
) -> ConversionResult:
    """Write `input_model` to `output_model` in another precision; the source is never changed.

    precision: bf16, fp16, fp32 (everything that is not int8). quantize: none, w8a8, w8a16 (int8 linears).
    quantize_keep: linears that stay float, by full name, last part (`down_proj`) or `re:` expression.
    framework: auto, huggingface, megatron; `tokenizer_path` is the folder of tokenizer files (for Megatron
    also of config.json). if_exists: refuse, reuse (only if made from the same source with the same
    settings), overwrite. `before_publish` gets the finished folder before it takes its final name; raising
    there keeps the destination absent. Progress is reported in bytes written. Raises CheckpointError or
    ValueError with nothing half-written.
    """
    _check_choices(
        precision=(precision, DTYPES),
        quantize=(quantize, QUANTIZE),
        framework=(framework, FRAMEWORKS),
        if_exists=(if_exists, IF_EXISTS),
    )
    source_folder, destination = Path(input_model).resolve(), Path(os.path.abspath(output_model))
    check_destination(source_folder, destination)
    checkpoint = open_source(source_folder, framework, tokenizer_path)
    model = ModelConfig.from_dict(checkpoint.config, where=f"{checkpoint.config_folder}/config.json")
    check_tensors(checkpoint, model)
    settings = {
        "precision": precision,
        "quantize": quantize,
        "quantize_keep": sorted(quantize_keep),
        "framework": checkpoint.framework,
    }
    if destination.exists():
        reused = _existing(destination, checkpoint, settings, if_exists)
        if reused is not None:
            return reused
    recipe = Recipe(DTYPES[precision], choose_schemes(model, quantize, quantize_keep))
    job = _Conversion(
        checkpoint, model, recipe, settings, destination, tokenizer_path, max_shard_bytes, on_progress
    )
    return job.run(before_publish)


def choose_schemes(model: ModelConfig, quantize: str, keep: Sequence[str]) -> dict[str, str]:
    """Linear -> scheme when every linear that is not kept gets the same one."""
    if quantize == "none":
        return {}
    kept = kept_linears(model, list(keep))
    return {name: quantize for name in linear_names(model) if name not in kept}


def open_source(folder: Path, framework: str, tokenizer_path: str | Path | None) -> Checkpoint:
    """The source checkpoint, its format found out when `framework` is auto."""
    megatron = is_megatron(folder)
    if framework == "huggingface" and megatron:
        raise CheckpointError(f"{folder} is a Megatron checkpoint, but framework is huggingface; use auto")
    if framework == "megatron" and not megatron:
        raise CheckpointError(
            f"{folder} is not a Megatron checkpoint: it has neither {ITERATION_FILE} nor mp_rank_* folders"
        )
    return open_megatron(folder, tokenizer_path) if megatron else open_checkpoint(folder)


def check_destination(source: Path, destination: Path) -> None:
    """ValueError when writing to `destination` could touch the source."""
    if not source.is_dir():
        raise CheckpointError(f"input_model: no checkpoint folder at {source}")
    real = destination.resolve()
    if real == source or (destination.exists() and os.path.samefile(source, destination)):
        raise CheckpointError(f"output_model {destination} is the source itself; choose another folder")
    if real in source.parents or source in real.parents:
        raise CheckpointError(
            f"output_model {destination} and input_model {source} lie inside each other; choose a "
            "folder beside the source"
        )


def _check_choices(**choices: tuple[str, Sequence[str]]) -> None:
    for name, (given, allowed) in choices.items():
        if given not in allowed:
            raise ValueError(f"{name}={given!r}: allowed are {', '.join(allowed)}")


def _existing(
    destination: Path, checkpoint: Checkpoint, settings: dict[str, Any], if_exists: str
) -> ConversionResult | None:
    """The result to reuse, None when it is to be overwritten; CheckpointError otherwise."""
    manifest = read_manifest(destination) if destination.is_dir() else None
    if if_exists == "refuse":
        raise CheckpointError(
            f"output_model {destination} exists; choose another folder, or if_exists=reuse or "
            "overwrite (if_model_exists in a parameter file)"
        )
    if manifest is None:
        raise CheckpointError(
            f"output_model {destination} exists and was not made by convert (no {MANIFEST_NAME}); "
            "it is neither reused nor overwritten, remove it yourself"
        )
    if if_exists == "overwrite":
        return None
    verify(destination)
    _check_same(destination, manifest, checkpoint, settings)
    return ConversionResult(destination, True, manifest)


def _check_same(
    destination: Path, manifest: dict[str, Any], checkpoint: Checkpoint, settings: dict[str, Any]
) -> None:
    way_out = "use if_exists=overwrite (if_model_exists in a parameter file) or another output_model"
    for key in sorted(settings.keys() | manifest["settings"].keys()):
        was, now = manifest["settings"].get(key), settings.get(key)
        if was != now:
            raise CheckpointError(f"{destination} was converted with {key}={was}, now {key}={now}; {way_out}")
    entries = {entry["name"]: entry for entry in manifest["source"]["files"]}
    for path in checkpoint.files:
        name = source_name(checkpoint, path)
        if name not in entries or not _is_same_file(path, entries.pop(name)):
            raise CheckpointError(f"{destination} was made from another version of {path}; {way_out}")
    if entries:
        raise CheckpointError(
            f"{destination} was made from more files than {checkpoint.folder} has now: "
            f"{', '.join(entries)}; {way_out}"
        )


def _is_same_file(path: Path, entry: dict[str, Any]) -> bool:
    now = describe_file(path)
    if now["size"] != entry["size"] or now["header_sha256"] != entry["header_sha256"]:
        return False
    # The same time stamp is trusted; a copied or touched file is compared byte for byte.
    return now["mtime_ns"] == entry["mtime_ns"] or hash_file(path) == entry["sha256"]


def source_name(checkpoint: Checkpoint, path: Path) -> str:
    """A source file's name in the manifest, relative to the checkpoint when it lies inside."""
    return (
        path.relative_to(checkpoint.folder).as_posix()
        if path.is_relative_to(checkpoint.folder)
        else path.name
    )


class _Conversion:
    """One run: plan, write the shards, add the small files, describe everything, publish."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: ModelConfig,
        recipe: Recipe,
        settings: dict[str, Any],
        destination: Path,
        tokenizer_path: str | Path | None,
        max_shard_bytes: int,
        on_progress: Progress | None,
    ) -> None:
        self.checkpoint, self.model, self.recipe, self.settings = checkpoint, model, recipe, settings
        self.destination, self.tokenizer_path = destination, Path(tokenizer_path) if tokenizer_path else None
        self.on_progress = on_progress
        self.shards = plan_shards(plan_jobs(checkpoint, model, recipe), max_shard_bytes)
        self.total_bytes, self.done_bytes = sum(shard.nbytes for shard in self.shards), 0

    def run(self, before_publish: Callable[[Path], None] | None) -> ConversionResult:
        started = time.perf_counter()
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        source_hashes = SourceHashes(self.checkpoint.files)
        with PartialFolder(self.destination, self._fingerprint()) as partial:
            self._check_space(partial)
            source_hashes.start()
            try:
                resumed = [shard.name for shard in self.shards if self._write(shard, partial)]
            except BaseException:
                source_hashes.cancel()
                raise
            self._write_small_files(partial.path)
            manifest = self._write_manifest(partial, source_hashes.result())
            if before_publish:
                before_publish(partial.path)
            partial.publish()
        return ConversionResult(
            self.destination,
            False,
            manifest,
            resumed_shards=tuple(resumed),
            seconds=time.perf_counter() - started,
            bytes_read=sum(entry["size"] for entry in manifest["source"]["files"]),
            bytes_written=sum(entry["size"] for entry in manifest["files"]),
        )

    def _fingerprint(self) -> str:
        plan = {
            "settings": self.settings,
            "shards": [shard.describe() for shard in self.shards],
            "source": [
                [str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in self.checkpoint.files
            ],
        }
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

    def _check_space(self, partial: PartialFolder) -> None:
        missing = sum(shard.nbytes for shard in self.shards if shard.name not in partial.finished)
        free = shutil.disk_usage(partial.path).free
        if missing > free:
            raise CheckpointError(
                f"the result needs {missing} bytes, {self.destination.parent} has {free} free; free "
                "space or choose another output_model"
            )

    def _write(self, shard: Shard, partial: PartialFolder) -> bool:
        """True if the shard was there already, finished by an earlier run."""
        if partial.is_finished(shard.name):
            self._advance(shard.nbytes)
            return True
        partial.record(shard.name, write_shard(shard, partial.path, self._advance))
        return False

    def _advance(self, count: int) -> None:
        self.done_bytes += count
        if self.on_progress:
            self.on_progress(self.done_bytes, self.total_bytes)

    def _write_small_files(self, folder: Path) -> None:
        if len(self.shards) > 1:
            _write_json(folder / "model.safetensors.index.json", self._index())
        for path in small_files(self.checkpoint.config_folder, self.tokenizer_path):
            shutil.copyfile(path, folder / path.name)
        _write_json(folder / "config.json", result_config(self.checkpoint.config, self.model, self.recipe))

    def _index(self) -> dict[str, Any]:
        weight_map = {output.name: shard.name for shard in self.shards for output in shard.outputs}
        return {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}

    def _write_manifest(self, partial: PartialFolder, source_hashes: dict[Path, str]) -> dict[str, Any]:
        sources = [
            {**describe_file(path, source_hashes[path]), "name": source_name(self.checkpoint, path)}
            for path in self.checkpoint.files
        ]
        wanted = {
            path.name for path in partial.path.iterdir() if not path.name.endswith((".new", ".writing"))
        }
        names = sorted(wanted - {"progress.json", ".lock", MANIFEST_NAME})
        files = [describe_file(partial.path / name, self._hash(partial, name)) for name in names]
        manifest = new_manifest(
            source={
                "folder": str(self.checkpoint.folder),
                "framework": self.checkpoint.framework,
                "files": sources,
            },
            settings=self.settings,
            files=files,
            quantization=summarise(self.recipe.schemes, self.model),
            num_tensors=sum(len(shard.outputs) for shard in self.shards),
        )
        _write_json(partial.path / MANIFEST_NAME, manifest)
        return manifest

    def _hash(self, partial: PartialFolder, name: str) -> str:
        entry = partial.finished.get(name)
        return entry["sha256"] if entry else hash_file(partial.path / name)


class SourceHashes:
    """Hashes of the source files, computed beside the conversion while their pages are in memory anyway."""

    def __init__(self, files: list[Path]) -> None:
        self.files, self.hashes = files, {}
        self._error: BaseException | None = None
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="source-hash", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def cancel(self) -> None:
        self._cancelled.set()
        self._thread.join()

    def result(self) -> dict[Path, str]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.hashes

    def _run(self) -> None:
        try:
            for path in self.files:
                self.hashes[path] = hash_file(path, self._check)
        except BaseException as error:
            self._error = error

    def _check(self, _: int) -> None:
        if self._cancelled.is_set():
            raise InterruptedError("the conversion stopped")


def small_files(folder: Path, tokenizer_path: Path | None) -> list[Path]:
    """Tokenizer, generation settings, licence and the like; `tokenizer_path` replaces what it also has.

    Weights, their index and program files (*.py) are not copied: a model folder must not bring code along.
    """
    found = {path.name: path for path in sorted(folder.iterdir()) if _is_small_file(path)}
    if tokenizer_path is not None:
        if not tokenizer_path.is_dir():
            raise CheckpointError(f"tokenizer_path: no folder at {tokenizer_path}")
        found |= {
            name: tokenizer_path / name for name in TOKENIZER_FILES if (tokenizer_path / name).is_file()
        }
    return list(found.values())


def _is_small_file(path: Path) -> bool:
    named = path.suffix in COPIED_SUFFIXES or path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
    return (
        path.is_file()
        and named
        and path.name not in NOT_COPIED
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
