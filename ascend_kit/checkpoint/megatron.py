"""Reader of MindSpeed-LLM / Megatron-core checkpoints: tensor and pipeline shards under Hugging Face names.

Layout: `latest_checkpointed_iteration.txt`, `iter_0000001/mp_rank_TT[_PPP]/model_optim_rng.pt`; each file
is a pickled dictionary with `model` (or `model0`, `model1`, ... for virtual pipeline chunks) and the
training arguments. Nothing in it is executed (see `torch_file`). Config and tokenizer come from the
original Hugging Face folder.

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
from ascend_kit.checkpoint.pieces import ColumnPieces, RowPieces, SameOnAllRanks, split_qkv
from ascend_kit.checkpoint.tensor_file import CheckpointError, TensorSource
from ascend_kit.checkpoint.torch_file import TorchFile
from ascend_kit.model.config import ModelConfig

IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "_extra_state")
ITERATION_FILE = "latest_checkpointed_iteration.txt"
RANK_PATTERN = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
SHARD_NAMES = ("model_optim_rng.pt", "model_rng.pt")
LAYER_KEY = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
NORM_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",  # transformer-engine spelling
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
COLUMN_NAMES = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
# Training arguments that change what a model computes, with the values that this package computes.
NEUTRAL_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "geglu": (False,),
    "squared_relu": (False,),
    "openai_gelu": (False,),
    "quick_geglu": (False,),
    "position_embedding_type": ("rope",),
    "use_rotary_position_embeddings": (True,),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "add_rmsnorm_offset": (False,),
    "post_norm": (False,),
    "input_embeds_norm": (False,),
    "num_experts": (0,),
    "num_moe_experts": (0,),
    "multi_latent_attention": (False,),
    "mtp_num_layers": (0,),
    "attn_logit_softcapping": (0.0,),
    "output_logit_softcapping": (0.0,),
    "scale_emb": (1.0,),
    "scale_depth": (1.0,),
    "embedding_multiplier_scale": (1.0,),
    "output_multiplier_scale": (1.0,),
}
SAVE_AGAIN = (
    "save it from the training code with `--ckpt-format torch`, or convert it there to Hugging Face format "
    "(MindSpeed-LLM: convert_ckpt_v2.py) and pass that folder"
)


def is_megatron(folder: Path) -> bool:
    """True for a Megatron checkpoint root, one of its iteration folders, or a distributed format of it."""
    return (
        (folder / ITERATION_FILE).is_file()
        or any(RANK_PATTERN.fullmatch(path.name) for path in folder.iterdir())
        or _distributed_file(folder) is not None
    )


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
    iteration = _iteration_folder(folder)
    config = read_config(Path(tokenizer_path))
    model = ModelConfig.from_dict(config, where=f"{tokenizer_path}/config.json")
    grid = _rank_grid(iteration)
    chunks, files = [], []
    replaced: set[str] = set()
    for stage in grid:
        loaded = [_load(path) for path in stage]
        for file in loaded:
            _check_arguments(file.path, file.content, model, len(stage), len(grid))
            replaced.update(file.replaced)
        chunks.append([_chunks(file) for file in loaded])
        files += stage
    sources = _Merger(iteration, model).merge(chunks)
    notes = [f"unknown classes in the pickle were replaced by inert ones: {', '.join(sorted(replaced))}"] * bool(
        replaced
    )
    return Checkpoint(
        folder, sources, config, files=files, framework="megatron", config_folder=Path(tokenizer_path), notes=notes
    )


def shard_files(folder: Path) -> list[Path]:
    """The shard files of a Megatron checkpoint, found without opening them."""
    return [path for stage in _rank_grid(_iteration_folder(folder)) for path in stage]


def _distributed_file(folder: Path) -> Path | None:
    candidates = [*folder.glob("*.distcp"), *folder.glob(".metadata")]
    described = folder / "metadata.json"
    if described.is_file() and "sharded_backend" in described.read_text(encoding="utf-8", errors="replace"):
        candidates.append(described)
    return candidates[0] if candidates else None


def _iteration_folder(folder: Path) -> Path:
    marker = folder / ITERATION_FILE
    if marker.is_file():
        word = marker.read_bytes()[:100].decode(errors="replace").strip()
        if word != "release" and not (word.isascii() and word.isdigit()):
            raise CheckpointError(f"{marker} holds {word!r}, expected an iteration number or `release`")
        iteration = folder / (word if word == "release" else f"iter_{int(word):07d}")
        if not iteration.is_dir():
            raise CheckpointError(f"{marker} names {iteration.name}, but {iteration} does not exist")
    else:
        iteration = folder
    found = _distributed_file(iteration)
    if found is not None:
        raise CheckpointError(
            f"{iteration} is a distributed checkpoint (torch_dist, FSDP2: {found.name}), the layout depends "
            f"on the run that wrote it; {SAVE_AGAIN}"
        )
    return iteration


def _rank_grid(iteration: Path) -> list[list[Path]]:
    """Shard files as [pipeline stage][tensor rank]; every rank of the grid must be there."""
    ranks: dict[tuple[int, int], Path] = {}
    for path in sorted(iteration.iterdir()):
        match = RANK_PATTERN.fullmatch(path.name)
        if match and match.group(3) is not None and int(match.group(3)) > 0:
            raise CheckpointError(f"{path} belongs to an expert-parallel model; only dense models are read")
        if match:
            ranks[int(match.group(2) or 0), int(match.group(1))] = _shard_file(path)
    if not ranks:
        raise CheckpointError(f"{iteration} has no mp_rank_* folders: not a Megatron checkpoint")
    stages, tensor_ranks = max(stage for stage, _ in ranks) + 1, max(rank for _, rank in ranks) + 1
    for stage in range(stages):
        for rank in range(tensor_ranks):
            if (stage, rank) not in ranks:
                raise CheckpointError(
                    f"{iteration}: the shard of tensor rank {rank}, pipeline stage {stage} is missing; found "
                    f"{len(ranks)} of {stages * tensor_ranks}"
                )
    return [[ranks[stage, rank] for rank in range(tensor_ranks)] for stage in range(stages)]


def _shard_file(folder: Path) -> Path:
    for name in SHARD_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} holds none of {', '.join(SHARD_NAMES)}")


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
        self.folder, self.model = folder, model
        self.result: dict[str, TensorSource] = {}

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
                self._add_layer_tensor(f"model.layers.{layers[int(match.group(1))]}.", match.group(2), parts)
            else:
                self._add_outer_tensor(name, parts)
        return first_layer + len(local)

    def _add(self, name: str, source: TensorSource) -> None:
        if name in self.result:
            raise CheckpointError(f"{source.origin}: {name} is stored twice (also in {self.result[name].origin})")
        self.result[name] = source

    def _add_outer_tensor(self, name: str, parts: list[TensorSource]) -> None:
        if name == "decoder.final_layernorm.weight":
            self._add("model.norm.weight", SameOnAllRanks(name, parts))
        elif name == "embedding.word_embeddings.weight":
            self._add("model.embed_tokens.weight", self._vocabulary_rows(name, parts))
        elif name == "output_layer.weight":
            self._add("lm_head.weight", self._vocabulary_rows(name, parts))
        else:
            raise CheckpointError(
                f"{parts[0].origin}: unknown tensor {name}; readable are dense Qwen2.5, Qwen3 and "
                "Llama models of Megatron-core"
            )

    def _vocabulary_rows(self, name: str, parts: list[TensorSource]) -> TensorSource:
        rows = RowPieces([(part, 0, part.shape[0]) for part in parts])
        if rows.shape[0] < self.model.vocab_size:
            raise CheckpointError(
                f"{rows.origin}: {name} has {rows.shape[0]} rows over all ranks, config.json says "
                f"vocab_size {self.model.vocab_size}"
            )
        left, pieces = self.model.vocab_size, []
        for part in parts:
            pieces.append((part, 0, min(left, part.shape[0])))
            left -= pieces[-1][2]
        return RowPieces(pieces)

    def _add_layer_tensor(self, prefix: str, name: str, parts: list[TensorSource]) -> None:
        if name in NORM_NAMES:
            self._add(prefix + NORM_NAMES[name], SameOnAllRanks(name, parts))
        elif name in COLUMN_NAMES:
            self._add(prefix + COLUMN_NAMES[name], ColumnPieces(parts) if len(parts) > 1 else parts[0])
        elif name in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
            self._add_qkv(prefix, name.rpartition(".")[2], parts)
        elif name == "mlp.linear_fc1.weight":
            halves = [part.shape[0] // 2 for part in parts]
            self._add(
                prefix + "mlp.gate_proj.weight",
                RowPieces([(part, 0, half) for part, half in zip(parts, halves, strict=True)]),
            )
            self._add(
                prefix + "mlp.up_proj.weight",
                RowPieces([(part, half, 2 * half) for part, half in zip(parts, halves, strict=True)]),
            )
        elif name == "self_attention.linear_proj.bias":
            self._add(prefix + "self_attn.o_proj.bias", SameOnAllRanks(name, parts))
        else:
            raise CheckpointError(
                f"{parts[0].origin}: unknown tensor decoder.layers.*.{name}; readable are dense "
                "Qwen2.5, Qwen3 and Llama models of Megatron-core"
            )

    def _add_qkv(self, prefix: str, kind: str, parts: list[TensorSource]) -> None:
        for letter, rows in split_qkv(self.model, f"linear_qkv.{kind}", parts).items():
            self._add(f"{prefix}self_attn.{letter}_proj.{kind}", rows)
