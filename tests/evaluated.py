"""How the tests evaluate a tiny model on small sets."""

from __future__ import annotations

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
