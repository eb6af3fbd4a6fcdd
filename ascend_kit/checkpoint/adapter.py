"""LoRA adapters in PEFT's layout, merged into the weights as they are read.

    W' = W + s B A,  s = lora_alpha / r, with use_rslora lora_alpha / sqrt(r)
    use_dora:  W' = m / ||W + s B A|| * (W + s B A), norms per output row
A module of an embedding has lora_embedding_A [r, vocabulary] and lora_embedding_B [hidden, r]. Merged in float32.
Facts: huggingface/peft, src/peft/tuners/lora (layer.py, dora.py, config.py).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascend_kit.checkpoint.huggingface import Checkpoint, open_weights
from ascend_kit.checkpoint.quantized_tensors import pattern_fits, refuse_unknown
from ascend_kit.checkpoint.tensor_file import ByRows, CheckpointError, TensorSource, read_json
from ascend_kit.model.tensors import EMBEDDING, HEAD

CONFIG_NAME, WEIGHT_NAMES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
PARTS = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|"
                   r"lora_magnitude_vector(?:\.weight)?)")  # fmt: skip
_READ_WORDS = "peft_type r lora_alpha use_rslora use_dora rank_pattern alpha_pattern bias lora_bias modules_to_save "
# Where the adapter comes from and how it was begun or trained; what it adds lies in its tensors.
_HARMLESS_WORDS = (
    "base_model_name_or_path revision task_type inference_mode auto_mapping peft_version lora_dropout "
    "init_lora_weights exclude_modules layers_to_transform layers_pattern megatron_config megatron_core loftq_config "
    "eva_config corda_config lora_ga_config runtime_config ensure_weight_tying qalora_group_size"
)
MERGE_WITH_PEFT = "merge it with peft (merge_and_unload) and use that folder"
KNOWN_KEYS = frozenset((*_READ_WORDS.split(), *_HARMLESS_WORDS.split()))


def adapter_digest(folder: Path) -> str:
    """sha256 over the adapter's settings and weights."""
    state = hashlib.sha256()
    weights = _weights(folder)
    _check_config(folder)
    for path in (folder / CONFIG_NAME, weights):
        state.update(path.read_bytes())
    return state.hexdigest()


def with_adapter(checkpoint: Checkpoint, folder: str | Path) -> Checkpoint:
    """The checkpoint with the adapter of `folder` merged into it.

    CheckpointError names what cannot be merged: other kinds of adapters and settings, tensors that fit no module, int8
    weights, the shared matrix of a tied model.
    """
    folder = Path(folder)
    if checkpoint.quantization.schemes:
        raise CheckpointError(f"{checkpoint.folder} is quantised; an adapter is merged into the float model")
    config = _check_config(folder)
    modules, replaced = _tensors(folder)
    sources = dict(checkpoint.sources)
    for module, parts in modules.items():
        _apply(folder, checkpoint, config, module, parts, sources)
    for name, source in replaced.items():
        _check_place(folder, checkpoint, name, source.shape)
        sources[name] = source
    return Checkpoint(
        checkpoint.folder, sources, checkpoint.config, files=checkpoint.files,
        framework=f"{checkpoint.framework} + adapter", config_folder=checkpoint.config_folder, notes=checkpoint.notes,
    )  # fmt: skip


def _weights(folder: Path) -> Path:
    found = [folder / name for name in WEIGHT_NAMES if (folder / name).is_file()]
    if len(found) != 1:
        raise CheckpointError(f"adapter_path {folder}: expected one of {', '.join(WEIGHT_NAMES)}, found {len(found)}")
    return found[0]


def _check_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    config = read_json(path, "an adapter folder of PEFT needs it")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type={config.get('peft_type')!r}; only LORA (and DoRA) is merged")
    refuse_unknown(path, config, KNOWN_KEYS, f"is not merged; {MERGE_WITH_PEFT}")
    return config


def _tensors(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, TensorSource]]:
    """(module -> its parts in float32, tensor name -> what replaces it)."""
    path = _weights(folder)
    sources = open_weights(path)
    if not sources:
        raise CheckpointError(f"{path} holds no tensors")
    modules: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, TensorSource] = {}
    for name, source in sources.items():
        if not name.startswith(PREFIX):
            raise CheckpointError(f"{path}: tensor {name} does not begin with {PREFIX}: not written by PEFT's LoRA")
        match = PARTS.fullmatch(name.removeprefix(PREFIX))
        if match:
            part = match.group(2).removesuffix(".weight")  # lora_A, lora_B, lora_embedding_A, ...
            modules.setdefault(match.group(1), {})[part] = source.read().float()
        else:
            replaced[name.removeprefix(PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = source
    return modules, replaced


def _check_place(folder: Path, checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    if name not in checkpoint or checkpoint.shape(name) != shape:
        there = f"has shape {list(checkpoint.shape(name))}" if name in checkpoint else "does not exist"
        raise CheckpointError(
            f"{_weights(folder)}: {name} of shape {list(shape)} fits no tensor of {checkpoint.folder} (there it {there}"
            "); was the adapter trained on another model?"
        )
    if checkpoint.config.get("tie_word_embeddings") and name in (EMBEDDING, HEAD):
        raise CheckpointError(
            f"{_weights(folder)} changes {name}, which this model uses for embedding and head alike; {MERGE_WITH_PEFT}"
        )


def _apply(
    folder: Path,
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    module: str,
    parts: dict[str, Tensor],
    sources: dict[str, TensorSource],
) -> None:
    down, up = (parts.get(f"lora_{end}", parts.get(f"lora_embedding_{end}")) for end in "AB")
    if down is None or up is None or down.dim() != 2 or up.dim() != 2 or up.shape[1] != down.shape[0]:
        raise CheckpointError(f"{_weights(folder)}: {module} lacks lora_A or lora_B, or their shapes do not fit")
    rank = _of_pattern(folder, config, "rank_pattern", module, config.get("r"))
    if rank != down.shape[0]:
        raise CheckpointError(f"{_weights(folder)}: {module} has rank {down.shape[0]}, {CONFIG_NAME} says {rank}")
    alpha = _of_pattern(folder, config, "alpha_pattern", module, config.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        raise CheckpointError(f"{folder / CONFIG_NAME}: lora_alpha={alpha!r} is no number")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if "lora_embedding_A" in parts:  # [r, vocabulary] and [hidden, r]; the table is [vocabulary, hidden]
        down, up = up.t().contiguous(), down.t().contiguous()
    weight = f"{module}.weight"
    _check_place(folder, checkpoint, weight, (up.shape[0], down.shape[1]))
    magnitude = parts.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise CheckpointError(f"{_weights(folder)}: use_dora={config.get('use_dora')}, but {module} says otherwise")
    inner = checkpoint.source(weight)

    def rows(start: int, stop: int) -> Tensor:
        found = inner.read_slice(0, start, stop).float() + scaling * (up[start:stop] @ down)
        if magnitude is None:
            return found
        return found * (magnitude.reshape(-1)[start:stop] / found.norm(dim=1)).unsqueeze(1)

    sources[weight] = ByRows(rows, torch.float32, inner.shape, inner.origin)
    added = parts.get("lora_B.bias")
    if added is not None:
        bias = f"{module}.bias"
        _check_place(folder, checkpoint, bias, tuple(added.shape))
        old = checkpoint.source(bias)
        with_added = lambda start, stop: old.read_slice(0, start, stop).float() + scaling * added[start:stop]  # noqa: E731
        sources[bias] = ByRows(with_added, torch.float32, old.shape, old.origin)


def _of_pattern(folder: Path, config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that fits the module's whole name or its end, as PEFT looks it up."""
    where, patterns = folder / CONFIG_NAME, config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{where}: {key}={patterns!r}; allowed are patterns of module names with their values")
    return next((value for p, value in patterns.items() if pattern_fits(where, rf"(.*\.)?({p})$", module)), default)
