"""Reader of Hugging Face folders: safetensors (one file or sharded), .bin, float or int8."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ascend_kit.checkpoint.compressed_tensors import present_compressed_tensors
from ascend_kit.checkpoint.gptq_awq import present_awq, present_gptq
from ascend_kit.checkpoint.mindspore_file import check_mindspore_file
from ascend_kit.checkpoint.msmodelslim import present_msmodelslim
from ascend_kit.checkpoint.source import find_weights
from ascend_kit.checkpoint.tensor_file import ByRows, CheckpointError, TensorSource, open_safetensors, read_json
from ascend_kit.checkpoint.torch_file import TorchFile, check_torch_file
from ascend_kit.messages import did_you_mean
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.quantize import dequantize_groups, dequantize_weight

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
GPTQ_FILE, MSMODELSLIM_PATTERN = "quantize_config.json", "quant_model_description*.json"
PRESENT = {"compressed-tensors": present_compressed_tensors, "gptq": present_gptq, "awq": present_awq}


@dataclass(frozen=True)
class QuantizationInfo:
    """Which linears are stored as int8 or in 4 bits. Names are module names without `.weight`."""

    layout: str = "none"  # none | compressed-tensors | gptq | awq | msmodelslim
    schemes: Mapping[str, str] = field(default_factory=dict)  # linear -> w8a8, w8a8_static, w8a16 or w4a16

    def scheme(self, linear: str) -> str:
        """`none`, or the scheme's name."""
        return self.schemes.get(linear, "none")

    @property
    def summary(self) -> str:
        """none, the only scheme that occurs, or mixed."""
        kinds = set(self.schemes.values())
        return kinds.pop() if len(kinds) == 1 else ("mixed" if kinds else "none")


class Checkpoint:
    """Named tensors of one model, read on demand. Reads are safe from several threads.

    Whatever the files hold, names are Hugging Face's; quantised linears have the form that
    `quantized_tensors` describes, and `quantization` says which they are.
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

    @functools.cached_property
    def model(self) -> ModelConfig:
        """What config.json says of the model; ValueError names what is missing or not supported."""
        return ModelConfig.from_dict(self.config, where=f"{self.config_folder}/config.json")

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
            raise CheckpointError(f"{self.folder} holds no tensor {name}{did_you_mean(name, self.sources, 0.5)}")
        return self.sources[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source(name).shape

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor on the CPU, contiguous, as stored."""
        return self.source(name).read()

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) along `dim`, contiguous; only that part is read from disk."""
        return self.source(name).read_slice(dim, start, stop)

    def dequantized(self, name: str) -> TensorSource:
        """The unread tensor; a quantised linear's weight as float32 [out, in], computed by rows as it is read."""
        linear = name.removesuffix(".weight")
        if linear == name or self.quantization.scheme(linear) == "none":
            return self.source(name)
        zero, group_of = f"{name}_zero_point", f"{name}_g_idx"

        def rows(start: int, stop: int) -> torch.Tensor:
            codes, scale = self.read_slice(name, 0, start, stop), self.read_slice(f"{name}_scale", 0, start, stop)
            if self.quantization.scheme(linear) != "w4a16":
                return dequantize_weight(codes, scale)
            zeros = self.read_slice(zero, 0, start, stop) if zero in self else None
            return dequantize_groups(codes, scale, zeros, self.read(group_of) if group_of in self else None)

        return ByRows(rows, torch.float32, self.shape(name), self.source(name).origin)


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
        for name, source in open_weights(path).items():
            if name in sources:
                raise CheckpointError(f"tensor {name} is in {sources[name].origin} and again in {path}")
            sources[name] = source
    if index is not None:
        _check_index(folder, index, sources)
    sources, quantization = present_quantized(folder, config, sources)
    return Checkpoint(folder, sources, config, files=files, quantization=quantization)


def present_quantized(
    folder: Path, config: dict[str, Any], sources: dict[str, TensorSource]
) -> tuple[dict[str, TensorSource], QuantizationInfo]:
    """Sources in the common form and the description; a float checkpoint passes through unchanged."""
    stored, where = config.get("quantization_config") or {}, folder / "config.json"
    if not stored and (folder / GPTQ_FILE).is_file():
        where = folder / GPTQ_FILE
        stored = {"quant_method": "gptq", **read_json(where, "GPTQ's settings")}
    if not isinstance(stored, dict):
        raise CheckpointError(f"{where}: quantization_config must be an object, found {type(stored).__name__}")
    files = sorted(folder.glob(MSMODELSLIM_PATTERN))
    is_msmodelslim = "model_quant_type" in stored or stored.get("quant_method") == "ascend"
    if len(files) > 1 or (files and stored and not (is_msmodelslim and stored == read_json(files[0], "description"))):
        names = ", ".join([*map(str, files), *([f"quantization_config in {where}"] if stored else [])])
        raise CheckpointError(
            f"{folder} describes its int8 tensors more than once: {names}; keep the one that is right"
        )
    result = dict(sources)
    if files:
        where, stored, is_msmodelslim = files[0], read_json(files[0], "msModelSlim's description"), True
    if not stored:
        return result, QuantizationInfo()
    if is_msmodelslim:
        return result, QuantizationInfo("msmodelslim", present_msmodelslim(where, stored, config, result))
    method = str(stored.get("quant_method"))
    if method not in PRESENT:
        raise CheckpointError(
            f"{where}: quant_method {stored.get('quant_method')!r} is not supported; readable are "
            f"{', '.join(PRESENT)} and msModelSlim, or start from the float model"
        )
    return result, QuantizationInfo(method, PRESENT[method](where, stored, result))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    return read_json(folder / "config.json", "a Hugging Face model folder needs it")


def open_weights(path: Path) -> dict[str, TensorSource]:
    """The tensors of one safetensors or .bin file by their names."""
    if path.suffix == ".safetensors":
        return open_safetensors(path)
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
