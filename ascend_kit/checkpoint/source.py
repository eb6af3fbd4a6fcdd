"""Which kind of checkpoint a folder holds, and the files of its weights: found by names, before anything is read.

Megatron: `latest_checkpointed_iteration.txt`, `iter_0000001/mp_rank_TT[_PPP]/model_optim_rng.pt`.
MindSpore: `.ckpt` or safetensors in one folder (`param_name_map.json`, or a single file), in `rank_N` folders, or in an
`iteration_N` folder as `model-<number>-<count>.safetensors`.
Hugging Face: one safetensors file, an index with its shards, or pytorch_model.bin.
"""

from __future__ import annotations

import re
from pathlib import Path

from ascend_kit.checkpoint.pieces import LAYER_NAME, LAYER_NAMES, OUTER_NAMES
from ascend_kit.checkpoint.tensor_file import CheckpointError, open_safetensors, read_json
from ascend_kit.model.tensors import HEAD

WEIGHT_PATTERNS = ("[!.]*.safetensors", "pytorch_model*.bin")  # not the ._ files that macOS writes beside others
SHARD_PATTERN = re.compile(r"(.+)-\d+-of-(\d+)")
ITERATION_FILE = "latest_checkpointed_iteration.txt"
MEGATRON_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
MEGATRON_FILES = ("model_optim_rng.pt", "model_rng.pt")
SAVE_AGAIN = (
    "save it from the training code with `--ckpt-format torch`, or convert it there to Hugging Face format "
    "(MindSpeed-LLM: convert_ckpt_v2.py) and pass that folder"
)
NAME_MAP = "param_name_map.json"
RANK_FOLDER = re.compile(r"rank_(\d+)")
ITERATION_FOLDER = re.compile(r"iteration_\d+")
RANK_FILE = re.compile(r"(?:.+-)?model-(\d{5,})-(\d{5,})\.safetensors")
# Files beside MindSpore's weights: the optimizer's, the run's settings, how the run was spread.
OTHER_FILE = re.compile(r"(.+-)?opt-\d+-\d+\.safetensors|hyper_param\.safetensors|.*optimizer.*|.*strategy.*")


def framework_of(folder: Path) -> str:
    """huggingface, megatron or mindspore, by the names of the files."""
    # First: MindFormers' iterations lie beside a file of the same name as Megatron's.
    if _is_mindspore(folder):
        return "mindspore"
    is_megatron = (
        (folder / ITERATION_FILE).is_file()
        or any(MEGATRON_RANK.fullmatch(path.name) for path in folder.iterdir())
        or _distributed_file(folder) is not None
    )
    return "megatron" if is_megatron else "huggingface"


def _is_mindspore(folder: Path) -> bool:
    """True for a folder of MindSpore's files: .ckpt, ranks or iterations of them, or safetensors that it wrote."""
    if (folder / NAME_MAP).is_file() or any(folder.glob("*.ckpt")) or _rank_folders(folder) or iteration_of(folder):
        return True
    files = sorted(folder.glob("*.safetensors"))
    if not files or ((folder / "config.json").is_file() and list(folder.glob("*.safetensors.index.json"))):
        return False
    try:
        return any(map(_is_mindspores, open_safetensors(files[0])))
    except CheckpointError:
        return False  # the reader of Hugging Face folders names the damage


def _is_mindspores(name: str) -> bool:
    """Whether a tensor of that name is no other's."""
    match = LAYER_NAME.fullmatch(name)
    part = match.group(2) if match else ""
    return LAYER_NAMES.get(part, (part,)) != (part,) or (name in OUTER_NAMES and name != HEAD)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors, found without opening them."""
    kind = framework_of(folder)
    if kind == "megatron":
        return [path for stage in megatron_grid(folder) for path in stage]
    return (
        [path for files in mindspore_ranks(folder) for path in files]
        if kind == "mindspore"
        else find_weights(folder)[1]
    )


def config_folder(folder: Path, tokenizer_path: Path | None) -> Path:
    """Where config.json lies: training checkpoints take it from the folder of the tokenizer."""
    return folder if tokenizer_path is None or framework_of(folder) == "huggingface" else tokenizer_path


# --- Megatron ---------------------------------------------------------------------------------------------------------


def megatron_grid(folder: Path) -> list[list[Path]]:
    """Shard files as [pipeline stage][tensor rank]; every rank of the grid must be there."""
    iteration = _iteration_folder(folder)
    ranks: dict[tuple[int, int], Path] = {}
    for path in sorted(iteration.iterdir()):
        match = MEGATRON_RANK.fullmatch(path.name)
        if match and match.group(3) is not None and int(match.group(3)) > 0:
            raise CheckpointError(f"{path} belongs to an expert-parallel model; only dense models are read")
        if match:
            found = next((path / name for name in MEGATRON_FILES if (path / name).is_file()), None)
            if found is None:
                raise CheckpointError(f"{path} holds none of {', '.join(MEGATRON_FILES)}")
            ranks[int(match.group(2) or 0), int(match.group(1))] = found
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


# --- MindSpore --------------------------------------------------------------------------------------------------------


def _rank_folders(folder: Path) -> dict[int, Path]:
    found = {int(match.group(1)): path for path in folder.iterdir() if (match := RANK_FOLDER.fullmatch(path.name))}
    return {rank: path for rank, path in sorted(found.items()) if path.is_dir() and any(_weights_in(path))}


def _weights_in(folder: Path) -> list[Path]:
    return sorted(path for suffix in ("ckpt", "safetensors") for path in folder.glob(f"*.{suffix}"))


def iteration_of(folder: Path) -> Path | None:
    """The iteration folder that a run's folder points to or its newest one, or the folder itself where it is one."""
    if ITERATION_FOLDER.fullmatch(folder.name) and any(RANK_FILE.fullmatch(path.name) for path in folder.iterdir()):
        return folder
    found = sorted(path for path in folder.iterdir() if path.is_dir() and ITERATION_FOLDER.fullmatch(path.name))
    tracker = folder / ITERATION_FILE
    if found and tracker.is_file():
        wanted = tracker.read_text(encoding="utf-8", errors="replace").strip()
        named = [path for path in found if wanted.isdigit() and int(path.name.partition("_")[2]) == int(wanted)]
        if not named:
            raise CheckpointError(f"{tracker} names {wanted!r}, there are {', '.join(path.name for path in found)}")
        found = named
    return found[-1] if found else None


def mindspore_ranks(folder: Path) -> list[list[Path]]:
    """The weight files of every rank, in the order of the ranks; all ranks must be there."""
    iteration = iteration_of(folder)
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
        return [_existing(folder, name, folder / NAME_MAP) for name in names]
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


# --- Hugging Face -----------------------------------------------------------------------------------------------------


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
