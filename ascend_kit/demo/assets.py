"""Build the demo assets once into a cache folder and hand out their paths.

A part is built in a temporary folder beside its final place and renamed when complete, under a file lock, so
that two processes build once and a killed build leaves nothing that could be taken for a result. The folder
names carry a hash of the sources and library versions that determine the content.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ascend_kit.files import Progress, cache_root
from ascend_kit.params.experiment import DEMO

if TYPE_CHECKING:
    from ascend_kit.params import Experiment

STAND_IN = "demo-in-place-of-"  # before the model_name of a file that names no checkpoint
COMPLETE_FILE = "complete.json"
LIBRARIES = ("torch", "transformers", "tokenizers", "pyarrow")
NOT_BUILT_FROM = ("__init__.py", "assets.py")  # sources that do not change what is built


def ensure_data(cache_dir: str | Path | None = None) -> Path:
    """The folder of the sample data sets (`mmlu`, `ceval`, `agieval`, `wikitext`) and `prompts.jsonl`."""
    folder = cache_root(cache_dir) / f"demo-data-{_source_hash()}"
    return _build_once(folder, _build_data)


def ensure_model(
    cache_dir: str | Path | None = None, on_progress: Progress | None = None, *, steps: int | None = None
) -> Path:
    """The folder of the demo checkpoint, trained now (about a minute on two cores) if the cache lacks it."""
    folder, steps = _model_folder(cache_dir, steps)
    return _build_once(folder, lambda target: _build_model(target, steps, on_progress))


def cached_model(cache_dir: str | Path | None = None) -> Path | None:
    """The folder of the fully trained demo checkpoint if the cache has it; nothing is built."""
    folder, _ = _model_folder(cache_dir, None)
    return folder if _is_complete(folder) else None


def resolve(
    experiment: "Experiment", *, cache_dir: str | Path | None = None, on_progress: Progress | None = None
) -> "Experiment":
    """The experiment reading its `demo` parameters from real paths; only the parts it names are built."""
    paths: dict[str, str] = {}
    for name in ("input_model", "tokenizer_path", "dataset_path", "prompts_file", "calibration_file"):
        if getattr(experiment, name) == DEMO:
            is_model = name in ("input_model", "tokenizer_path")
            folder = ensure_model(cache_dir, on_progress) if is_model else ensure_data(cache_dir)
            paths[name] = str(folder / "prompts.jsonl" if name.endswith("_file") else folder)
    changes: dict[str, str] = {}
    if "input_model" in paths and experiment.model_name != DEMO:
        changes["model_name"] = f"{STAND_IN}{experiment.model_name}"
        print(
            f"input_model is not given: the built-in demo model stands in for {experiment.model_name}; every "
            "number below describes the demo model"
        )
    return experiment.standing_for(paths, **changes) if paths else experiment


def _model_folder(cache_dir: str | Path | None, steps: int | None) -> tuple[Path, int]:
    from ascend_kit.demo.train import STEPS

    steps = STEPS if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps={steps}: training takes at least 1 step, {STEPS} by default")
    return cache_root(cache_dir) / f"demo-model-{steps}-{_source_hash()}", steps


def _build_data(target: Path) -> None:
    from ascend_kit.demo.corpus import write_prompts
    from ascend_kit.demo.datasets import write_datasets

    write_datasets(target)
    write_prompts(target / "prompts.jsonl")


def _build_model(target: Path, steps: int, on_progress: Progress | None) -> None:
    from ascend_kit.demo.train import save_model, train_model, train_tokenizer

    tokenizer = train_tokenizer()
    save_model(train_model(tokenizer, steps=steps, on_progress=on_progress), tokenizer, target)


def _build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build` unless it is there and complete; safe between processes."""
    from filelock import FileLock

    if _is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The system drops the lock when its process dies, so a killed build blocks nobody.
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not _is_complete(folder):
            prefix = f".building-{folder.name}-"
            for path in [*folder.parent.glob(prefix + "*"), folder]:  # what killed builds left, and a damaged result
                shutil.rmtree(path, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as temporary:
                target = Path(temporary)
                target.chmod(0o755)  # it is made private; a shared cache must stay readable
                build(target)
                files = [path for path in sorted(target.rglob("*")) if path.is_file()]
                sizes = {path.relative_to(target).as_posix(): path.stat().st_size for path in files}
                (target / COMPLETE_FILE).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
                os.replace(target, folder)
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether every file that was built is there in its size."""
    try:
        sizes = json.loads((folder / COMPLETE_FILE).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _source_hash() -> str:
    """Twelve hex digits over the sources and data of what is built and the libraries' versions."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *here.glob("data/*")]):
        if path.name not in NOT_BUILT_FROM:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for name in LIBRARIES:
        digest.update(f"{name}={version(name)}".encode())
    return digest.hexdigest()[:12]
