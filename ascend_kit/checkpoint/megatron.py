"""Reader of MindSpeed-LLM / Megatron-core checkpoints: tensor and pipeline shards under Hugging Face names.

Each file (see `source`) is a pickled dictionary with `model` (or `model0`, `model1`, ... for virtual pipeline chunks)
and the training arguments. Nothing in it is executed (see `torch_file`). Config and tokenizer come from the original
Hugging Face folder.

Merging, with N query heads, K KV heads, H head size:
- embedding, output layer: shards stacked by rows, padding rows beyond the vocabulary cut off;
- linear_qkv: per KV group the rows of N/K query heads, one key head, one value head;
- linear_fc1: every shard is [gate part; up part], so both are taken apart before stacking;
- linear_proj, linear_fc2: shards side by side; norms: the same on every rank, which is checked.
Facts: Ascend/MindSpeed-LLM, mindspeed_llm/tasks/checkpoint (model_builder.py, convert_ckpt_v2.py).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ascend_kit.checkpoint.huggingface import Checkpoint, read_config
from ascend_kit.checkpoint.pieces import (
    LAYER_NAMES,
    MERGED_GATE_UP,
    MERGED_QKV,
    OUTER_NAMES,
    Renamed,
    joined,
    row_pieces,
    split_qkv,
    unknown_tensor,
)
from ascend_kit.checkpoint.source import SAVE_AGAIN, megatron_grid
from ascend_kit.checkpoint.tensor_file import CheckpointError, TensorSource
from ascend_kit.checkpoint.torch_file import TorchFile
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import FINAL_NORM, layer_prefix, layer_tensors

IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "_extra_state")
LAYER_KEY = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
FUSED_NORMS = {  # transformer-engine keeps a norm with the linear behind it
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
}
# Training arguments that change what a model computes, with the values that this package computes.
_SWITCHED_OFF = (
    "geglu squared_relu openai_gelu quick_geglu rotary_interleaved apply_layernorm_1p layernorm_zero_centered_gamma "
    "add_rmsnorm_offset post_norm input_embeds_norm multi_latent_attention"
)
_NONE = "num_experts num_moe_experts mtp_num_layers attn_logit_softcapping output_logit_softcapping"
_FACTORS = "rotary_percent scale_emb scale_depth embedding_multiplier_scale output_multiplier_scale"
NEUTRAL_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": ("rope",),
    "use_rotary_position_embeddings": (True,),
    **dict.fromkeys(_SWITCHED_OFF.split(), (False,)),
    **dict.fromkeys(_NONE.split(), (0,)),
    **dict.fromkeys(_FACTORS.split(), (1.0,)),
}


def open_megatron(folder: str | Path, tokenizer_path: str | Path | None) -> Checkpoint:
    """Open a Megatron checkpoint; `tokenizer_path` is the original Hugging Face folder (config.json,
    tokenizer).
    """
    folder = Path(folder)
    if tokenizer_path is None:
        raise CheckpointError(
            f"{folder} is a Megatron checkpoint, which carries neither config.json nor tokenizer: set "
            "tokenizer_path to the folder of the Hugging Face model that training started from"
        )
    grid = megatron_grid(folder)
    config = read_config(Path(tokenizer_path))
    model = ModelConfig.from_dict(config, where=f"{tokenizer_path}/config.json")
    chunks, files = [], []
    replaced: set[str] = set()
    for stage in grid:
        loaded = [_load(path) for path in stage]
        for file in loaded:
            _check_arguments(file.path, file.content, model, len(stage), len(grid))
            replaced.update(file.replaced)
        chunks.append([_chunks(file) for file in loaded])
        files += stage
    sources = _Merger(folder, model).merge(chunks)
    notes = [f"unknown classes in the pickle were replaced by inert ones: {', '.join(sorted(replaced))}"] * bool(
        replaced
    )
    return Checkpoint(
        folder, sources, config, files=files, framework="megatron", config_folder=Path(tokenizer_path), notes=notes
    )


def _load(path: Path) -> TorchFile:
    file = TorchFile(path, replace_unknown=True)
    if not isinstance(file.content, dict) or not any(key == "model" or key == "model0" for key in file.content):
        raise CheckpointError(f"{path} has no `model`: not a Megatron checkpoint file")
    return file


def _chunks(file: TorchFile) -> list[dict[str, TensorSource]]:
    """State dictionaries of the virtual pipeline chunks, one without virtual pipeline."""
    path, content = file.path, file.content
    keys = ["model"] if "model" in content else []
    while "model" not in content and f"model{len(keys)}" in content:
        keys.append(f"model{len(keys)}")
    chunks = []
    for key in keys:
        state = {name.removeprefix("module."): value for name, value in content[key].items()}
        if any(name.startswith("language_model.") or name == "language_model" for name in state):
            raise CheckpointError(
                f"{path} has the old Megatron layout (language_model.*); save it from a model "
                "built with --use-mcore-models"
            )
        chunks.append({name: t for name, t in file.tensors(state).items() if not name.endswith(IGNORED_SUFFIXES)})
    return chunks


def _check_arguments(path: Path, content: dict[str, Any], model: ModelConfig, tp_size: int, stages: int) -> None:
    """Compare the saved training arguments, as far as there are any, with config.json and the folder."""
    args = vars(content["args"]) if "args" in content and hasattr(content["args"], "__dict__") else {}
    if args.get("schedules_method") == "dualpipev":
        raise CheckpointError(
            f"{path} was trained with the dualpipev schedule, whose layer order is not read; {SAVE_AGAIN}"
        )
    if args.get("num_layers") and args["num_layers"] != model.num_layers + len(_noop_layers(args)):
        _refuse_argument(path, "num_layers", args["num_layers"], model.num_layers)
    scaling = model.rope_scaling or {"rope_type": "default", "factor": 1.0}
    kind = scaling["rope_type"]
    expected: dict[str, tuple[Any, ...]] = {
        "hidden_size": (model.hidden_size,),
        "num_attention_heads": (model.num_heads,),
        "num_query_groups": (model.num_kv_heads,) if args.get("group_query_attention") else (),
        "kv_channels": (model.head_dim,),
        "ffn_hidden_size": (model.intermediate_size,),
        "rotary_base": (model.rope_theta,),
        "untie_embeddings_and_output_weights": (not model.tie_embeddings,),
        "tensor_model_parallel_size": (tp_size,),
        "pipeline_model_parallel_size": (stages,),
        "norm_epsilon": (model.rms_norm_eps,),
        "layernorm_epsilon": (model.rms_norm_eps,),
        "add_qkv_bias": (model.attention_bias,),
        "qk_layernorm": (model.qk_norm,),
        "rope_scaling_type": (kind, "none" if kind == "default" else kind),
        "use_rope_scaling": (kind == "llama3",),
        "rope_scaling_factor": (scaling["factor"],) if kind != "default" and args.get("rope_scaling_type") else (),
        "rotary_seq_len_interpolation_factor": (scaling["factor"] if kind == "linear" else 1,),
        **NEUTRAL_ARGUMENTS,
    }
    for name, values in expected.items():
        found = args.get(name)
        if found is not None and values and not any(_is_equal(found, value) for value in values):
            _refuse_argument(path, name, found, " or ".join(map(str, values)))


def _refuse_argument(path: Path, name: str, found: Any, wanted: Any) -> None:
    raise CheckpointError(
        f"{path}: trained with {name}={found}, config.json or the folder says {wanted}; "
        "is tokenizer_path the model that training started from?"
    )


def _is_equal(found: Any, value: Any) -> bool:
    if isinstance(value, float) and type(found) in (int, float):
        return math.isclose(found, value, rel_tol=1e-6)
    return found == value or str(found).lower() == str(value).lower()


def _noop_layers(args: dict[str, Any]) -> set[int]:
    """Slots of the layer count that hold no layer; saved as a set of numbers or as text like `31,63`."""
    noop = args.get("noop_layers") or ()
    return {int(item) for item in (noop.split(",") if isinstance(noop, str) else noop)}


class _Merger:
    """Builds Hugging Face tensors out of [stage][tensor rank][chunk] state dictionaries."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.folder, self.model, self.tensors = folder, model, layer_tensors(model)
        self.result = Renamed()

    def merge(self, stages: list[list[list[dict[str, TensorSource]]]]) -> dict[str, TensorSource]:
        # Present layers in the order (chunk, stage, local number) are the model's layers: this covers uneven
        # stages, virtual pipeline and no-op layers (which have no tensors) alike.
        layer = 0
        for chunk in range(max(len(rank) for stage in stages for rank in stage)):
            for number, stage in enumerate(stages):
                shards = [rank[chunk] for rank in stage if chunk < len(rank)]
                if len(shards) != len(stage):
                    raise CheckpointError(f"{self.folder}: ranks of stage {number} differ in their chunks")
                layer = self._merge_chunk(shards, layer)
        if layer != self.model.num_layers:
            raise CheckpointError(
                f"{self.folder}: the shards hold {layer} layers, config.json says {self.model.num_layers}"
            )
        return self.result

    def _merge_chunk(self, shards: list[dict[str, TensorSource]], first_layer: int) -> int:
        """Add one chunk's tensors; returns the number of the layer after its last."""
        for shard in shards[1:]:
            different = sorted(shard.keys() ^ shards[0].keys())
            if different:
                raise CheckpointError(f"{self.folder}: tensor {different[0]} is missing on some tensor ranks")
        local = sorted({int(match.group(1)) for name in shards[0] if (match := LAYER_KEY.fullmatch(name))})
        layers = {number: first_layer + position for position, number in enumerate(local)}
        for name in shards[0]:
            parts = [shard[name] for shard in shards]
            match = LAYER_KEY.fullmatch(name)
            if match:
                self._add_layer_tensor(layer_prefix(layers[int(match.group(1))]), match.group(2), parts)
            else:
                self._add_outer_tensor(name, parts)
        return first_layer + len(local)

    def _add_outer_tensor(self, name: str, parts: list[TensorSource]) -> None:
        target = OUTER_NAMES.get(name)
        if target is None:
            raise unknown_tensor(name, parts[0], "Megatron-core")
        whole = joined(name, parts, None if target == FINAL_NORM else 0)
        if target != FINAL_NORM:
            if whole.shape[0] < self.model.vocab_size:
                raise CheckpointError(
                    f"{whole.origin}: {name} has {whole.shape[0]} rows over all ranks, config.json says "
                    f"vocab_size {self.model.vocab_size}"
                )
            whole = row_pieces([(whole, 0, self.model.vocab_size)])  # without the rows of padding
        self.result.add(target, whole)

    def _add_layer_tensor(self, prefix: str, name: str, parts: list[TensorSource]) -> None:
        part, _, kind = name.rpartition(".")
        if name in FUSED_NORMS:
            self.result.add(prefix + FUSED_NORMS[name], joined(name, parts, None))
        elif part in MERGED_QKV:
            self.result.add_qkv(prefix, kind, split_qkv(self.model, name, parts))
        elif part in MERGED_GATE_UP:
            halves = [(part, part.shape[0] // 2) for part in parts]
            gate = row_pieces([(part, 0, half) for part, half in halves])
            self.result.add_gate_up(prefix, kind, gate, row_pieces([(part, half, 2 * half) for part, half in halves]))
        elif part in LAYER_NAMES:
            spec = self.tensors.get(target := f"{LAYER_NAMES[part]}.{kind}")
            self.result.add(prefix + target, joined(name, parts, spec.split if spec else None))
        else:
            raise unknown_tensor(f"decoder.layers.*.{name}", parts[0], "Megatron-core")
