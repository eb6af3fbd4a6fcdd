"""ascend_manifest.json: what a converted folder was made from, how, and hashes that show it is still that;
which weights, tokenizer and template any folder holds.

Hashes are XXH3 with 128 bits. They find damage and mix-ups, which is all that a manifest lying beside its
files can do (whoever changes a file on purpose can change the manifest too), and unlike sha256 they keep up
with a disk.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

import torch
import xxhash
from pydantic import TypeAdapter
from typing_extensions import TypedDict  # pydantic takes the one of typing from Python 3.12 on

from ascend_kit import __version__
from ascend_kit.checkpoint.adapter import adapter_digest
from ascend_kit.checkpoint.huggingface import TEMPLATE_FILES, TOKENIZER_FILES, companion_files
from ascend_kit.checkpoint.source import config_folder, weight_files
from ascend_kit.checkpoint.tensor_file import MAX_HEADER_BYTES, CheckpointError, read_json
from ascend_kit.files import file_hash, hash_file, hash_value, one_line, strict_json
from ascend_kit.identity import Identity

MANIFEST_NAME = "ascend_manifest.json"
SCHEMA_VERSION = 1
NAME_BYTES = 255  # of a file, on every common file system
HASH_ALGORITHM = "xxh3_128"


class _Entry(TypedDict):
    name: str
    size: int
    mtime_ns: int
    header_hash: str
    hash: str


class _Source(TypedDict):
    folder: str
    files: list[_Entry]
    companions: NotRequired[list[_Entry]]
    left_out: NotRequired[list[str]]
    adapter: NotRequired[str]  # the folder; what it held is in the settings


class _Scheme(TypedDict):
    scheme: str


class _Form(TypedDict):
    settings: dict[str, Any]
    quantization: _Scheme
    num_tensors: int
    source: _Source
    files: list[_Entry]


_FORM = TypeAdapter(_Form)


def header_hash(path: Path) -> str:
    """Hash of what identifies a file quickly: a safetensors header, else the first and last 64 KiB."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if path.suffix == ".safetensors" and length <= min(size, MAX_HEADER_BYTES):
            return xxhash.xxh3_128_hexdigest(head + file.read(length))
        first = head + file.read((64 << 10) - 8)
        file.seek(max(len(first), size - (64 << 10)))
        return xxhash.xxh3_128_hexdigest(first + file.read())


def describe_file(path: Path, full_hash: str) -> dict[str, Any]:
    """The manifest's entry for a file: name, size, modification time, quick hash and full hash."""
    stat = os.stat(path)
    return {"name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "header_hash": header_hash(path),
            "hash": full_hash}  # fmt: skip


def new_manifest(**parts: Any) -> dict[str, Any]:
    """The manifest of a finished conversion: its parts, and the versions that may change what a conversion writes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "hash_algorithm": HASH_ALGORITHM,
        "created_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "ascend_kit": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
        },
        **parts,
    }


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a folder; None when there is none, CheckpointError when it is damaged."""
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest = strict_json(path.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
        if version == SCHEMA_VERSION:
            _FORM.validate_python(manifest, strict=True)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({one_line(error)}); convert the model again") from error
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {version}, this version reads {SCHEMA_VERSION}; convert the model again"
        )
    for name in (entry["name"] for entry in manifest["files"]):
        if Path(name).name != name or len(name.encode(errors="replace")) > NAME_BYTES:
            raise CheckpointError(f"{path} is damaged: it lists {name!r}, and only files beside it count")
    return manifest


def verify(folder: str | Path, full: bool = False) -> bool:
    """Check a folder against its manifest: sizes and headers, with `full` every byte.

    CheckpointError names the first file that is missing, added or different. False for a folder without a manifest (a
    plain Hugging Face download): it has nothing to be checked against.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    listed = {entry["name"] for entry in manifest["files"]}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in listed:
            raise CheckpointError(f"{path} is not in {MANIFEST_NAME}: it was added after the conversion")
    again = "the folder was changed after the conversion; convert again, or delete the manifest to accept it"
    for path, entry in ((folder / entry["name"], entry) for entry in manifest["files"]):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {again}")
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, its manifest says {entry['size']}: {again}")
        if header_hash(path) != entry["header_hash"]:
            raise CheckpointError(f"{path} has another header than its manifest says: {again}")
        if full and hash_file(path) != entry["hash"]:
            raise CheckpointError(f"{path} does not have the hash in its manifest: its contents are damaged or changed")
    return True


def changed_sources(
    folder: Path, weights: Iterable[Path], companions: Iterable[Path], manifest: dict[str, Any], *, content: bool = True
) -> Iterator[str]:
    """What differs between the source files that a manifest names and those that `folder` has now, one text each.

    With `content` a file is compared by its content hash, wherever it lies now (read once, then remembered by stat);
    without, by size and header alone. Companions are the small files that were copied.
    """
    source = manifest["source"]
    pairs = [(source["files"], list(weights))]
    if "companions" in source:
        pairs.append((source["companions"], list(companions)))
    for recorded, present in pairs:
        entries = {entry["name"]: entry for entry in recorded}
        for path in present:
            entry = entries.pop(source_name(folder, path), None)
            if entry is None:
                yield f"{path} is new"
            elif not _is_same_file(path, entry, content):
                yield f"{path} has other contents"
        yield from (f"{name} is not there any more" for name in entries)


def _is_same_file(path: Path, entry: dict[str, Any], content: bool) -> bool:
    if path.stat().st_size != entry["size"]:
        return False
    return file_hash(path) == entry["hash"] if content else header_hash(path) == entry["header_hash"]


def source_name(folder: Path, path: Path) -> str:
    """A source file's name in the manifest, relative to the checkpoint when it lies inside."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


if TYPE_CHECKING:
    from ascend_kit.params import Experiment

# --- what a folder holds, and whether it belongs to its source --------------------------------------------------------

# Keys of config.json that say where a model comes from and not what it computes.
ORIGIN_KEYS = frozenset({"_name_or_path", "transformers_version", "architectures", "auto_map", "use_cache"})

AGAIN = "Run 02_convert again with if_model_exists: overwrite, choose another model_name, or set use_model: source"


def model_identity(model_path: str | Path, tokenizer_path: str | Path | None = None) -> Identity:
    """Content hashes of the weights with their config.json, of the tokenizer and of the chat template.

    A converted folder's weights are taken from its manifest once sizes, headers and times agree with it; other files
    are read, and remembered by stat. CheckpointError for a folder without weights or not as its manifest says.
    """
    folder = Path(model_path)
    texts = Path(tokenizer_path) if tokenizer_path else folder
    config = read_json(
        config_folder(folder, Path(tokenizer_path) if tokenizer_path else None) / "config.json",
        "a model folder needs it",
    )
    weights = {
        "files": weight_hashes(folder),
        "config": {key: value for key, value in config.items() if key not in ORIGIN_KEYS},
    }
    template = _chat_template(texts)
    return Identity(
        weights=hash_value(weights),
        tokenizer=tokenizer_hash(texts),
        chat_template=None if template is None else hash_value(template),
    )


def weight_hashes(folder: Path) -> list[tuple[str, str]]:
    """(name in the folder, content hash) of every weight file, by name."""
    manifest = read_manifest(folder)
    if manifest is not None:
        verify(folder)
    recorded = {entry["name"]: entry for entry in manifest["files"]} if manifest else {}
    found = []
    for path in weight_files(folder):
        name = path.relative_to(folder).as_posix()
        entry = recorded.get(name)
        untouched = entry is not None and entry["mtime_ns"] == path.stat().st_mtime_ns
        value = entry["hash"] if entry and untouched else file_hash(path)
        if entry is not None and value != entry["hash"]:
            raise CheckpointError(
                f"{path} does not have the hash in its {MANIFEST_NAME}: it was changed after the conversion"
            )
        found.append((name, value))
    return sorted(found)


def tokenizer_hash(folder: Path) -> str:
    """Content hash of a folder's tokenizer, without its chat template."""
    names = [name for name in TOKENIZER_FILES if name not in TEMPLATE_FILES and (folder / name).is_file()]
    parts: dict[str, Any] = {name: file_hash(folder / name) for name in names}
    if "tokenizer_config.json" in parts:  # the template has a place of its own
        settings = read_json(folder / "tokenizer_config.json", "the tokenizer's settings")
        parts["tokenizer_config.json"] = {key: value for key, value in settings.items() if key != "chat_template"}
    return hash_value(parts)


def _chat_template(folder: Path) -> Any:
    """The template that the tokenizer would use; None when there is none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(folder / name, "chat template").get("chat_template") if (folder / name).is_file() else None
        if template is not None:
            return template
    return None


def check_converted(experiment: Experiment, *, content: bool = True) -> None:
    """CheckpointError naming both unless the converted folder, where it is to be used, was made from `input_model`.

    Equal content is the same source, wherever it lies. With `content` a source file that was touched since is read
    (once, the hash is remembered); without, headers and stat decide and an undecided file passes.
    """
    if experiment.use_model != "converted":
        return
    converted, source = experiment.converted_folder, Path(experiment.input_model)
    texts = Path(experiment.tokenizer_path) if experiment.tokenizer_path else None
    manifest = read_manifest(converted)
    if manifest is None:
        raise CheckpointError(f"{converted} holds no {MANIFEST_NAME}: run 02_convert first, or set use_model: source")
    made_from = manifest["source"]["folder"]
    if not source.is_dir():
        raise CheckpointError(
            f"input_model {source} does not exist; {converted} was made from {made_from}. To run the converted folder "
            f"by itself, set input_model: {converted} and use_model: source"
        )
    adapter = Path(experiment.adapter_path) if experiment.adapter_path else None
    if manifest["settings"].get("adapter_sha256") != (adapter_digest(adapter) if adapter else None):
        raise CheckpointError(
            f"{converted} was made with adapter {manifest['source'].get('adapter', 'none')}, and adapter_path is "
            f"{adapter or 'not set'}. {AGAIN}"
        )
    companions = companion_files(config_folder(source, texts), texts)
    different = next(changed_sources(source, weight_files(source), companions, manifest, content=content), None)
    if different is not None:
        raise CheckpointError(
            f"{converted} was made from {made_from} and not from input_model {source} as it is now ({different}). "
            f"{AGAIN}"
        )
