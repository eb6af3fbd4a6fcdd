"""Which weights, tokenizer and template a folder holds, and whether a converted folder belongs to its source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.checkpoint.adapter import adapter_digest
from ascend_kit.checkpoint.huggingface import TEMPLATE_FILES, TOKENIZER_FILES, companion_files
from ascend_kit.checkpoint.manifest import MANIFEST_NAME, changed_sources, read_manifest, verify
from ascend_kit.checkpoint.source import config_folder, weight_files
from ascend_kit.checkpoint.tensor_file import CheckpointError, read_json
from ascend_kit.identity import Identity, file_hash, hash_value

if TYPE_CHECKING:
    from ascend_kit.params import Experiment

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
        tokenizer=hash_value(_tokenizer_parts(texts)),
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


def _tokenizer_parts(folder: Path) -> dict[str, Any]:
    names = [name for name in TOKENIZER_FILES if name not in TEMPLATE_FILES and (folder / name).is_file()]
    parts: dict[str, Any] = {name: file_hash(folder / name) for name in names}
    if "tokenizer_config.json" in parts:  # the template has a place of its own
        settings = read_json(folder / "tokenizer_config.json", "the tokenizer's settings")
        parts["tokenizer_config.json"] = {key: value for key, value in settings.items() if key != "chat_template"}
    return parts


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
