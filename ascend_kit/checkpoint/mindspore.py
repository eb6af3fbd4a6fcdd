"""Reader of MindSpore checkpoints (MindFormers, MindSpeed-Core-MS) under Hugging Face names.

Files: `.ckpt` (see mindspore_file) and safetensors, see `source`. Names: the older `attention.wq` family and the newer
`self_attention.linear_q` of Megatron's style, see `pieces`. Merged tensors are taken apart:
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
from ascend_kit.checkpoint.pieces import (
    LAYER_NAME,
    LAYER_NAMES,
    MERGED_GATE_UP,
    MERGED_QKV,
    OUTER_NAMES,
    Renamed,
    every_other_row,
    joined,
    row_pieces,
    split_qkv,
    unknown_tensor,
)
from ascend_kit.checkpoint.source import iteration_of, mindspore_ranks
from ascend_kit.checkpoint.tensor_file import CheckpointError, SafetensorsFile, TensorSource
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import expected_shapes, layer_prefix

TRAINING_ENTRY = re.compile(r"(adam_\w+|moments?\d*|accu\w*|muon_\w+|exp_avg\w*|vhat|momentum\w*)\..+")
COMPUTED_ENTRY = re.compile(r".*(key_cache|value_cache|freqs_cis|freqs_cos|freqs_sin|inv_freq|_extra_state).*")
CONTIGUOUS_QKV, INTERLEAVED_MLP = "use_contiguous_weight_layout_attention", "use_interleaved_weight_layout_mlp"


def open_mindspore(folder: Path, tokenizer_path: str | Path | None) -> Checkpoint:
    """Open a MindSpore checkpoint; `tokenizer_path` is the original Hugging Face folder (config.json, tokenizer),
    unless the folder holds a config.json itself."""
    texts = folder if tokenizer_path is None else Path(tokenizer_path)
    if not (texts / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is a MindSpore checkpoint, which carries no config.json: set tokenizer_path to the folder of "
            "the Hugging Face model that training started from"
        )
    raw = read_config(texts)
    config = {key: value for key, value in raw.items() if key not in (CONTIGUOUS_QKV, INTERLEAVED_MLP)}
    model = ModelConfig.from_dict(config, where=f"{texts}/config.json")
    ranks = mindspore_ranks(folder)
    skipped: dict[str, list[str]] = {}
    held = [_open_rank(files, skipped) for files in ranks]
    iteration = iteration_of(folder)
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


class _Names:
    """Hugging Face tensors out of MindSpore's, whole or in the parts of tensor ranks."""

    def __init__(self, folder: Path, model: ModelConfig, config: Mapping[str, Any], is_ordered: bool) -> None:
        self.folder, self.model, self.is_ordered = folder, model, is_ordered
        self.shapes = expected_shapes(model)
        self.contiguous_qkv, self.interleaved = (
            bool(config.get(CONTIGUOUS_QKV)),
            config.get(INTERLEAVED_MLP) is not False,
        )
        self.result = Renamed()

    def present(self, parts: Mapping[str, list[TensorSource]]) -> dict[str, TensorSource]:
        for name, pieces in parts.items():
            match = LAYER_NAME.fullmatch(name)
            if name in OUTER_NAMES:
                self.result.add(OUTER_NAMES[name], self._whole(name, OUTER_NAMES[name], pieces))
            elif name in self.shapes:  # Hugging Face's own
                self.result.add(name, self._joined(name, self.shapes[name], pieces))
            elif match is None:
                raise unknown_tensor(name, pieces[0], "MindFormers")
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
            self.result.add(target, self._whole(name, target, pieces))
        else:
            raise unknown_tensor(name, pieces[0], "MindFormers")

    def _add_qkv(self, name: str, prefix: str, kind: str, pieces: list[TensorSource]) -> None:
        rows = [self.shapes[f"{prefix}self_attn.{letter}_proj.weight"][0] for letter in "qkv"]
        shape = (sum(rows), *([self.model.hidden_size] if kind == "weight" else []))
        whole, ends = self._joined(name, shape, pieces), [0, rows[0], rows[0] + rows[1], sum(rows)]
        found: Mapping[str, TensorSource] = split_qkv(self.model, name, [whole])
        if self.contiguous_qkv:
            found = {letter: row_pieces([(whole, ends[at], ends[at + 1])]) for at, letter in enumerate("qkv")}
        self.result.add_qkv(prefix, kind, found)

    def _add_gate_up(self, name: str, prefix: str, kind: str, pieces: list[TensorSource]) -> None:
        half = self.model.intermediate_size
        shape = (2 * half, *([self.model.hidden_size] if kind == "weight" else []))
        whole = self._joined(name, shape, pieces)
        gate, up = (every_other_row(whole, 0), every_other_row(whole, 1))
        if not self.interleaved:
            gate, up = row_pieces([(whole, 0, half)]), row_pieces([(whole, half, 2 * half)])
        self.result.add_gate_up(prefix, kind, gate, up)

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
            return joined(name, pieces, None)
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
        return joined(name, pieces, split[0])
