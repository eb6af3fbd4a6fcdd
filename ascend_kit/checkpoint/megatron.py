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

import functools
import math
import re
from pathlib import Path
from typing import Any

from ascend_kit.checkpoint.huggingface import Checkpoint, read_config
from ascend_kit.checkpoint.pieces import OUTER_NAMES, add_once, below_each_other, joined, renamed, row_pieces
from ascend_kit.checkpoint.source import SAVE_AGAIN, megatron_grid
from ascend_kit.checkpoint.tensor_file import CheckpointError, TensorSource
from ascend_kit.checkpoint.torch_file import TorchFile
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import EMBEDDING, HEAD

IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "_extra_state")
LAYER_KEY = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
FUSED_NORMS = {  # transformer-engine keeps a norm with the linear behind it
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
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
    whole = functools.partial(joined, advice="; is tokenizer_path the model that training started from?")
    sources = renamed(model, "Megatron-core", _parts(folder, model, chunks), whole)
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
    noop = args.get("noop_layers") or ()  # slots that hold no layer: a set of numbers, or text like `31,63`
    num_slots = model.num_layers + len(set(noop.split(",") if isinstance(noop, str) else noop))
    scaling = model.rope_scaling or {"rope_type": "default", "factor": 1.0}
    kind = scaling["rope_type"]
    expected: dict[str, tuple[Any, ...]] = {
        "num_layers": (num_slots,),
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
            raise CheckpointError(
                f"{path}: trained with {name}={found}, config.json or the folder says {' or '.join(map(str, values))}; "
                "is tokenizer_path the model that training started from?"
            )


def _is_equal(found: Any, value: Any) -> bool:
    if isinstance(value, float) and type(found) in (int, float):
        return math.isclose(found, value, rel_tol=1e-6)
    return found == value or str(found).lower() == str(value).lower()


def _parts(
    folder: Path, model: ModelConfig, stages: list[list[list[dict[str, TensorSource]]]]
) -> dict[str, list[TensorSource]]:
    """The parts on tensor ranks of every tensor, out of [stage][tensor rank][chunk] state dictionaries.

    Layers are numbered through. Present ones in the order (chunk, stage, local number) are the model's layers: this
    covers uneven stages, virtual pipeline and no-op layers (which have no tensors) alike.
    """
    result: dict[str, list[TensorSource]] = {}
    num_layers = 0
    for chunk in range(max(len(rank) for stage in stages for rank in stage)):
        for number, stage in enumerate(stages):
            shards = [rank[chunk] for rank in stage if chunk < len(rank)]
            if len(shards) != len(stage):
                raise CheckpointError(f"{folder}: ranks of stage {number} differ in their chunks")
            different = sorted({name for shard in shards for name in shard.keys() ^ shards[0].keys()})
            if different:
                raise CheckpointError(f"{folder}: tensor {different[0]} is missing on some tensor ranks")
            local = sorted({int(match[1]) for name in shards[0] if (match := LAYER_KEY.fullmatch(name))})
            for name in shards[0]:
                pieces = [shard[name] for shard in shards]
                if match := LAYER_KEY.fullmatch(name):
                    prefix = f"decoder.layers.{num_layers + local.index(int(match[1]))}."
                    for part, found in _layer_parts(match[2], pieces):
                        add_once(result, prefix + part, found, pieces[0].origin)
                else:
                    has_words = OUTER_NAMES.get(name) in (EMBEDDING, HEAD)
                    add_once(result, name, _of_words(model, name, pieces) if has_words else pieces, pieces[0].origin)
            num_layers += len(local)
    if num_layers != model.num_layers:
        raise CheckpointError(f"{folder}: the shards hold {num_layers} layers, config.json says {model.num_layers}")
    return result


def _layer_parts(name: str, pieces: list[TensorSource]) -> list[tuple[str, list[TensorSource]]]:
    """Every shard of linear_fc1 is [gate part; up part]: taken apart before anything is stacked."""
    part, _, kind = name.rpartition(".")
    if part != "mlp.linear_fc1" or name in FUSED_NORMS:
        return [(FUSED_NORMS.get(name, name), pieces)]
    gates, ups = zip(*(below_each_other(piece, [piece.shape[0] // 2] * 2) for piece in pieces), strict=True)
    return [(f"mlp.gating.{kind}", list(gates)), (name, list(ups))]


def _of_words(model: ModelConfig, name: str, pieces: list[TensorSource]) -> list[TensorSource]:
    """The embedding or the output layer, without the rows of padding."""
    rows = sum(piece.shape[0] for piece in pieces)
    if rows < model.vocab_size:
        raise CheckpointError(
            f"{pieces[0].origin}: {name} has {rows} rows over all ranks, config.json says vocab_size {model.vocab_size}"
        )
    whole = row_pieces([(piece, 0, piece.shape[0]) for piece in pieces])
    return [row_pieces([(whole, 0, model.vocab_size)])]
