"""Reader of Hugging Face folders: safetensors (one file or sharded), .bin, float or int8."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ascend_kit.checkpoint.mindspore_file import check_mindspore_file
from ascend_kit.checkpoint.quantized_layouts import QuantizationInfo, present_quantized
from ascend_kit.checkpoint.tensor_file import CheckpointError, SafetensorsFile, TensorSource, check_slice, read_json
from ascend_kit.checkpoint.torch_file import TorchFile, check_torch_file
from ascend_kit.model.int4 import dequantize_groups
from ascend_kit.model.int8 import dequantize_weight

COPIED_SUFFIXES = (".model", ".jinja", ".tiktoken", ".vocab", ".merges", ".md")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    *TEMPLATE_FILES,
    "generation_config.json",
)
VOCABULARY_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")
OTHER_FILES = ("configuration.json", "preprocessor_config.json")
WEIGHT_PATTERNS = ("[!.]*.safetensors", "pytorch_model*.bin")  # not the ._ files that macOS writes beside others
SHARD_PATTERN = re.compile(r"(.+)-\d+-of-(\d+)")


class Checkpoint:
    """Named tensors of one model, read on demand. Reads are safe from several threads.

    Whatever the files hold, names are Hugging Face's; quantised linears have the form that
    `quantized_layouts` describes, and `quantization` says which they are.
    """

    def __init__(
        self,
        folder: Path,
        sources: Mapping[str, TensorSource],
        config: dict[str, Any],
        *,
        files: list[Path],
        framework: str = "huggingface",
        quantization: QuantizationInfo | None = None,
        config_folder: Path | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.folder, self.config, self.files, self.framework = Path(folder), config, files, framework
        self.quantization = quantization or QuantizationInfo()
        self.config_folder = config_folder or self.folder  # of config.json, tokenizer and the like
        self.sources = dict(sources)
        self.notes = tuple(notes)  # what was left out while reading, in words

    def check_data(self) -> None:
        """Compare the contents of the files with their checksums, see `check_contents`."""
        for path in self.files:
            check_contents(path)

    def tensor_names(self) -> list[str]:
        """Every tensor, in the order in which the files hold them."""
        return list(self.sources)

    def __contains__(self, name: str) -> bool:
        return name in self.sources

    def source(self, name: str) -> TensorSource:
        """The unread tensor; CheckpointError with the closest name if there is none."""
        if name not in self.sources:
            near = difflib.get_close_matches(name, self.sources, n=1, cutoff=0.5)
            hint = f"; closest: {near[0]}" if near else ""
            raise CheckpointError(f"{self.folder} holds no tensor {name}{hint}")
        return self.sources[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.source(name).dtype

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor on the CPU, contiguous, as stored."""
        return self.source(name).read()

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) along `dim`, contiguous; only that part is read from disk."""
        return self.source(name).read_slice(dim, start, stop)


class DequantizedTensor:
    """A quantised linear's weight as float32 [out, in], computed by rows as it is read."""

    dtype = torch.float32

    def __init__(self, checkpoint: Checkpoint, linear: str) -> None:
        self.checkpoint, self.linear = checkpoint, linear
        weight = checkpoint.source(f"{linear}.weight")
        self.shape, self.origin = weight.shape, weight.origin

    def read(self) -> torch.Tensor:
        return self.read_slice(0, 0, self.shape[0])

    def read_slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
        check_slice(self.linear, self.shape, dim, start, stop)
        if dim != 0:
            return self.read().narrow(dim, start, stop - start).contiguous()
        read, linear = self.checkpoint.read_slice, self.linear
        codes, scale = read(f"{linear}.weight", 0, start, stop), read(f"{linear}.weight_scale", 0, start, stop)
        if self.checkpoint.quantization.scheme(linear) != "w4a16":
            return dequantize_weight(codes, scale)
        zero, group_of = f"{linear}.weight_zero_point", f"{linear}.weight_g_idx"
        return dequantize_groups(
            codes,
            scale,
            read(zero, 0, start, stop) if zero in self.checkpoint else None,
            self.checkpoint.read(group_of) if group_of in self.checkpoint else None,
        )


def check_contents(path: Path) -> None:
    """Compare a weight file with its checksums; safetensors files have none."""
    if path.suffix == ".ckpt":
        check_mindspore_file(path)
    elif path.suffix != ".safetensors":
        check_torch_file(path)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a Hugging Face folder. Headers are checked now, data is read later; CheckpointError names what
    is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder at {folder}")
    config = read_config(folder)
    index, files = find_weights(folder)
    sources: dict[str, TensorSource] = {}
    for path in files:
        for name, source in _open_weights(path).items():
            if name in sources:
                raise CheckpointError(f"tensor {name} is in {sources[name].origin} and again in {path}")
            sources[name] = source
    if index is not None:
        _check_index(folder, index, sources)
    sources, quantization = present_quantized(folder, config, sources)
    return Checkpoint(folder, sources, config, files=files, quantization=quantization)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    return read_json(folder / "config.json", "a Hugging Face model folder needs it")


def find_weights(folder: Path) -> tuple[dict[str, str] | None, list[Path]]:
    """The index (tensor -> file name), if there is one, and the weight files in order.

    CheckpointError for a folder with none, with an incomplete one, and with two: which of them is meant, nobody knows.
    """
    adapters = sorted(
        path.name for path in folder.glob("adapter_*") if path.suffix in (".json", ".safetensors", ".bin")
    )
    if adapters:
        raise CheckpointError(
            f"{folder} holds a LoRA adapter ({', '.join(adapters)}), which is not applied here; convert its base model "
            "with adapter_path set to the folder of the adapter, and use the result"
        )
    indexes = sorted(path for kind in ("safetensors", "bin") for path in folder.glob(f"[!.]*.{kind}.index.json"))
    found: list[tuple[str, dict[str, str] | None, list[str]]] = []
    for path in indexes:
        index = read_json(path, "the index").get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
            raise CheckpointError(f"{path} has no weight_map")
        found.append((path.name, index, sorted(set(index.values()))))
    indexed = {name for _, _, names in found for name in names}
    loose = sorted(
        path.name for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern) if path.name not in indexed
    )
    families = {SHARD_PATTERN.sub(r"\1-*-of-\2", name) for name in loose}
    if not found and len(loose) > 1 and len(families) == 1:
        raise CheckpointError(
            f"{folder} has {len(loose)} weight files ({families.pop()}) and no index; add "
            "model.safetensors.index.json, which says which tensor is in which file"
        )
    if len(found) + len(families) > 1:
        named = ", ".join([*(f"{name} with its files" for name, _, _ in found), *sorted(families)])
        raise CheckpointError(f"{folder} holds more than one set of weights: {named}; keep the one that is meant")
    if loose:
        return None, [folder / loose[0]]
    if not found:
        raise CheckpointError(
            f"{folder} holds no weights: expected model.safetensors, a *.safetensors.index.json or pytorch_model.bin"
        )
    return found[0][1], [_existing(folder, name, indexes[0]) for name in found[0][2]]


def _existing(folder: Path, name: str, index: Path) -> Path:
    path = folder / name
    if Path(name).name != name:
        raise CheckpointError(f"{index} names the file {name!r}; only plain file names are followed")
    try:
        is_there = path.is_file()
    except OSError as error:
        raise CheckpointError(f"{index} names the file {name!r}: {error.strerror}") from None
    if not is_there:
        raise CheckpointError(f"{path} is missing, though {index.name} names it: the download or copy is incomplete")
    return path


def _open_weights(path: Path) -> dict[str, TensorSource]:
    if path.suffix == ".safetensors":
        return dict(SafetensorsFile(path).tensors)
    file = TorchFile(path)
    loaded = file.content
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected a dictionary of tensors")
    return file.tensors(loaded)


def _check_index(folder: Path, index: dict[str, str], sources: dict[str, TensorSource]) -> None:
    for name, file_name in index.items():
        if name not in sources or Path(sources[name].origin).name != file_name:
            raise CheckpointError(f"{folder / file_name} does not hold tensor {name}, though the index says so")
    for name, source in sources.items():
        if name not in index:
            raise CheckpointError(f"{source.origin} holds tensor {name}, which the index does not know")


def companion_files(folder: Path, tokenizer_path: Path | None) -> list[Path]:
    """config.json, then tokenizer, generation settings, licence and the like; `tokenizer_path` replaces what it has.

    Weights, their index and program files (*.py) are not copied: a model folder must not bring code along.
    """
    found = {path.name: path for path in sorted(folder.iterdir()) if _is_small_file(path)}
    if tokenizer_path is not None:
        if not tokenizer_path.is_dir():
            raise CheckpointError(f"tokenizer_path: no folder at {tokenizer_path}")
        found |= {name: tokenizer_path / name for name in TOKENIZER_FILES if (tokenizer_path / name).is_file()}
    return [folder / "config.json", *found.values()]


def _is_small_file(path: Path) -> bool:
    known = path.name in TOKENIZER_FILES or path.name in OTHER_FILES or path.suffix in COPIED_SUFFIXES
    legal = path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
    return path.is_file() and (known or legal) and not path.name.startswith(".")


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder, which must not bring code along; CheckpointError names the folder when none of it can
    be loaded."""
    from transformers import AutoTokenizer

    # Without any of them transformers makes an empty tokenizer and says nothing.
    if not any(path.match(pattern) for path in Path(folder).glob("*") for pattern in VOCABULARY_FILES):
        raise CheckpointError(f"no tokenizer in {folder}: expected one of {', '.join(VOCABULARY_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers finds wrong, also in config.json, has types of its own
        check_companions(path for name in TOKENIZER_FILES if (path := Path(folder) / name).is_file())
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {type(error).__name__}: {error}") from error


def check_companions(files: Iterable[Path]) -> None:
    """CheckpointError naming the first of a model's small files that is broken: JSON files, and what tokenizers
    reads."""
    for path in files:
        if path.suffix == ".json":
            read_json(path, "a model folder needs it")
        if path.name == "tokenizer.json":
            from tokenizers import Tokenizer

            try:
                Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises plain Exception
                raise CheckpointError(f"{path} is no tokenizer: {error}") from error
