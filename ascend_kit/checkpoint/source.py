"""Which kind of checkpoint a folder holds, and the reader for it."""

from __future__ import annotations

from pathlib import Path

from ascend_kit.checkpoint import megatron, mindspore
from ascend_kit.checkpoint.adapter import with_adapter
from ascend_kit.checkpoint.huggingface import Checkpoint, find_weights, open_checkpoint
from ascend_kit.checkpoint.tensor_file import CheckpointError

FRAMEWORKS = ("auto", "huggingface", "megatron", "mindspore")


def framework_of(folder: Path) -> str:
    """huggingface, megatron or mindspore, by the names of the files."""
    # First: MindFormers' iterations lie beside a file of the same name as Megatron's.
    if mindspore.is_mindspore(folder):
        return "mindspore"
    return "megatron" if megatron.is_megatron(folder) else "huggingface"


def open_source(
    folder: Path, framework: str, tokenizer_path: str | Path | None, adapter_path: str | Path | None = None
) -> Checkpoint:
    """The source checkpoint, with the adapter merged where one is named; its format is found out when `framework` is
    auto. CheckpointError where it is another one."""
    checkpoint = _open(folder, framework, tokenizer_path)
    return checkpoint if adapter_path is None else with_adapter(checkpoint, adapter_path)


def _open(folder: Path, framework: str, tokenizer_path: str | Path | None) -> Checkpoint:
    found = framework_of(folder)
    if framework not in ("auto", found):
        raise CheckpointError(f"{folder} holds a {found} checkpoint as far as its files tell, framework is {framework}")
    if found == "megatron":
        return megatron.open_megatron(folder, tokenizer_path)
    return mindspore.open_mindspore(folder, tokenizer_path) if found == "mindspore" else open_checkpoint(folder)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors, found without opening them."""
    kind = framework_of(folder)
    if kind == "megatron":
        return megatron.shard_files(folder)
    return mindspore.weight_files(folder) if kind == "mindspore" else find_weights(folder)[1]


def config_folder(folder: Path, tokenizer_path: Path | None) -> Path:
    """Where config.json lies: training checkpoints take it from the folder of the tokenizer."""
    return folder if tokenizer_path is None or framework_of(folder) == "huggingface" else tokenizer_path
