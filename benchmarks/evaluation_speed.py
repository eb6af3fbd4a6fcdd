"""How fast an MMLU-shaped set is scored, beside lm-eval on transformers and on vLLM, and whether the decisions agree.

    python benchmarks/evaluation_speed.py [--shape qwen3-0.6b] [--subjects 57] [--questions 20] [--precision fp32]
        [--sides ours,hflm,vllm,vllm_token_ids] [--vllm ~/.cache/ascend-kit/peers/vllm/bin/python]

Five shots of 600 to 1,500 tokens in all, one question of about 60, four choices of one token. `hflm` and `vllm` are
lm-eval's own adapters; both compute the shots of each question again (vLLM's `prompt_logprobs` uses no prefix cache)
and run a seeded `--share` of each subject's questions, because all of them take an hour: their time is scaled to all.
`vllm_token_ids` asks each prompt once, for one token and the log-probabilities of the four letters, all of them. In
float32 every decision must be HFLM's; status 1 where one is not, or memory grows from the first half on by more than a
tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from make_model import make_model
from transformers import AutoTokenizer

from ascend_kit import AscendInferEngine
from ascend_kit.evaluation.datasets import find_tasks, write_task_folder
from ascend_kit.evaluation.harness import evaluate
from ascend_kit.evaluation.tasks import LocalTask, go_offline, packaged_tasks
from ascend_kit.params import build_experiment
from ascend_kit.results import RunFolder

SHOTS = (600, 1500)  # tokens of all five together
QUESTION = 60
MAX_LENGTH = 2048
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
REUSES = {"hflm": False, "vllm": False, "vllm_token_ids": True}  # sides, and whether they reuse the shots' results
VLLM = Path.home() / ".cache" / "ascend-kit" / "peers" / "vllm" / "bin" / "python"


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
            write_rows(root / "mmlu" / name / f"{split}.parquet", rows(count, tokens))
    return root


def write_rows(path: Path, rows: list[dict]) -> None:
    """A parquet file of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def run_ours(model: Path, data: Path, out: Path, precision: str, threads: int):
    """Seconds of the evaluation with lm-eval's own work, its documents, and peak memory at half and at the end, MiB."""
    torch.set_num_threads(threads)
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


def run_lm_eval(python: Path, side: str, model: Path, tasks: Sequence[LocalTask], folder: Path, **job):
    """Seconds of lm-eval on `documents` (task -> numbers), in a process of `python`, and (task, number) -> sample.

    Of several filters' samples the last is kept. What the job holds is told in peers/run_lm_eval.py.
    """
    folder.mkdir(parents=True)
    job |= {"side": side, "model": str(model), "result": str(folder / "result.json")}
    job["tasks"] = str(write_task_folder(tasks, folder / "tasks"))
    script = Path(__file__).parent / "peers" / "run_lm_eval.py"
    preload = [] if side == "hflm" else ["--preload"]
    with (folder / "log").open("w+") as log:
        done = subprocess.run([python, script, *preload], input=json.dumps(job), text=True, stdout=log, stderr=log)
        if done.returncode:
            log.seek(0)
            raise SystemExit(f"{side} ended with status {done.returncode}:\n{log.read()[-3000:]}")
    found = json.loads((folder / "result.json").read_text())
    return found["seconds"], {(task, row["doc_id"]): row for task, rows in found["samples"].items() for row in rows}


def draw(tasks: Sequence[LocalTask], share: float) -> dict[str, list[int]]:
    """A seeded share of each task's documents, at least one."""
    generator = random.Random(0)
    counts = {task.task: (task.num_documents, max(1, round(share * task.num_documents))) for task in tasks}
    return {name: sorted(generator.sample(range(whole), count)) for name, (whole, count) in counts.items()}


def differences(documents, samples: dict) -> tuple[int, int, float]:
    """Of the questions with choices: how many both answered, in how many decisions they differ, and the largest
    difference of a log-probability in nats.
    """
    both, other, gap = 0, 0, 0.0
    for row in documents.itertuples():
        sample = samples.get((row.task, row.doc_id))
        if sample is not None and isinstance(row.choice_logprobs, list):
            logprobs = [float(response[0][0]) for response in sample["resps"]][: len(row.choice_logprobs)]
            both += 1
            other += row.prediction != max(range(len(logprobs)), key=logprobs.__getitem__)
            gap = max(gap, *(abs(a - b) for a, b in zip(row.choice_logprobs, logprobs, strict=True)))
    return both, other, gap


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--subjects", type=int, default=57)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--precision", default="fp32", choices=DTYPES)
    parser.add_argument("--sides", default="ours,hflm", help=f"of {','.join(('ours', *REUSES))}, with commas")
    parser.add_argument("--share", type=float, default=0.1, help="of the questions that hflm and vllm answer")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--vllm", type=Path, default=VLLM, help="the Python of vLLM's environment (peers/setup.sh vllm)"
    )
    asked = parser.parse_args()
    sides = asked.sides.split(",")
    if unknown := set(sides) - {"ours", *REUSES}:
        parser.error(f"--sides: {', '.join(unknown)} is unknown; known: ours, {', '.join(REUSES)}")
    if not asked.vllm.exists() and any(side.startswith("vllm") for side in sides):
        parser.error(f"--vllm: there is no {asked.vllm}; benchmarks/peers/setup.sh vllm makes it")
    go_offline()
    model = make_model(asked.shape)
    tokenizer = AutoTokenizer.from_pretrained(model)
    wrong = False
    print(
        f"{asked.shape}, {asked.precision}, {asked.subjects} subjects of {asked.questions} questions, "
        f"{asked.threads} threads"
    )
    print(f"{'side':16} {'seconds':>9} {'questions/s':>12} {'times ours':>11} {'decisions':>14} {'within nats':>12}")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        data = write_mmlu(root, asked.subjects, asked.questions, lambda text: len(tokenizer.encode(text)))
        tasks = find_tasks(data, ["mmlu"])
        count = sum(task.num_documents for task in tasks)
        ours_s, documents = None, None
        if "ours" in sides:
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:  # its memory is gone before the others begin
                ours = alone.submit(run_ours, model, data, root / "out", asked.precision, asked.threads)
                ours_s, documents, half, end = ours.result()
            wrong |= end > 1.1 * half
            print(
                f"{'ascend_kit':16} {ours_s:9.1f} {count / ours_s:12.3f}   peak {end} MiB (half way {half})", flush=True
            )
        for side in (side for side in REUSES if side in sides):
            seconds, samples = run_lm_eval(
                Path(sys.executable) if side == "hflm" else asked.vllm, side, model, tasks, root / side,
                documents=draw(tasks, 1.0 if REUSES[side] else asked.share), num_fewshot=5, max_length=MAX_LENGTH,
                dtype=DTYPES[asked.precision], threads=asked.threads, chat=False,
            )  # fmt: skip
            whole_s = seconds / len(samples) * count
            line = f"{side:16} {whole_s:9.1f} {count / whole_s:12.3f}"
            if documents is not None:
                both, other, gap = differences(documents, samples)
                line += f" {whole_s / ours_s:11.2f} {both - other:5} of {both:5} {gap:12.1e}"
                wrong |= side == "hflm" and asked.precision == "fp32" and other > 0
            scaled = "" if len(samples) == count else f"  scaled from {len(samples)} questions in {seconds:.0f} s"
            print(line + scaled, flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
