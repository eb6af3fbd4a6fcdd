"""How the tests evaluate a tiny model on small sets."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from ascend_kit.evaluation.datasets import SETS
from ascend_kit.evaluation.harness import evaluate
from ascend_kit.identity import Identity
from ascend_kit.params import Experiment, build_experiment
from ascend_kit.results import RunFolder

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MAX_LENGTH = 2048
SUMS = [(12, 7), (3, 9), (40, 2), (8, 8), (5, 6), (21, 4)]


def experiment_for(data: Path, out: Path, **changes) -> Experiment:
    values = {
        "experiment": "e",
        "output_root": str(out),
        "dataset_path": str(data),
        "precision": "fp32",
        "eval_max_seq_length": MAX_LENGTH,
        "eval_datasets": list(SETS),
        **changes,
    }
    return build_experiment(values)


def run(engine, experiment: Experiment, **options):
    with RunFolder.open(experiment, "05_evaluate") as folder:
        return evaluate(engine, experiment, folder, **options), folder


def counting(engine):
    """The engine behind a counter of scored pairs."""
    return SimpleNamespace(
        tokenizer=engine.tokenizer,
        config=engine.config,
        max_seq_length=engine.max_seq_length,
        device=engine.device,
        identity=Identity(weights="w", engine={"precision": "fp32"}, versions={"torch": "2"}),
        pairs=0,
        generate=engine.generate,
        score=engine.score,
        stats=engine.stats,
    )


def scores_of(logprob):
    """A stand-in for `score` that gives the pair at place i the log-probability `logprob(i)`."""

    def score(pairs, *, on_score, on_progress):
        found = [SimpleNamespace(logprob=logprob(i), is_greedy=False) for i in range(len(pairs))]
        for place, one in enumerate(found):
            on_score(place, one)
        on_progress(len(found), len(found))
        return found

    return score


def task_experiment(data: Path | None, out: Path, **changes) -> Experiment:
    values = {
        "experiment": "e", "output_root": str(out), "input_model": "/models/own", "precision": "fp32",
        "dataset_path": None if data is None else str(data), "eval_max_seq_length": 1024, **changes,
    }  # fmt: skip
    return build_experiment(values)


def write_gsm8k(root: Path) -> Path:
    """A folder with a local copy of GSM8K: questions of our own in its columns."""
    rows = [{"question": f"What is {a} + {b}?", "answer": f"It is {a + b}.\n#### {a + b}"} for a, b in SUMS]
    for split in ("train", "test"):
        path = root / "gsm8k" / "main" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def stand_in(engine, *, answer=None, score=None):
    """The engine's tokenizer and limits, with answers of our own: `answer(prompt, sampling)` -> text, finish reason."""

    def generate(prompts, params, *, on_progress, on_output=None):
        outputs = []
        for index, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
            text, reason = answer(engine.tokenizer.decode(prompt), sampling)
            ids = engine.tokenizer.encode(text)
            outputs.append(SimpleNamespace(index=index, token_ids=ids, finish_reason=reason, error=None))
            if on_output:
                on_output(outputs[-1])
        on_progress(len(outputs), len(outputs))
        return outputs

    return SimpleNamespace(
        tokenizer=engine.tokenizer, config=engine.config, max_seq_length=2048, device=engine.device,
        identity=Identity(weights="w", engine={"precision": "fp32"}), stats=lambda: {}, generate=generate, score=score,
    )  # fmt: skip
