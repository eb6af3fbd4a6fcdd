"""Reader of MindSpore checkpoints (MindFormers, MindSpeed-Core-MS) under Hugging Face names.

Files: `.ckpt` (see mindspore_file) and safetensors, in one folder (`param_name_map.json`, or a single file), in
`rank_N` folders, or in an `iteration_N` folder as `model-<number>-<count>.safetensors`. Names: the older `attention.wq`
family and the newer `self_attention.linear_q` of Megatron's style. Merged tensors are taken apart:
- linear_qkv, w_qkv: per KV group the rows of its query heads, one key head, one value head; q, k, v below each other
  where config.json says `use_contiguous_weight_layout_attention`;
- linear_fc1, w_gate_hidden: rows of gate and up alternate; gate above up where config.json says
  `use_interleaved_weight_layout_mlp: false`.
Merged tensors are whole tensors to MindSpore: the parts of ranks are joined first, in the order that metadata.json or a
strategy file gives, else in that of the ranks, where the shapes leave one way (tensor parallelism within each stage).
Config and tokenizer come from the original Hugging Face folder. Facts: mindspore-ai/mindformers, research/qwen2_5,
mindformers/models/qwen3/utils.py, mindformers/checkpoint/converter/convert_op.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ascend_kit.checkpoint.huggingface import Checkpoint, read_config
from ascend_kit.checkpoint.mindspore_file import MindSporeFile
from ascend_kit.checkpoint.mindspore_ranks import MERGE_FIRST, parts_by_metadata, parts_by_strategy
from ascend_kit.checkpoint.pieces import ColumnPieces, EveryOtherRow, RowPieces, SameOnAllRanks, split_qkv
from ascend_kit.checkpoint.tensor_file import CheckpointError, SafetensorsFile, TensorSource, read_json
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import EMBEDDING, FINAL_NORM, HEAD, expected_shapes, layer_prefix

NAME_MAP = "param_name_map.json"
RANK_FOLDER = re.compile(r"rank_(\d+)")
ITERATION_FOLDER = re.compile(r"iteration_\d+")
RANK_FILE = re.compile(r"(?:.+-)?model-(\d{5,})-(\d{5,})\.safetensors")
# Files beside the weights: the optimizer's, the run's settings, how the run was spread.
OTHER_FILE = re.compile(r"(.+-)?opt-\d+-\d+\.safetensors|hyper_param\.safetensors|.*optimizer.*|.*strategy.*")
TRAINING_ENTRY = re.compile(r"(adam_\w+|moments?\d*|accu\w*|muon_\w+|exp_avg\w*|vhat|momentum\w*)\..+")
COMPUTED_ENTRY = re.compile(r".*(key_cache|value_cache|freqs_cis|freqs_cos|freqs_sin|inv_freq|_extra_state).*")
LAYER_NAME = re.compile(r"(?:model|decoder)\.layers\.(\d+)\.(.+)\.(weight|bias)")
OUTER_NAMES = {
    "model.tok_embeddings.embedding_weight": EMBEDDING,
    "embedding.word_embeddings.weight": EMBEDDING,
    "model.norm_out.weight": FINAL_NORM,
    "decoder.final_layernorm.weight": FINAL_NORM,
    "lm_head.weight": HEAD,
    "output_layer.weight": HEAD,
}
LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "self_attention.linear_q": "self_attn.q_proj",
    "self_attention.linear_k": "self_attn.k_proj",
    "self_attention.linear_v": "self_attn.v_proj",
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.gating": "mlp.gate_proj",
    "mlp.hidden": "mlp.up_proj",
    "mlp.linear_fc1": "mlp.up_proj",  # beside mlp.gating; without it both are in here
    "mlp.linear_fc2": "mlp.down_proj",
}
MERGED_QKV = ("attention.w_qkv", "self_attention.linear_qkv")
MERGED_GATE_UP = ("feed_forward.w_gate_hidden", "mlp.linear_fc1")
CONTIGUOUS_QKV, INTERLEAVED_MLP = "use_contiguous_weight_layout_attention", "use_interleaved_weight_layout_mlp"


def is_mindspore(folder: Path) -> bool:
    """True for a folder of MindSpore's files: .ckpt, ranks or iterations of them, or safetensors that it wrote."""
    if (folder / NAME_MAP).is_file() or any(folder.glob("*.ckpt")) or _rank_folders(folder) or _iteration(folder):
        return True
    files = sorted(folder.glob("*.safetensors"))
    if not files or ((folder / "config.json").is_file() and list(folder.glob("*.safetensors.index.json"))):
        return False
    try:
        header = SafetensorsFile(files[0])
    except CheckpointError:
        return False  # the reader of Hugging Face folders names the damage
    return any((name in OUTER_NAMES and name != HEAD) or _layer_part(name) for name in header.tensors)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold tensors, found without opening them."""
    return [path for files in _rank_files(folder) for path in files]


def open_mindspore(folder: Path, tokenizer_path: str | Path | None) -> Checkpoint:
    """Open a MindSpore checkpoint; `tokenizer_path` is the original Hugging Face folder (config.json, tokenizer),
    unless the folder holds a config.json itself."""
    texts = config_folder(folder, tokenizer_path)
    if not (texts / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is a MindSpore checkpoint, which carries no config.json: set tokenizer_path to the folder of "
            "the Hugging Face model that training started from"
        )
    raw = read_config(texts)
    config = {key: value for key, value in raw.items() if key not in (CONTIGUOUS_QKV, INTERLEAVED_MLP)}
    model = ModelConfig.from_dict(config, where=f"{texts}/config.json")
    ranks = _rank_files(folder)
    skipped: dict[str, list[str]] = {}
    held = [_open_rank(files, skipped) for files in ranks]
    iteration = _iteration(folder)
    described = None if iteration is None else iteration / "metadata.json"
    if described is not None and described.is_file():
        parts, is_ordered = parts_by_metadata(described, held), True
    else:
        parts, is_ordered = parts_by_strategy(folder, held)
    sources = _Names(folder, model, raw, is_ordered).present(parts)
    notes = [
        f"{len(names)} {kind}, not used: {names[0]}{', ...' * (len(names) > 1)}" for kind, names in skipped.items()
    ]
    files = [path for rank in ranks for path in rank]
    return Checkpoint(folder, sources, config, files=files, framework="mindspore", config_folder=texts, notes=notes)


def config_folder(folder: Path, tokenizer_path: str | Path | None) -> Path:
    """Where config.json lies: with the tokenizer, unless none is given."""
    return folder if tokenizer_path is None else Path(tokenizer_path)


def _rank_folders(folder: Path) -> dict[int, Path]:
    found = {int(match.group(1)): path for path in folder.iterdir() if (match := RANK_FOLDER.fullmatch(path.name))}
    return {rank: path for rank, path in sorted(found.items()) if path.is_dir() and any(_weights_in(path))}


def _weights_in(folder: Path) -> list[Path]:
    return sorted(path for suffix in ("ckpt", "safetensors") for path in folder.glob(f"*.{suffix}"))


def _iteration(folder: Path) -> Path | None:
    """The iteration folder that a run's folder points to or its newest one, or the folder itself where it is one."""
    if ITERATION_FOLDER.fullmatch(folder.name) and any(RANK_FILE.fullmatch(path.name) for path in folder.iterdir()):
        return folder
    found = sorted(path for path in folder.iterdir() if path.is_dir() and ITERATION_FOLDER.fullmatch(path.name))
    tracker = folder / "latest_checkpointed_iteration.txt"
    if found and tracker.is_file():
        wanted = tracker.read_text(encoding="utf-8", errors="replace").strip()
        named = [path for path in found if wanted.isdigit() and int(path.name.partition("_")[2]) == int(wanted)]
        if not named:
            raise CheckpointError(f"{tracker} names {wanted!r}, there are {', '.join(path.name for path in found)}")
        found = named
    return found[-1] if found else None


def _rank_files(folder: Path) -> list[list[Path]]:
    """The weight files of every rank, in the order of the ranks; all ranks must be there."""
    iteration = _iteration(folder)
    if iteration is not None:
        files = [path for path in sorted(iteration.iterdir()) if RANK_FILE.fullmatch(path.name)]
        if not files:
            raise CheckpointError(f"{iteration} holds no model-<number>-<count>.safetensors")
        return [[path] for path in files]
    folders = _rank_folders(folder)
    if folders:
        missing = sorted(set(range(max(folders) + 1)) - folders.keys())
        if missing:
            raise CheckpointError(f"{folder}: rank_{missing[0]} is missing; found {len(folders)} of {max(folders) + 1}")
        return [_one_set(path) for path in folders.values()]
    return [_one_set(folder)]


def _one_set(folder: Path) -> list[Path]:
    """The files of one set of weights: those of the name map, or the only file, or the last that meta.json names."""
    if (folder / NAME_MAP).is_file():
        named = read_json(folder / NAME_MAP, "it says which tensor is in which file")
        named = named.get("weight_map", named)
        names = sorted({str(name) for name in named.values() if not OTHER_FILE.fullmatch(str(name))})
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(
                    f"{folder / NAME_MAP} names the file {name!r}; only plain file names are followed"
                )
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing, though {NAME_MAP} names it")
        return [folder / name for name in names]
    files = [path for path in _weights_in(folder) if not OTHER_FILE.fullmatch(path.name)]
    if len(files) > 1 and (folder / "meta.json").is_file():
        last = read_json(folder / "meta.json", "it names the last checkpoint").get("last_ckpt_file")
        files = [path for path in files if path.name == last] or files
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise CheckpointError(
            f"{folder} holds {len(files)} checkpoints ({names}) and no {NAME_MAP}; leave the one that is meant"
        )
    return files


def _open_rank(files: Sequence[Path], skipped: dict[str, list[str]]) -> dict[str, TensorSource]:
    """The weights of one rank; what training keeps beside them goes to `skipped`, by kind."""
    found: dict[str, TensorSource] = {}
    for path in files:
        if path.suffix == ".ckpt":
            opened = MindSporeFile(path)
            tensors: Mapping[str, TensorSource] = opened.tensors
            skipped.setdefault("entries that are no tensors", []).extend(opened.others)
        else:
            tensors = SafetensorsFile(path).tensors
        for name, source in tensors.items():
            if TRAINING_ENTRY.fullmatch(name) or ("." not in name and len(source.shape) < 2):
                skipped.setdefault("entries of the optimizer and of training", []).append(name)
            elif COMPUTED_ENTRY.fullmatch(name):
                skipped.setdefault("buffers that are computed", []).append(name)
            elif name in found:
                raise CheckpointError(f"tensor {name} is in {found[name].origin} and again in {path}")
            else:
                found[name] = source
    for kind in [kind for kind, names in skipped.items() if not names]:
        del skipped[kind]
    return found


def _layer_part(name: str) -> str | None:
    """The part of a layer that a MindSpore name means, None for other names."""
    match = LAYER_NAME.fullmatch(name)
    part = match.group(2) if match else ""
    own = part in LAYER_NAMES and LAYER_NAMES[part] != part
    return part if own or part in (*MERGED_QKV, *MERGED_GATE_UP) else None


class _Names:
    """Hugging Face tensors out of MindSpore's, whole or in the parts of tensor ranks."""

    def __init__(self, folder: Path, model: ModelConfig, config: Mapping[str, Any], is_ordered: bool) -> None:
        self.folder, self.model, self.is_ordered = folder, model, is_ordered
        self.shapes = expected_shapes(model)
        self.contiguous_qkv, self.interleaved = (
            bool(config.get(CONTIGUOUS_QKV)),
            config.get(INTERLEAVED_MLP) is not False,
        )
        self.result: dict[str, TensorSource] = {}

    def present(self, parts: Mapping[str, list[TensorSource]]) -> dict[str, TensorSource]:
        for name, pieces in parts.items():
            match = LAYER_NAME.fullmatch(name)
            if name in OUTER_NAMES:
                self._add(OUTER_NAMES[name], self._whole(name, OUTER_NAMES[name], pieces))
            elif name in self.shapes:  # Hugging Face's own
                self._add(name, self._joined(name, self.shapes[name], pieces))
            elif match is None:
                self._unknown(name, pieces)
            else:
                self._layer(name, match, pieces, f"decoder.layers.{match.group(1)}.mlp.gating.weight" in parts)
        return self.result

    def _layer(self, name: str, match: re.Match[str], pieces: list[TensorSource], has_gate: bool) -> None:
        prefix, part, kind = layer_prefix(int(match.group(1))), match.group(2), match.group(3)
        if part in MERGED_QKV:
            self._add_qkv(name, prefix, kind, pieces)
        elif part in MERGED_GATE_UP and not has_gate:
            self._add_gate_up(name, prefix, kind, pieces)
        elif part in LAYER_NAMES:
            target = f"{prefix}{LAYER_NAMES[part]}.{kind}"
            self._add(target, self._whole(name, target, pieces))
        else:
            self._unknown(name, pieces)

    def _unknown(self, name: str, pieces: list[TensorSource]) -> None:
        raise CheckpointError(
            f"{pieces[0].origin}: unknown tensor {name}; readable are dense Qwen2.5, Qwen3 and Llama models of "
            "MindFormers"
        )

    def _add(self, name: str, source: TensorSource) -> None:
        if name in self.result:
            raise CheckpointError(f"{source.origin}: {name} is stored twice (also in {self.result[name].origin})")
        self.result[name] = source

    def _add_qkv(self, name: str, prefix: str, kind: str, pieces: list[TensorSource]) -> None:
        rows = [self.shapes[f"{prefix}self_attn.{letter}_proj.weight"][0] for letter in "qkv"]
        shape = (sum(rows), *([self.model.hidden_size] if kind == "weight" else []))
        whole, ends = self._joined(name, shape, pieces), [0, rows[0], rows[0] + rows[1], sum(rows)]
        found: Mapping[str, TensorSource] = split_qkv(self.model, name, [whole])
        if self.contiguous_qkv:
            found = {letter: RowPieces([(whole, ends[at], ends[at + 1])]) for at, letter in enumerate("qkv")}
        for letter, source in found.items():
            self._add(f"{prefix}self_attn.{letter}_proj.{kind}", source)

    def _add_gate_up(self, name: str, prefix: str, kind: str, pieces: list[TensorSource]) -> None:
        half = self.model.intermediate_size
        shape = (2 * half, *([self.model.hidden_size] if kind == "weight" else []))
        whole = self._joined(name, shape, pieces)
        gate, up = (EveryOtherRow(whole, 0), EveryOtherRow(whole, 1))
        if not self.interleaved:
            gate, up = RowPieces([(whole, 0, half)]), RowPieces([(whole, half, 2 * half)])
        self._add(f"{prefix}mlp.gate_proj.{kind}", gate)
        self._add(f"{prefix}mlp.up_proj.{kind}", up)

    def _whole(self, name: str, target: str, pieces: list[TensorSource]) -> TensorSource:
        if target not in self.shapes:
            return pieces[0]  # the check of the whole checkpoint says what a model like this has no place for
        return self._joined(name, self.shapes[target], pieces)

    def _joined(self, name: str, shape: tuple[int, ...], pieces: list[TensorSource]) -> TensorSource:
        """The tensor of `shape` that the parts make up, or the one that each rank holds.

        CheckpointError where nothing says in which order they follow: data parallelism beside tensor parallelism, or
        weights that the optimizer spread (its norms are in parts, too).
        """
        local = pieces[0].shape
        if local == shape:
            return pieces[0] if len(pieces) == 1 else SameOnAllRanks(name, pieces)
        split = [dim for dim in range(len(shape)) if len(local) == len(shape) and local[dim] != shape[dim]]
        if len(split) != 1 or len(pieces) == 1 or any(piece.shape != local for piece in pieces):
            raise CheckpointError(
                f"{pieces[0].origin}: {name} has shape {list(local)}, config.json implies {list(shape)}"
            )
        is_norm = name.endswith(("norm.weight", "norm_out.weight"))
        if local[split[0]] * len(pieces) != shape[split[0]] or (is_norm and not self.is_ordered):
            raise CheckpointError(
                f"{self.folder}: {name} is in {len(pieces)} parts of shape {list(local)}, the whole is {list(shape)}: "
                f"not tensor and pipeline parallelism alone, and no strategy file beside it; {MERGE_FIRST}"
            )
        return ColumnPieces(pieces) if split[0] else RowPieces([(piece, 0, local[0]) for piece in pieces])
