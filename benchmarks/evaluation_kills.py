"""Ten kills at random moments: an evaluation goes on where it was, asks nothing twice and ends with the same table.

    python benchmarks/evaluation_kills.py [--kills 10] [--questions 40]

The evaluation runs in a process of its own with a real engine (a tiny model) and is killed with SIGKILL after a random
number of new documents. Status 1 where a document stands twice, a row changed, or the final table is another than that
of an undisturbed run.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from evaluation_speed import MAX_LENGTH, write_mmlu
from make_model import make_model

from ascend_kit import AscendInferEngine
from ascend_kit.evaluation.harness import evaluate
from ascend_kit.evaluation.scores import load_scores
from ascend_kit.params import build_experiment
from ascend_kit.results import RunFolder

SUBJECTS = 4
COLUMNS = ["task", "metric", "value", "stderr", "n"]


def run(root: Path, name: str) -> RunFolder:
    """One whole evaluation, or the rest of one."""
    model = make_model("tiny")
    experiment = build_experiment({
        "experiment": "kills", "run": name, "output_root": str(root / "out"), "input_model": str(model),
        "dataset_path": str(root), "eval_datasets": ["mmlu"], "eval_max_seq_length": MAX_LENGTH, "precision": "fp32",
        "eval_batch_size": 8,
    })  # fmt: skip
    settings = {"precision": "fp32", "max_seq_length": MAX_LENGTH, "batch_size": 4, "device": "cpu"}
    with AscendInferEngine(model, **settings) as engine, RunFolder.open(experiment, "05_evaluate") as folder:
        evaluate(engine, experiment, folder).raise_if_failed()
    return folder


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--child", help="folder of an evaluation that is to be killed")
    asked = parser.parse_args()
    if asked.child:
        run(Path(asked.child), "killed")
        return 0
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_model("tiny"))
    generator, kept = random.Random(0), []
    with tempfile.TemporaryDirectory() as scratch:
        root = write_mmlu(Path(scratch), SUBJECTS, asked.questions, lambda text: len(tokenizer.encode(text)))
        table = root / "out" / "kills" / "killed" / "documents.jsonl"
        total = SUBJECTS * asked.questions
        for number in range(asked.kills):
            more = generator.randint(1, max(1, (total - lines_of(table)) // (asked.kills - number + 1)))
            goal = lines_of(table) + more
            process = subprocess.Popen(
                [sys.executable, __file__, "--child", scratch, "--questions", str(asked.questions)]
            )
            while process.poll() is None and lines_of(table) < goal:
                time.sleep(0.001)
            process.kill()
            ended = process.wait()
            kept.append(lines_of(table))
            print(f"kill {number + 1}: {kept[-1]} of {total} documents on disk, exit {ended}", flush=True)
            assert ended == -9, "the evaluation ended before it could be killed: give it more questions"
        folder = RunFolder(table.parent)
        before = list(folder.rows("documents"))
        ended, calm = load_scores(run(root, "killed")), load_scores(run(root, "calm"))
        rows = list(folder.rows("documents"))
        keys = [(row["task"], row["doc_id"]) for row in rows]
        checks = {
            "every document once": len(keys) == len(set(keys)) == total,
            "what was on disk is untouched": rows[: len(before)] == before,
            "the same table": ended[COLUMNS].equals(calm[COLUMNS]),
        }
    for name, holds in checks.items():
        print(f"{name}: {'yes' if holds else 'NO'}")
    return int(not all(checks.values()))


if __name__ == "__main__":
    sys.exit(main())
