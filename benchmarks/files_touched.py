"""Through how many files of the package three things pass: a prompt that becomes a token, a tensor that becomes a
converted shard, a document that becomes a paired row.

    python benchmarks/files_touched.py

Counted with sys.setprofile (and threading.setprofile): files of ascend_kit in which a function runs meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import ascend_kit
from ascend_kit import AscendInferEngine, RunFolder, SamplingParams, convert, demo, evaluate

PACKAGE = str(Path(ascend_kit.__file__).parent)


def files_touched(work: Callable[[], object]) -> list[str]:
    """The package's files whose functions run in `work`, relative to the package; module bodies do not count."""
    found: set[str] = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name != "<module>" and code.co_filename.startswith(PACKAGE):
            found.add(code.co_filename[len(PACKAGE) + 1 :])

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return sorted(found)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--names", action="store_true", help="also print the files")
    names = arguments.parse_args().names
    with tempfile.TemporaryDirectory() as scratch:
        values = {
            "experiment": "e", "output_root": scratch, "input_model": str(demo.ensure_model()), "model_name": "m",
            "use_model": "source", "device": "cpu", "precision": "fp32", "graph_mode": False, "max_seq_length": 512,
            "dataset_path": str(demo.ensure_data()), "prompts_file": "demo", "eval_datasets": ["mmlu"],
            "eval_limit": 1, "eval_fewshot": 0, "eval_max_seq_length": 512,
        }  # fmt: skip
        runs = [ascend_kit.Experiment(**values, run=name) for name in ("a", "b")]
        engine = AscendInferEngine.from_experiment(runs[0]).load_model()

        def evaluated(number: int) -> None:
            with RunFolder.open(runs[number], "05_evaluate") as folder:
                evaluate(engine, runs[number], folder)

        prompts, short = ("one", "two"), SamplingParams(max_new_tokens=1)
        show("a prompt becomes a token", lambda number: engine.generate(prompts[number], short), names)
        show("a tensor becomes a shard", lambda number: convert(values["input_model"], f"{scratch}/m{number}"), names)
        show("a document becomes a row", evaluated, names)
        folders = [run.run_folder for run in runs]
        show("a row becomes a paired row", lambda number: paired(folders), names)


def paired(folders: list[Path]) -> None:
    from ascend_kit.evaluation.compare import Run, compare_accuracy

    compare_accuracy(*(Run(RunFolder(folder)) for folder in folders))


def show(what: str, work: Callable[[int], object], with_names: bool) -> None:
    """Print what the second call of `work` touches; the first one imports, and fills caches."""
    work(0)
    found = files_touched(lambda: work(1))
    print(f"{what}: {len(found)} files" + (f": {', '.join(found)}" if with_names else ""))


if __name__ == "__main__":
    main()
