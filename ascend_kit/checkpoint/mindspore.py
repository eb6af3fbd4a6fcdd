"""Reader of MindSpore checkpoints (MindFormers, MindSpeed-Core-MS) under Hugging Face names.

Files: `.ckpt` (see mindspore_file) and safetensors, see `source`. Names: the older `attention.wq` family and the newer
`self_attention.linear_q` of Megatron's style, see `pieces`. Merged tensors are taken apart:
- linear_qkv, w_qkv: per KV group the rows of its query heads, one key head, one value head; q, k, v below each other
  where config.json says `use_contiguous_weight_layout_attention`;
- linear_fc1, w_gate_hidden: rows of gate and up alternate; gate above up where config.json says
  `use_interleaved_weight_layout_mlp: false`.
Merged tensors are whole tensors to MindSpore: the parts of ranks are joined first, in the order that metadata.json or a
strategy file gives, else in that of the ranks, where the shapes leave one way (tensor parallelism within each stage).
A strategy file (mindspore/ccsrc/utils/node_strategy.proto, or the same as JSON: strategy_checkpoint_info.cc) holds per
parameter a device matrix and a tensor map: the ranks of a stage, counted through the matrix row by row, hold along
dimension d of the tensor the part that their coordinate in column tensor_map[d] of the matrix, counted from its end,
says; -1 is a dimension that is not split. Files of several stages merged into one put the stage before each name
(`0-model.layers...`). Config and tokenizer come from the original Hugging Face folder. Facts: mindspore-ai/mindformers,
research/qwen2_5, mindformers/models/qwen3/utils.py, mindformers/checkpoint/converter/convert_op.py.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ascend_kit.checkpoint.huggingface import Checkpoint, read_config
from ascend_kit.checkpoint.mindspore_file import Messages, MindSporeFile
from ascend_kit.checkpoint.pieces import joined, renamed
from ascend_kit.checkpoint.source import iteration_of, mindspore_ranks
from ascend_kit.checkpoint.tensor_file import CheckpointError, ReadFile, TensorSource, open_safetensors, read_json
from ascend_kit.files import one_line
from ascend_kit.model.config import ModelConfig

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
    whole = functools.partial(joined, is_ordered=is_ordered, advice=f", and no strategy file beside it; {MERGE_FIRST}")
    flags = {"contiguous_qkv": bool(raw.get(CONTIGUOUS_QKV)), "interleaved_mlp": raw.get(INTERLEAVED_MLP) is not False}
    sources = renamed(model, "MindFormers", parts, whole, **flags)
    counted = ((kind, names) for kind, names in skipped.items() if names)
    notes = [f"{len(names)} {kind}, not used: {names[0]}{', ...' * (len(names) > 1)}" for kind, names in counted]
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
            tensors = open_safetensors(path)
        for name, source in tensors.items():
            if TRAINING_ENTRY.fullmatch(name) or ("." not in name and len(source.shape) < 2):
                skipped.setdefault("entries of the optimizer and of training", []).append(name)
            elif COMPUTED_ENTRY.fullmatch(name):
                skipped.setdefault("buffers that are computed", []).append(name)
            elif name in found:
                raise CheckpointError(f"tensor {name} is in {found[name].origin} and again in {path}")
            else:
                found[name] = source
    return found


# --- which parts of a tensor follow each other: from a strategy file, or from metadata.json ---------------------------

STRATEGY_PLACES = ("*strategy*", "strategy/*", "strategy/*/*", "../strategy/*")
LAYOUT_ITEM, DEVICES, TENSOR_MAP, SPREAD_STEP, SPREAD = 3, 1, 2, 6, 7
MERGE_FIRST = (
    "merge it in MindSpore (mindspore.parallel.unified_safetensors, or for .ckpt "
    "mindspore.transform_checkpoints, with the strategy files of the run) and pass the merged folder"
)

Held = Sequence[Mapping[str, TensorSource]]  # the tensors of every rank or file
Parts = dict[str, list[TensorSource]]


class _JsonLayout(TypedDict):
    dev_matrix: list[int]
    tensor_map: list[int]
    opt_weight_shard_size: int


_JSON_LAYOUTS = TypeAdapter(dict[str, _JsonLayout])


class Layout(NamedTuple):
    """How one parameter lies over the ranks of its stage."""

    devices: list[int]
    tensor_map: list[int]
    is_spread: bool  # by the optimizer, over data parallel ranks


def parts_by_strategy(folder: Path, held: Held) -> tuple[Parts, bool]:
    """(name -> its parts in order, whether a strategy file gave the order)."""
    layouts: dict[str, Layout] = {}
    places = [f"{place}.{kind}" for place in STRATEGY_PLACES for kind in ("ckpt", "json")]
    for path in sorted({path for place in places for path in folder.glob(place)}) if len(held) > 1 else ():
        found = _json_layouts(path) if path.suffix == ".json" else _layouts(path)
        layouts.update((re.sub(r"^\d+-", "", name), layout) for name, layout in found)
    parts: Parts = {}
    for name in dict.fromkeys(name for rank in held for name in rank):
        owners = {rank: tensors[name] for rank, tensors in enumerate(held) if name in tensors}
        layout = layouts.get(name)
        parts[name] = list(owners.values()) if layout is None else _in_order(folder, name, layout, owners)
    return parts, bool(layouts)


def _json_layouts(path: Path) -> Iterator[tuple[str, Layout]]:
    stored = read_json(path, "MindSpore's strategy file").get("parallel_layout_item")
    try:
        layouts = _JSON_LAYOUTS.validate_python(stored, strict=True)
    except ValueError as error:
        raise CheckpointError(f"{path} is no strategy file of MindSpore: {one_line(error)}") from None
    for name, item in layouts.items():
        yield name, Layout(item["dev_matrix"], item["tensor_map"], item["opt_weight_shard_size"] > 1)


def _layouts(path: Path) -> Iterator[tuple[str, Layout]]:
    file = ReadFile(path)
    proto = Messages(file, "strategy file")
    for number, wire, start, stop in proto.fields(0, file.size):
        if number != LAYOUT_ITEM or wire != 2:
            continue
        item = {key: (first, last) for key, first, last in proto.messages(start, stop)}
        if item.keys() != {1, 2}:
            raise proto.damaged(f"the entry at byte {start} is no layout")
        lists = {DEVICES: [], TENSOR_MAP: []}
        values = dict.fromkeys((SPREAD_STEP, SPREAD), 0)
        for key, kind, first, last in proto.fields(*item[2]):
            if key in lists and kind == 2:
                lists[key] = proto.numbers(proto.fields(first, last), 1)
            elif key in values and kind == 0:
                values[key] = first
        # -1 (all bits set) and 0 mean that it is not spread, and one rank holds the whole.
        is_spread = 1 < values[SPREAD] < 1 << 31
        yield proto.text(*item[1]), Layout(lists[DEVICES], lists[TENSOR_MAP], is_spread)


def _in_order(folder: Path, name: str, layout: Layout, owners: Mapping[int, TensorSource]) -> list[TensorSource]:
    size, axes = math.prod(layout.devices), len(layout.devices)
    if any(count < 1 for count in layout.devices) or any(not -1 <= axis < axes for axis in layout.tensor_map):
        raise CheckpointError(
            f"{folder}: the strategy file is damaged: it puts {name} on devices {layout.devices} by {layout.tensor_map}"
        )
    if layout.is_spread or not layout.devices:
        raise CheckpointError(f"{folder}: {name} is spread over data parallel ranks by the optimizer; {MERGE_FIRST}")
    found: dict[tuple[int, ...], TensorSource] = {}
    for rank, source in owners.items():
        left, place = rank % size, []
        for count in reversed(layout.devices):  # coordinates from the last column on, as the tensor map counts them
            place.append(left % count)
            left //= count
        found.setdefault(tuple(0 if axis < 0 else place[axis] for axis in layout.tensor_map), source)
    return [found[place] for place in sorted(found)]


def parts_by_metadata(path: Path, held: Held) -> Parts:
    """name -> its parts by their offset in the whole, from the metadata.json of an iteration folder."""
    stored = read_json(path, "it says where the parts of each tensor lie")
    by_file = {Path(source.origin).name: rank for rank in held for source in list(rank.values())[:1]}
    offsets: dict[str, dict[tuple[int, ...], TensorSource]] = {}
    try:
        for key, places in stored["storage_data"].items():
            name, offset = _shard_id(key)
            owner = next((by_file[place["file_name"]] for place in places if place["file_name"] in by_file), None)
            if owner is not None and name in owner:
                offsets.setdefault(name, {})[offset] = owner[name]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a checkpoint: {type(error).__name__}: {error}") from None
    missing = next((name for rank in held for name in rank if name not in offsets), None)
    if missing is not None:
        raise CheckpointError(f"{path} does not know tensor {missing}, which the files hold")
    return {name: [found[offset] for offset in sorted(found)] for name, found in offsets.items()}


def _shard_id(key: Any) -> tuple[str, tuple[int, ...]]:
    """`('name', (0, 64))` in parts."""
    name, _, offset = str(key).strip("()").partition(",")
    return name.strip("'\" "), tuple(int(number) for number in offset.strip(" ()").split(",") if number.strip())
