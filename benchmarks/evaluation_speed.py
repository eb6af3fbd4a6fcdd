"""How fast an MMLU-shaped set is scored, beside lm-eval's HFLM on the same documents, and whether the decisions agree.

    python benchmarks/evaluation_speed.py [--shape qwen3-0.6b] [--subjects 57] [--questions 20] [--precision fp32]

Five shots of 600 to 1,500 tokens in all, one question of about 60, four choices of one token. HFLM runs a seeded tenth
of the questions of each length, because all of them take it an hour; its time is scaled to all. In float32 every
decision must be HFLM's; the script ends with status 1 where one is not, or memory grows from the first half on by more
than a tenth.
"""

from __future__ import annotations

import argparse
import random
import resource
import string
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
from make_model import make_model

from ascend_kit import AscendInferEngine
from ascend_kit.evaluation.datasets import find_tasks, go_offline, packaged_tasks, write_task_folder
from ascend_kit.evaluation.harness import evaluate
from ascend_kit.params import build_experiment
from ascend_kit.results import RunFolder

SHOTS = (600, 1500)  # tokens of all five together
QUESTION = 60
MAX_LENGTH = 2048


def write_mmlu(root: Path, subjects: int, questions: int, tokens_of, seed: int = 0) -> Path:
    """Local copies of the first MMLU subjects with random text; shots of one subject share a length."""
    generator = random.Random(seed)
    names = [config["dataset_name"] for _, config in packaged_tasks("mmlu/default").values()][:subjects]

    def text(tokens: int) -> str:
        words = ""
        while tokens_of(words) < tokens:
            words += "".join(generator.choices(string.ascii_lowercase, k=generator.randint(2, 8))) + " "
        return words.strip().capitalize() + "?"

    def rows(count: int, tokens: int) -> list[dict]:
        choices = [[text(3)[:12] for _ in range(4)] for _ in range(count)]
        return [{"question": text(tokens), "choices": four, "answer": generator.randrange(4)} for four in choices]

    for place, name in enumerate(names):
        shot = (SHOTS[0] + (SHOTS[1] - SHOTS[0]) * place // max(1, len(names) - 1)) // 5
        for split, count, tokens in (("dev", 5, max(8, shot - 40)), ("test", questions, QUESTION)):
            path = root / "mmlu" / name / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(count, tokens)), path)
    return root


def run_ours(model: Path, data: Path, out: Path, precision: str):
    """Seconds of the evaluation with lm-eval's own work, its documents, and peak memory at half and at the end, MiB."""
    experiment = build_experiment({
        "experiment": "speed", "output_root": str(out), "input_model": str(model), "dataset_path": str(data),
        "eval_datasets": ["mmlu"], "eval_max_seq_length": MAX_LENGTH, "precision": precision,
    })  # fmt: skip
    peaks: list[tuple[float, int]] = []
    settings = {"precision": precision, "max_seq_length": MAX_LENGTH, "batch_size": 16, "device": "cpu"}
    with AscendInferEngine(model, **settings) as engine, RunFolder.open(experiment, "05_evaluate") as folder:
        _ = engine.identity  # hashes the weights once
        start = time.perf_counter()
        result = evaluate(
            engine, experiment, folder, on_progress=lambda done, total, text: peaks.append((done / total, _peak_mib()))
        )
        seconds = time.perf_counter() - start
    result.raise_if_failed()
    half = next(peak for share, peak in peaks if share >= 0.5)
    return seconds, result.documents, half, peaks[-1][1]


def run_hflm(model: Path, data: Path, folder: Path, precision: str, share: float):
    """Seconds per document of HFLM on a seeded share of each subject's questions, and its samples."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = find_tasks(data, ["mmlu"])
    generator = random.Random(0)
    chosen = {
        task.task: sorted(generator.sample(range(task.num_documents), max(1, round(share * task.num_documents))))
        for task in tasks
    }
    lm = HFLM(
        pretrained=str(model),
        device="cpu",
        dtype={"fp32": "float32", "bf16": "bfloat16"}[precision],
        batch_size=8,
        max_length=MAX_LENGTH,
    )
    start = time.perf_counter()
    found = simple_evaluate(
        model=lm,
        tasks=list(chosen),
        num_fewshot=5,
        samples=chosen,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(write_task_folder(tasks, folder)), include_defaults=False),
    )
    seconds = time.perf_counter() - start
    samples = {(task, row["doc_id"]): row for task, rows in found["samples"].items() for row in rows}
    return seconds / len(samples), samples


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--subjects", type=int, default=57)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--share", type=float, default=0.1, help="of the questions that HFLM answers")
    asked = parser.parse_args()
    go_offline()
    from transformers import AutoTokenizer

    model = make_model(asked.shape)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        data = write_mmlu(root, asked.subjects, asked.questions, lambda text: len(tokenizer.encode(text)))
        ours_s, documents, half, end = run_ours(model, data, root / "out", asked.precision)
        theirs_s, samples = run_hflm(model, data, root / "tasks", asked.precision, asked.share)
    same, gap = 0, 0.0
    for row in documents.itertuples():
        sample = samples.get((row.task, row.doc_id))
        if sample is not None:
            logprobs = [response[0][0] for response in sample["resps"]]
            same += row.prediction == max(range(len(logprobs)), key=logprobs.__getitem__)
            gap = max(gap, *(abs(a - b) for a, b in zip(row.choice_logprobs, logprobs, strict=True)))
    whole_s = theirs_s * len(documents)
    print(f"{asked.shape}, {asked.precision}, {len(documents)} questions of {asked.subjects} subjects")
    print(f"ascend_kit  {ours_s:8.1f} s  {len(documents) / ours_s:6.2f} questions/s  peak {end} MiB (half way {half})")
    print(f"HFLM        {whole_s:8.1f} s  {1 / theirs_s:6.2f} questions/s  (scaled from {len(samples)} questions)")
    print(f"{whole_s / ours_s:.1f} times as fast; {same} of {len(samples)} decisions equal, within {gap:.1e} nats")
    return int((asked.precision == "fp32" and same < len(samples)) or end > 1.1 * half)


if __name__ == "__main__":
    sys.exit(main())
