"""Convert a checkpoint: any readable source to the standard Hugging Face layout in a chosen precision."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ascend_kit.checkpoint import megatron, mindspore
from ascend_kit.checkpoint.adapter import adapter_digest, with_adapter
from ascend_kit.checkpoint.check import check_tensors
from ascend_kit.checkpoint.conversion import MAX_SHARD_BYTES, Conversion, ConversionResult
from ascend_kit.checkpoint.huggingface import (
    Checkpoint,
    check_companions,
    companion_files,
    load_tokenizer,
    open_checkpoint,
)
from ascend_kit.checkpoint.manifest import MANIFEST_NAME, changed_sources, check_converted, read_manifest, verify
from ascend_kit.checkpoint.recipe import plan_recipe
from ascend_kit.checkpoint.sensitivity import Progress
from ascend_kit.checkpoint.source import framework_of
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.checkpoint.writer import undo_exchange
from ascend_kit.device.device import select_device
from ascend_kit.files import GIB
from ascend_kit.model.config import end_ids_in
from ascend_kit.model.tensors import kept_linears
from ascend_kit.params import Experiment, ParameterError
from ascend_kit.params.fields import ConversionParameters
from ascend_kit.params.values import explained

CHECK_BYTES = 4 * GIB  # of weights that `check_model` reads whole: some seconds
IF_EXISTS = ("refuse", "reuse", "overwrite")
PATHS = ("input_model", "output_model", "tokenizer_path", "adapter_path", "calibration_file")


def convert(
    input_model: str | Path | Experiment,
    output_model: str | Path | None = None,
    *,
    if_exists: str = "refuse",
    device: str = "cpu",
    bandwidth_bytes_per_s: float | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Progress | None = None,
    before_publish: Callable[[Path], object] | None = None,
    **parameters: Any,
) -> ConversionResult:
    """Write `input_model` to `output_model` in another precision; the source is never changed.

    An Experiment (paths resolved) says all but the callbacks and the bandwidth. Otherwise `parameters` are those of
    ConversionParameters, with its checks and defaults:
    precision: bf16, fp16, fp32, of everything that is not quantised. framework: auto, huggingface, megatron,
    mindspore; `tokenizer_path` is the folder of the tokenizer (for Megatron and MindSpore also of config.json),
    `adapter_path` that of a LoRA adapter (PEFT) to merge.
    quantize: none, w8a8, w8a16, w4a16, or auto: the cheapest mix within `max_kl` (nats per token) or
    `max_accuracy_loss` (share of next tokens) on the texts of `calibration_file`. quantize_keep: linears
    that stay float, by full name, last part (`down_proj`) or `re:` expression. smooth: share of activation
    outliers moved into w8a8 weights, 0..1. clip_search: smaller scales where that lowers the output error.
    `device` runs the calibration; `bandwidth_bytes_per_s` of the target (of a card its nominal one) turns bytes into
    predicted step times. if_exists: refuse, reuse (only if made from the same source with the same settings),
    overwrite. `on_progress(done, total, text)` counts layers while calibrating, then bytes written. `before_publish`
    gets the finished folder before it takes its final name; raising there keeps the destination absent.
    Raises CheckpointError or ValueError; a destination is complete or does not exist.
    """
    wanted, device_id = input_model, 0
    if isinstance(wanted, Experiment):
        output_model, if_exists = wanted.converted_folder, wanted.if_model_exists
        device, device_id = wanted.device, wanted.device_id
    else:
        if if_exists not in IF_EXISTS:
            raise ValueError(f"if_exists={if_exists!r}: allowed are {', '.join(IF_EXISTS)}")
        wanted = _parameters({"input_model": wanted, "output_model": output_model, **parameters})
    if output_model is None:
        raise ValueError("output_model is missing: the folder to write")
    card = select_device(device, device_id)
    if bandwidth_bytes_per_s is None and card.peak:
        bandwidth_bytes_per_s = card.peak.bandwidth_bytes_per_s
    destination = Path(os.path.abspath(output_model))
    _check_destination(Path(wanted.input_model).resolve(), destination)
    checkpoint, companions, left_out = _opened(wanted)
    settings = _settings(wanted, checkpoint)
    manifest = _existing_result(destination, checkpoint, settings, if_exists, companions)
    if manifest is not None:
        return ConversionResult(destination, True, manifest)
    recipe = plan_recipe(
        checkpoint, wanted, device=card.torch_device, bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        on_progress=on_progress,
    )  # fmt: skip
    adapter = Path(wanted.adapter_path).resolve() if wanted.adapter_path else None
    return Conversion(
        checkpoint, recipe, settings, destination, companions, left_out, adapter, max_shard_bytes, on_progress
    ).run(before_publish)


def _parameters(given: dict[str, Any]) -> ConversionParameters:
    """The parameters of a call with paths, checked; a path is never the word `demo`."""
    values: dict[str, Any] = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    values |= {key: os.path.abspath(values[key]) for key in PATHS if values.get(key) is not None}
    try:
        return ConversionParameters.model_validate(values)
    except ValidationError as error:
        raise ParameterError(explained(error, ConversionParameters, "convert", {})) from None


def open_source(
    folder: Path, framework: str, tokenizer_path: str | Path | None, adapter_path: str | Path | None = None
) -> Checkpoint:
    """The source checkpoint, with the adapter merged where one is named; its format is found out when `framework` is
    auto. CheckpointError where it is another one."""
    found = framework_of(folder)
    if framework not in ("auto", found):
        raise CheckpointError(f"{folder} holds a {found} checkpoint as far as its files tell, framework is {framework}")
    if found == "huggingface":
        checkpoint = open_checkpoint(folder)
    else:
        reader = megatron.open_megatron if found == "megatron" else mindspore.open_mindspore
        checkpoint = reader(folder, tokenizer_path)
    return checkpoint if adapter_path is None else with_adapter(checkpoint, adapter_path)


def check_model(experiment: Experiment) -> list[str]:
    """What can be known of an experiment's model in seconds, without loading it.

    Headers and small files are read. Up to CHECK_BYTES of weights are read whole where something tells what they must
    be: the checksums in .bin, Megatron and MindSpore files, the hashes of a converted folder.
    Returns what was left out, in words. CheckpointError or ValueError names what does not fit: config.json,
    tokenizer, names, shapes and dtypes of the tensors, `quantize_keep`, a converted folder made from another model.
    """
    source = Path(experiment.input_model)
    if not source.is_dir():
        return []
    checkpoint, _, left_out = _opened(experiment, data=False)
    num_bytes = sum(path.stat().st_size for path in checkpoint.files)
    if num_bytes <= CHECK_BYTES:
        checkpoint.check_data()
    else:
        left_out.append(f"{num_bytes / GIB:.1f} GiB of weights, not compared with checksums: 02_convert does that")
    verify(source, full=num_bytes <= CHECK_BYTES)
    load_tokenizer(experiment.tokenizer_path or checkpoint.config_folder)
    kept_linears(checkpoint.model, experiment.quantize_keep)
    runs_converted = experiment.use_model == "converted" and experiment.if_model_exists != "overwrite"
    if runs_converted and experiment.converted_folder.is_dir():
        check_converted(experiment, content=False)
    return left_out


def _opened(wanted: ConversionParameters, *, data: bool = True) -> tuple[Checkpoint, list[Path], list[str]]:
    """(the source, checked; its small files; what is in it and left out); without `data` fewer values are read."""
    folder, texts = Path(wanted.input_model).resolve(), wanted.tokenizer_path
    checkpoint = open_source(folder, wanted.framework, texts, wanted.adapter_path)
    left_out = [*checkpoint.notes, *check_tensors(checkpoint, checkpoint.model, data=data)]
    companions = companion_files(checkpoint.config_folder, Path(texts) if texts else None)
    check_companions(companions)
    end_ids_in(checkpoint.config_folder / "generation_config.json")
    return checkpoint, companions, left_out


def _settings(wanted: ConversionParameters, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the manifest keeps, and what must be the same for a result to be reused; files by their contents."""
    texts, adapter = Path(wanted.calibration_file or ""), wanted.adapter_path
    return {
        "framework": checkpoint.framework,
        **{
            name: getattr(wanted, name)
            for name in ConversionParameters.model_fields
            if name not in (*PATHS, "framework")
        },
        "quantize_keep": sorted(wanted.quantize_keep),
        "calibration_sha256": hashlib.sha256(texts.read_bytes()).hexdigest() if texts.is_file() else None,
        **({"adapter_sha256": adapter_digest(Path(adapter))} if adapter else {}),
    }


def _check_destination(source: Path, destination: Path) -> None:
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


def _existing_result(
    destination: Path, checkpoint: Checkpoint, settings: dict[str, Any], if_exists: str, companions: list[Path]
) -> dict[str, Any] | None:
    """The manifest of a result to reuse, None when there is none or it is to be overwritten; CheckpointError otherwise.

    First an exchange of folders that was cut off is undone.
    """
    undone = undo_exchange(destination)
    if undone:
        logging.getLogger(__name__).warning(undone)
    if not destination.exists():
        return None
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
    way_out = "use if_exists=overwrite (if_model_exists in a parameter file) or another output_model"
    for key in sorted(settings.keys() | manifest["settings"].keys()):
        was, now = manifest["settings"].get(key), settings.get(key)
        if was != now:
            raise CheckpointError(f"{destination} was converted with {key}={was}, now {key}={now}; {way_out}")
    for text in changed_sources(checkpoint.folder, checkpoint.files, companions, manifest):
        raise CheckpointError(f"{destination} was made from another version of {checkpoint.folder}: {text}; {way_out}")
    return manifest
