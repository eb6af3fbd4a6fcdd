"""Whether a trained model decides as under lm-eval's HFLM, in float32: choices, written answers, perplexity.

    python benchmarks/evaluation_parity.py MODEL [--subjects 10] [--questions 20] [--shots 3] [--threads 2]

MODEL is a Hugging Face folder. The questions are made from Python's own language reference, real English that every
interpreter brings along: which words go on a passage, asked for by letter (MMLU's form, with shots) and by the whole
text (AGIEval's form), sums whose answer ends before the next "Q:", and pages of running text. Asked as plain prompts,
and through the chat template where the tokenizer has one. Status 1 where a decision or a text differs.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from evaluation_speed import differences, run_lm_eval, write_rows
from transformers import AutoTokenizer

from ascend_kit import AscendInferEngine
from ascend_kit.evaluation.datasets import find_tasks
from ascend_kit.evaluation.harness import evaluate
from ascend_kit.evaluation.tasks import go_offline, packaged_tasks
from ascend_kit.params import build_experiment
from ascend_kit.results import RunFolder

WORDS = " ".join(topics.values()).split()
SETS = ["mmlu", "agieval", "wikitext"]
MAX_LENGTH = 2048


def cloze(generator: random.Random) -> tuple[str, list[str], int]:
    """A passage of 15 words, four texts of six of which one goes on with it, and its place."""
    places = generator.sample(range(0, len(WORDS) - 21, 21), 4)
    right = generator.randrange(4)
    choices = [" ".join(WORDS[place + 15 : place + 21]) for place in places]
    return " ".join(WORDS[places[right] : places[right] + 15]), choices, right


def mmlu_row(generator: random.Random) -> dict:
    passage, choices, right = cloze(generator)
    return {"question": f"How does this text go on? {passage}", "choices": choices, "answer": right}


def agieval_row(generator: random.Random) -> dict:
    passage, choices, right = cloze(generator)
    return {"query": f"Q: How does this text go on? {passage}\nA:", "choices": choices, "gold": [right]}


def sum_row(generator: random.Random) -> dict:
    pairs = [(generator.randrange(2, 50), generator.randrange(2, 50)) for _ in range(4)]
    shots = "".join(f"Q: What is {a} + {b}?\nA: {a + b}\n" for a, b in pairs[:3])
    a, b = pairs[3]
    return {"query": f"{shots}Q: What is {a} + {b}?\nA:", "answer": str(a + b)}


def write_sets(root: Path, subjects: int, questions: int, shots: int) -> None:
    generator = random.Random(0)
    for name in [config["dataset_name"] for _, config in packaged_tasks("mmlu/default").values()][:subjects]:
        for split, count in (("dev", shots), ("test", questions)):
            write_rows(root / "mmlu" / name / f"{split}.parquet", [mmlu_row(generator) for _ in range(count)])
    for name, row in (("aqua-rat", agieval_row), ("gaokao-mathcloze", sum_row)):
        write_rows(root / "agieval" / name / "test.parquet", [row(generator) for _ in range(2 * questions)])
    pages = [{"page": " ".join(WORDS[place : place + 1500])} for place in (0, 9000)]
    write_rows(root / "wikitext" / "wikitext-2-raw-v1" / "test.parquet", pages)


def compare(documents, samples: dict) -> tuple[list[str], bool]:
    """Lines that tell how far ours and lm-eval's answers agree, and whether a decision or a text differs."""
    both, other, gap = differences(documents, samples)
    lines = [f"{both} questions with choices, {other} decisions differ, log-probabilities within {gap:.1e} nats"]
    rows = [(row, samples[row["task"], row["doc_id"]]["resps"][0][0]) for row in documents.to_dict("records")]
    texts = [(row["answer"], theirs) for row, theirs in rows if isinstance(row.get("answer"), str)]
    unlike = sum(ours != theirs for ours, theirs in texts)
    if texts:
        stopped = sum(row.get("finish_reason") == "stop" for row, _ in rows)
        lines.append(f"{len(texts)} written answers, {stopped} ended by `until`, {unlike} differ")
    pages = [(row["logprob"], float(theirs), row["words"]) for row, theirs in rows if row.get("logprob", math.nan) < 0]
    if pages:
        words = math.fsum(page[2] for page in pages)
        ours, theirs = (math.exp(-math.fsum(page[side] for page in pages) / words) for side in (0, 1))
        lines.append(f"word perplexity {ours:.6f}, lm-eval {theirs:.6f} ({len(pages)} pages, {words:.0f} words)")
    return lines, bool(other or unlike)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--subjects", type=int, default=10)
    parser.add_argument("--questions", type=int, default=20, help="of each subject")
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    if not (asked.model / "config.json").exists():
        parser.error(f"{asked.model} is no Hugging Face folder")
    go_offline()
    torch.set_num_threads(asked.threads)
    settings = {"precision": "fp32", "max_seq_length": MAX_LENGTH, "batch_size": 16, "device": "cpu"}
    wrong = False
    with tempfile.TemporaryDirectory() as scratch, AscendInferEngine(asked.model, **settings) as engine:
        root = Path(scratch)
        write_sets(root, asked.subjects, asked.questions, asked.shots)
        for chat in (False, True)[: 2 if AutoTokenizer.from_pretrained(asked.model).chat_template else 1]:
            experiment = build_experiment({
                "experiment": "parity", "run": f"chat-{chat}", "output_root": str(root / "out"), "precision": "fp32",
                "input_model": str(asked.model), "dataset_path": scratch, "eval_max_seq_length": MAX_LENGTH,
                "eval_datasets": SETS[:2] if chat else SETS, "eval_fewshot": asked.shots, "eval_chat_template": chat,
            })  # fmt: skip
            with RunFolder.open(experiment, "05_evaluate") as folder:
                result = evaluate(engine, experiment, folder)
            result.raise_if_failed()
            tasks, samples = find_tasks(root, experiment.eval_datasets, num_fewshot=asked.shots), {}
            for shots in (asked.shots, 0):
                some = [task for task in tasks if task.num_fewshot == shots]
                _, found = run_lm_eval(
                    Path(sys.executable), "hflm", asked.model, some, root / f"hflm-{chat}-{shots}",
                    documents={task.task: list(range(task.num_documents)) for task in some}, num_fewshot=shots,
                    max_length=MAX_LENGTH, dtype="float32", threads=asked.threads, chat=chat,
                )  # fmt: skip
                samples |= found
            lines, differs = compare(result.documents, samples)
            wrong |= differs
            print(
                "\n".join([f"{'chat template' if chat else 'plain prompts'}, {asked.shots} shots", *lines]), flush=True
            )
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
