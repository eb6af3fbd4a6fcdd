"""Writes MindSpore checkpoints from Hugging Face weights, for tests.

Built from descriptions of the formats alone (checkpoint.proto, node_strategy.proto, MindFormers' conversion rules,
MSAdapter's torch.save) and shares nothing with the readers; messages are put together byte by byte.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]
TYPES = {torch.bfloat16: "BFloat16", torch.float32: "Float32", torch.float16: "Float16", torch.int32: "Int32"}
LEGACY = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "model.norm.weight": "model.norm_out.weight",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
MCORE = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
    "model.layers": "decoder.layers",
    "self_attn.q_proj": "self_attention.linear_q",
    "self_attn.k_proj": "self_attention.linear_k",
    "self_attn.v_proj": "self_attention.linear_v",
    "self_attn.o_proj": "self_attention.linear_proj",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.gate_proj": "mlp.gating",
    "mlp.up_proj": "mlp.linear_fc1",
    "mlp.down_proj": "mlp.linear_fc2",
}


def renamed(weights: State, names: dict[str, str]) -> State:
    result = {}
    for name, tensor in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        result[name] = tensor
    return result


def merged(
    weights: State, kv_heads: int, *, legacy: bool = False, interleaved: bool = True, contiguous_qkv: bool = False
) -> State:
    """Weights under MindFormers' names with q, k, v in one tensor and gate and up in one."""
    names = LEGACY if legacy else MCORE
    qkv, gate_up = (
        ("attention.w_qkv", "feed_forward.w_gate_hidden") if legacy else ("self_attention.linear_qkv", "mlp.linear_fc1")
    )
    weights, result = dict(weights), {}
    layers = sorted({name.split(".")[2] for name in weights if name.startswith("model.layers.")})
    for layer in layers:
        prefix = f"model.layers.{layer}."
        target = prefix.replace("model.layers", "model.layers" if legacy else "decoder.layers")
        for kind in ("weight", "bias"):
            if f"{prefix}self_attn.q_proj.{kind}" not in weights:
                continue
            q, k, v = (weights.pop(f"{prefix}self_attn.{letter}_proj.{kind}") for letter in "qkv")
            groups = [part.reshape(kv_heads, -1, *part.shape[1:]) for part in (q, k, v)]
            both = torch.cat([q, k, v]) if contiguous_qkv else torch.cat(groups, 1).reshape(-1, *q.shape[1:])
            result[f"{target}{qkv}.{kind}"] = both
        gate, up = weights.pop(f"{prefix}mlp.gate_proj.weight"), weights.pop(f"{prefix}mlp.up_proj.weight")
        rows = torch.stack([gate, up], 1).reshape(-1, gate.shape[1]) if interleaved else torch.cat([gate, up])
        result[f"{target}{gate_up}.weight"] = rows
    return result | renamed(weights, names)


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def text(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def number(field: int, value: int) -> bytes:
    return bytes([field << 3]) + varint(value)


def entry(name: str, shape: list[int], kind: str, content: bytes) -> bytes:
    tensor = b"".join(number(1, dim) for dim in shape) + text(2, kind.encode()) + text(3, content)
    return text(1, text(1, name.encode()) + text(2, tensor))


def save_ckpt(path: Path, tensors: State, *, slice_bytes: int = 1 << 29, checksum: bool = False) -> Path:
    written = b""
    for name, tensor in tensors.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for start in range(0, len(data), slice_bytes):
            written += entry(name, list(tensor.shape), TYPES[tensor.dtype], data[start : start + slice_bytes])
    if checksum:
        written += b"crc_num" + zlib.crc32(written).to_bytes(10, "big")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(written)
    return path


def save_safetensors(path: Path, tensors: State) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "ms"})
    return path


def training_entries(tensors: State) -> State:
    """What a training checkpoint holds beside the weights."""
    moments = {f"{kind}.{name}": torch.zeros_like(t) for kind in ("adam_m", "adam_v") for name, t in tensors.items()}
    return moments | {"global_step": torch.zeros(1, dtype=torch.int32), "scale_sense": torch.ones(())}


def split_dim(name: str) -> int | None:
    """The dimension that tensor parallel ranks share; None for norms."""
    if "norm" in name:
        return None
    return 1 if name.endswith(("wo.weight", "w2.weight", "linear_proj.weight", "linear_fc2.weight")) else 0


def layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


def rank_states(tensors: State, tp: int, pp: int, dp: int, num_layers: int) -> list[State]:
    """The tensors of rank (stage, data rank, tensor rank), tensor ranks next to each other."""
    states = []
    for stage in range(pp):
        for _ in range(dp):
            for rank in range(tp):
                state = {}
                for name, tensor in tensors.items():
                    layer = layer_of(name)
                    first = "embed" in name
                    own = layer * pp // num_layers if layer is not None else (0 if first else pp - 1)
                    dim = split_dim(name)
                    if own == stage:
                        state[name] = tensor if dim is None else tensor.chunk(tp, dim)[rank].clone()
                states.append(state)
    return states


def save_strategy_json(path: Path, tensors: State, tp: int, dp: int, spread: int = -1) -> None:
    """As nlohmann's JSON of StrategyCheckpointInfo, with a stage before each name as in merged files."""
    items = {}
    for name, tensor in tensors.items():
        axes = [0 if at == split_dim(name) else -1 for at in range(tensor.dim())]
        layout = {"dev_matrix": [dp, tp], "tensor_map": axes, "tensor_shape": list(tensor.shape), "field": 0}
        items[f"1-{name}"] = layout | {"opt_weight_shard_step": 0, "opt_weight_shard_size": spread}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"current_stage": 0, "parallel_layout_item": items, "parallel_strategy_item": {}}))


def save_strategy(path: Path, tensors: State, tp: int, dp: int, spread: int = -1) -> None:
    items = b""
    for name, tensor in tensors.items():
        dim = split_dim(name)
        axes = [0 if at == dim else -1 for at in range(tensor.dim())]
        devices = text(1, number(1, dp) + number(1, tp))
        layout = devices + text(2, b"".join(number(1, axis) for axis in axes)) + number(5, 0)
        layout += number(6, 0) + number(7, spread)
        items += text(3, text(1, name.encode()) + text(2, layout))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(number(1, 0) + items)


def save_iteration(root: Path, states: list[State], whole: State) -> Path:
    """iteration_00000007 with metadata.json; tensors of the same offset are stored once."""
    folder = root / "iteration_00000007"
    described, storage = {}, {}
    for at, state in enumerate(states):
        name_of_file = f"model-{at:07d}-{len(states):07d}.safetensors"
        kept = {}
        for name, tensor in state.items():
            dim, places = split_dim(name), storage
            count = sum(1 for key in places if key.startswith(f"('{name}',"))
            offset = [0] * tensor.dim()
            if dim is not None and tensor.shape != whole[name].shape:
                offset[dim] = count * tensor.shape[dim]
            key = str((name, tuple(offset)))
            if key not in storage:
                storage[key] = [{"file_name": name_of_file, "storage_rank": at}]
                kept[name] = tensor
            described[name] = {"global_shape": list(whole[name].shape)}
        save_safetensors(folder / name_of_file, kept)
    (folder / "metadata.json").write_text(json.dumps({"state_dict_metadata": described, "storage_data": storage}))
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    return root


class _Global:
    """Pickled as a name that is looked up where it is loaded."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Protocol 2, with tensors as MSAdapter writes them: storages named by text."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, stream: io.BytesIO, root: str) -> None:
        super().__init__(stream, 2)
        self.root, self.storages = root, {}

    def persistent_id(self, value: object) -> object:
        if not isinstance(value, bytes) or value[:8] != b"storage:":
            return None
        key, kind, count = value[8:].decode().split(",")
        return ("storage", kind, key, "cpu", int(count))

    def save_global_name(self, value: _Global) -> None:
        self.write(b"c" + value.module.encode() + b"\n" + value.name.encode() + b"\n")

    dispatch[_Global] = save_global_name

    def save_tensor(self, value: torch.Tensor) -> None:
        key = str(len(self.storages))
        self.storages[key] = value.contiguous()
        kind = {torch.bfloat16: "BFloat16Storage", torch.float32: "FloatStorage", torch.int64: "LongStorage"}
        storage = f"storage:{key},{kind[value.dtype]},{value.numel()}".encode()
        arguments = (storage, 0, tuple(value.shape), value.contiguous().stride(), False, None, None)
        self.save(_Global(f"{self.root}._tensor", "_rebuild_from_type_v2"))
        kind_of = _Global("torch" if self.root == "torch" else f"{self.root}.torch.tensor", "Tensor")
        self.save((_Global(f"{self.root}._utils", "_rebuild_tensor_v2"), kind_of, arguments, None))
        self.write(pickle.REDUCE)

    dispatch[torch.Tensor] = save_tensor


def resave_as_msadapter(path: Path, root: str = "torch") -> None:
    """Replace a file of torch.save by what MSAdapter's torch.save writes for the same content."""
    content = torch.load(path, weights_only=False)
    stream = io.BytesIO()
    pickler = _Pickler(stream, root)
    pickler.dump(content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/version", "3")
        archive.writestr("archive/byteorder", "little")
        for key, tensor in pickler.storages.items():
            archive.writestr(f"archive/data/{key}", tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
