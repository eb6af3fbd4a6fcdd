"""Convert a checkpoint: any readable source to the standard Hugging Face layout in a chosen precision."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ascend_kit.checkpoint.adapter import adapter_digest
from ascend_kit.checkpoint.check import check_tensors
from ascend_kit.checkpoint.conversion import Conversion, ConversionPlan, ConversionResult
from ascend_kit.checkpoint.huggingface import Checkpoint, check_companions, companion_files, load_tokenizer
from ascend_kit.checkpoint.identity import check_converted
from ascend_kit.checkpoint.int8_plan import Int8Options, plan_int8
from ascend_kit.checkpoint.manifest import MANIFEST_NAME, changed_sources, read_manifest, verify
from ascend_kit.checkpoint.sensitivity import Progress
from ascend_kit.checkpoint.source import FRAMEWORKS, open_source
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.checkpoint.writer import undo_exchange
from ascend_kit.device.device import select_device
from ascend_kit.files import GIB
from ascend_kit.model.config import DTYPES, ModelConfig, end_ids_in
from ascend_kit.model.tensors import kept_linears
from ascend_kit.params import Experiment

QUANTIZE = ("none", "w8a8", "w8a16", "w4a16", "auto")
IF_EXISTS = ("reuse", "refuse", "overwrite")
MAX_SHARD_BYTES = 4 << 30
CHECK_BYTES = 4 * GIB  # of weights that `check_model` reads whole: some seconds
# Parameters of an Experiment that `convert` takes under the same name.
SHARED_PARAMETERS = (
    "input_model",
    "precision",
    "quantize",
    "quantize_keep",
    "framework",
    "tokenizer_path",
    "adapter_path",
    "calibration_file",
    "smooth",
    "clip_search",
    "max_kl",
    "max_accuracy_loss",
)


def convert(
    input_model: str | Path | Experiment,
    output_model: str | Path | None = None,
    *,
    precision: str = "bf16",
    quantize: str = "none",
    quantize_keep: Sequence[str] = ("lm_head",),
    framework: str = "auto",
    tokenizer_path: str | Path | None = None,
    adapter_path: str | Path | None = None,
    if_exists: str = "refuse",
    calibration_file: str | Path | None = None,
    smooth: float | None = None,
    clip_search: bool = False,
    max_kl: float | None = None,
    max_accuracy_loss: float | None = None,
    device: str = "cpu",
    bandwidth_bytes_per_s: float | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Progress | None = None,
    before_publish: Callable[[Path], object] | None = None,
) -> ConversionResult:
    """Write `input_model` to `output_model` in another precision; the source is never changed.

    Called with an Experiment (paths resolved), its parameters stand for all but the callbacks and the bandwidth.

    precision: bf16, fp16, fp32, of everything that is not int8. framework: auto, huggingface, megatron,
    mindspore; `tokenizer_path` is the folder of the tokenizer (for Megatron and MindSpore also of config.json),
    `adapter_path` that of a LoRA adapter (PEFT) to merge.
    quantize: none, w8a8, w8a16, w4a16, or auto: the cheapest mix within `max_kl` (nats per token) or
    `max_accuracy_loss` (share of next tokens) on the texts of `calibration_file`. quantize_keep: linears
    that stay float, by full name, last part (`down_proj`) or `re:` expression. smooth: share of activation
    outliers moved into w8a8 weights, 0..1. clip_search: smaller scales where that lowers the output error.
    `device` runs the calibration; `bandwidth_bytes_per_s` of the target turns bytes into predicted step
    times. if_exists: refuse, reuse (only if made from the same source with the same settings), overwrite.
    `on_progress(done, total, text)` counts layers while calibrating, then bytes written. `before_publish`
    gets the finished folder before it takes its final name; raising there keeps the destination absent.
    Raises CheckpointError or ValueError; a destination is complete or does not exist.
    """
    if isinstance(input_model, Experiment):
        arguments = experiment_arguments(input_model)
        if bandwidth_bytes_per_s is not None:  # measured, which says more than the card's nominal figure
            arguments["bandwidth_bytes_per_s"] = bandwidth_bytes_per_s
        return convert(**arguments, on_progress=on_progress, before_publish=before_publish)
    if output_model is None:
        raise ValueError("output_model is missing: the folder to write")
    _check_choices(
        precision=(precision, tuple(DTYPES)),
        quantize=(quantize, QUANTIZE),
        framework=(framework, FRAMEWORKS),
        if_exists=(if_exists, IF_EXISTS),
    )
    options = Int8Options(
        quantize, tuple(quantize_keep), calibration_file, smooth, clip_search, max_kl, max_accuracy_loss
    )
    options.check()
    source_folder, destination = Path(input_model).resolve(), Path(os.path.abspath(output_model))
    _check_destination(source_folder, destination)
    checkpoint = open_source(source_folder, framework, tokenizer_path, adapter_path)
    model = ModelConfig.from_dict(checkpoint.config, where=f"{checkpoint.config_folder}/config.json")
    left_out = (*checkpoint.notes, *check_tensors(checkpoint, model))
    texts = Path(tokenizer_path) if tokenizer_path else None
    check_companions(companion_files(checkpoint.config_folder, texts))
    settings = {"precision": precision, "framework": checkpoint.framework, **options.settings()}
    adapter = None if adapter_path is None else Path(adapter_path).resolve()
    if adapter is not None:
        settings["adapter_sha256"] = adapter_digest(adapter)
    manifest = _existing_result(destination, checkpoint, settings, if_exists, texts)
    if manifest is not None:
        return ConversionResult(destination, True, manifest)
    recipe, mix = plan_int8(
        checkpoint,
        model,
        DTYPES[precision],
        options,
        tokenizer_folder=texts or checkpoint.config_folder,
        device=select_device(device).torch_device,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        on_progress=on_progress,
    )
    plan = ConversionPlan(checkpoint, model, recipe, settings, mix, left_out, adapter)
    return Conversion(plan, destination, texts, max_shard_bytes, on_progress).run(before_publish)


def experiment_arguments(experiment: Experiment) -> dict[str, Any]:
    """The arguments of `convert` that an Experiment's parameters stand for."""
    device = select_device(experiment.device, experiment.device_id)
    return {
        **{name: getattr(experiment, name) for name in SHARED_PARAMETERS},
        "output_model": experiment.converted_folder,
        "if_exists": experiment.if_model_exists,
        "device": device.kind if device.kind == "cpu" else f"{device.kind}:{device.index}",
        "bandwidth_bytes_per_s": device.peak.bandwidth_bytes_per_s if device.peak else None,
    }


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
    checkpoint = open_source(source, experiment.framework, experiment.tokenizer_path, experiment.adapter_path)
    model = ModelConfig.from_dict(checkpoint.config, where=f"{checkpoint.config_folder}/config.json")
    texts = Path(experiment.tokenizer_path) if experiment.tokenizer_path else None
    check_companions(companion_files(checkpoint.config_folder, texts))
    end_ids_in(checkpoint.config_folder / "generation_config.json")
    left_out = [*checkpoint.notes, *check_tensors(checkpoint, model, data=False)]
    num_bytes = sum(path.stat().st_size for path in checkpoint.files)
    if num_bytes <= CHECK_BYTES:
        checkpoint.check_data()
    else:
        left_out.append(f"{num_bytes / GIB:.1f} GiB of weights, not compared with checksums: 02_convert does that")
    verify(source, full=num_bytes <= CHECK_BYTES)
    load_tokenizer(texts or checkpoint.config_folder)
    kept_linears(model, experiment.quantize_keep)
    runs_converted = experiment.use_model == "converted" and experiment.if_model_exists != "overwrite"
    if runs_converted and experiment.converted_folder.is_dir():
        check_converted(experiment, content=False)
    return left_out


def _check_choices(**choices: tuple[str, Sequence[str]]) -> None:
    for name, (given, allowed) in choices.items():
        if given not in allowed:
            raise ValueError(f"{name}={given!r}: allowed are {', '.join(allowed)}")


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
    destination: Path, checkpoint: Checkpoint, settings: dict[str, Any], if_exists: str, tokenizer_path: Path | None
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
    _check_same(destination, manifest, checkpoint, settings, tokenizer_path)
    return manifest


def _check_same(
    destination: Path,
    manifest: dict[str, Any],
    checkpoint: Checkpoint,
    settings: dict[str, Any],
    tokenizer_path: Path | None,
) -> None:
    way_out = "use if_exists=overwrite (if_model_exists in a parameter file) or another output_model"
    for key in sorted(settings.keys() | manifest["settings"].keys()):
        was, now = manifest["settings"].get(key), settings.get(key)
        if was != now:
            raise CheckpointError(f"{destination} was converted with {key}={was}, now {key}={now}; {way_out}")
    companions = companion_files(checkpoint.config_folder, tokenizer_path)
    for text in changed_sources(checkpoint.folder, checkpoint.files, companions, manifest):
        raise CheckpointError(f"{destination} was made from another version of {checkpoint.folder}: {text}; {way_out}")
