"""Run folders as a comparison reads them, made without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ascend_kit.evaluation.compare import Run, compare_accuracy
from ascend_kit.evaluation.tradeoff import Comparison
from ascend_kit.identity import Identity
from ascend_kit.params import build_experiment
from ascend_kit.results import RunFolder


def make_run(
    root: Path,
    name: str,
    correct: dict[str, list[int]],
    *,
    rates: Sequence[float] = (),
    asked: dict[str, Any] | None = None,
    **changes: Any,
) -> Run:
    """A run with documents (set -> right or wrong) and one sweep point, one row per rate.

    `asked` replaces parts of the identity under which the documents were answered.
    """
    experiment = build_experiment({"experiment": "e", "run": name, "output_root": str(root), **changes})
    with RunFolder.open(experiment, "05_evaluate") as folder:
        for suite, values in correct.items():
            add_task(folder, suite, [{"acc": float(value)} for value in values], **(asked or {}))
        for repeat, rate in enumerate(rates):
            folder.append("rows", sweep_row(rate, repeat))
    return Run(folder)


def add_task(folder: RunFolder, suite: str, values: list[dict[str, Any]], metric: str = "acc", **parts: Any) -> None:
    """A finished task with a document per entry of `values`, and its identity among those asked for."""
    task = {"version": 1, "num_fewshot": 5, "chat_template": None, **parts.pop("task", {})}
    identity = Identity(**{"weights": folder.path.name, "data": "d", "task": task, **parts})
    head = {"task": f"{suite}_x", "set": suite}
    documents = [
        {**head, "doc_id": doc, "doc_hash": f"h{doc}", "prompt_hash": f"p{doc}", **row}
        for doc, row in enumerate(values)
    ]
    score = {**head, "kind": "task", "metric": metric, "value": 0.5, "n": len(values), "conditions": "c"}
    folder.append_all("documents", documents, identity)
    folder.append("scores", score, identity)
    asked = (folder.read_json("evaluation") or {}).get("identities", {})
    folder.write_json("evaluation", {"identities": {**asked, f"{suite}_x": identity.id}})


def sweep_row(rate: float, /, repeat: int = 0, concurrency: int = 4, **changes) -> dict:
    return {
        "backend": "ascend_kit",
        "concurrency": concurrency,
        "prompt_len": 64,
        "output_len": 32,
        "repeat": repeat,
        "point_id": f"{concurrency}-{repeat}",
        "output_tokens_per_s": rate,
        "tpot_p50_ms": 1000 / rate,
        **changes,
    }


def answers(n: int, wrong: int = 0, flipped: int = 0) -> list[int]:
    """n answers, every third wrong; then `wrong` right ones made wrong and `flipped` wrong ones right."""
    values = [int(i % 3 != 0) for i in range(n)]
    for i in [i for i, value in enumerate(values) if value][:wrong]:
        values[i] = 0
    for i in [i for i in range(0, n, 3)][:flipped]:
        values[i] = 1
    return values


def by_set(baseline: Run, candidate: Run, **options: Any) -> dict[str, dict[str, Any]]:
    return {row["set"]: row for row in compare_accuracy(baseline, candidate, **options)}


def table_of(runs: Sequence[Run], **options: Any) -> dict[str, dict[str, Any]]:
    return {row["run"]: row for row in Comparison(runs, **options).table.to_dict("records")}
