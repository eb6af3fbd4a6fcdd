"""What the scores of an evaluation may mean: alarms, cautions, and published figures of the same model.

Knows rows and names only; computes nothing on the model. The texts stand in the catalogue.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.evaluation.datasets import MULTIPLE_CHOICE_GROUP, LocalTask
from ascend_kit.evaluation.interface import EvaluatedEngine
from ascend_kit.messages import Finding, say
from ascend_kit.params import Experiment

if TYPE_CHECKING:
    from ascend_kit.engine.text import Tokenizer

Row = dict[str, Any]
ENOUGH_DOCUMENTS = 40  # below this, chance and skill overlap anyway
CHANCE_Z = 2.0  # standard errors above guessing that a working model must reach
SAME_CHOICE_SHARE = 0.9
TIED_SHARE = 0.05
CUT_SHARE = 0.01
WHOLE_SETS = ("mmlu", "ceval-valid", "agieval")


@dataclass(frozen=True)
class Published:
    """A published score in percent, shown only for this model, these shots, this prompt form and all
    documents.

    Layers and hidden size are those of the model's config.json; they keep a renamed small model from
    matching.
    """

    model: str
    num_layers: int
    hidden_size: int
    group: str
    num_documents: int
    score: float
    stderr: float | None
    uses_chat: bool
    source: str
    num_fewshot: int = 5


QWEN3_REPORT = "Qwen3 technical report, table 6"
ACCURACY_REPORT = "vllm-ascend accuracy report, Atlas A2, commit "
QWEN25_7B, QWEN3_8B = (28, 3584), (36, 4096)
MMLU, CEVAL = ("mmlu", 14042), ("ceval-valid", 1346)
PUBLISHED = (
    Published("qwen2.5-7b", *QWEN25_7B, *MMLU, 74.16, None, False, QWEN3_REPORT),
    Published("qwen3-8b-base", *QWEN3_8B, *MMLU, 76.89, None, False, QWEN3_REPORT),
    Published("qwen2.5-7b-instruct", *QWEN25_7B, *MMLU, 73.58, 0.36, True, ACCURACY_REPORT + "e29e39a917"),
    Published("qwen2.5-7b-instruct", *QWEN25_7B, *CEVAL, 80.09, 1.05, True, ACCURACY_REPORT + "e29e39a917"),
    Published("qwen3-8b-base", *QWEN3_8B, *CEVAL, 81.87, 1.02, True, ACCURACY_REPORT + "b57fa65aac"),
)


def flags(
    experiment: Experiment,
    engine: EvaluatedEngine,
    tasks: Sequence[LocalTask],
    scores: Sequence[Row],
    documents: Sequence[Row],
) -> list[Finding]:
    """What a reader of the scores must know; alarms are findings that make the scores worthless."""
    found = [*_failures(scores), *_settings(experiment, tasks), *_coverage(scores), *_thinking(experiment, engine)]
    for name in dict.fromkeys(task.set_name for task in tasks):
        found += _of_set(name, [row for row in documents if row["set"] == name], experiment.eval_max_seq_length)
    return found


def published(experiment: Experiment, engine: EvaluatedEngine, scores: Iterable[Row]) -> list[Row]:
    """Our score beside the published one, in percent, where model and conditions are the same."""
    names = {_model_key(experiment.model_name), _model_key(Path(experiment.input_model).name)}
    shape = (engine.config.num_layers, engine.config.hidden_size)
    ours = {
        (row["task"], row["n"], row["num_fewshot"]): row
        for row in scores
        if row["metric"] == "acc" and row["status"] == "ok"
    }
    return [
        _beside(item, 100 * row["value"], 100 * row["stderr"])
        for item in PUBLISHED
        if item.model in names
        and shape == (item.num_layers, item.hidden_size)
        and experiment.eval_chat_template == item.uses_chat
        and (row := ours.get((item.group, item.num_documents, item.num_fewshot)))
    ]


def _beside(item: Published, percent: float, stderr: float) -> Row:
    form = "chat template, multi-turn shots" if item.uses_chat else "plain prompt"
    return {
        "group": item.group,
        "ours_percent": percent,
        "ours_stderr_points": stderr,
        "published_percent": item.score,
        "published_stderr_points": item.stderr,
        "difference_points": percent - item.score,
        "conditions": f"{item.num_fewshot}-shot, {form}",
        "source": item.source,
    }


def _failures(scores: Iterable[Row]) -> Iterator[Finding]:
    for row in scores:
        if row["kind"] != "task":
            continue
        if row["status"] == "ok":
            if row["value"] is None or not math.isfinite(row["value"]):  # NaN stands as null in the file
                yield say("evaluation.not_finite", "alarm", set=row["task"], what=f"the {row['metric']}")
            continue
        yield say("evaluation.failed", "caution", task=row["task"], error=str(row["error"]))
        if str(row["error"]).startswith("NotFiniteError"):
            yield say("evaluation.not_finite", "alarm", set=row["task"], what="a log-probability")


def _settings(experiment: Experiment, tasks: Iterable[LocalTask]) -> Iterator[Finding]:
    if experiment.eval_limit:
        yield say("evaluation.limited", "caution", limit=experiment.eval_limit)
    if experiment.eval_fewshot:
        for name in sorted({task.set_name for task in tasks if not task.num_fewshot} - {"wikitext"}):
            yield say("evaluation.zero_shots", "caution", set=name, shots=experiment.eval_fewshot)


def _coverage(scores: Iterable[Row]) -> Iterator[Finding]:
    for row in scores:
        if row["kind"] == "group" and row["task"] in WHOLE_SETS and row["metric"] == "acc":
            here, whole = row["num_tasks"], row["num_packaged_tasks"]
            if here < whole:
                yield say("evaluation.part_of_tasks", "caution", group=row["task"], here=here, whole=whole)


def _thinking(experiment: Experiment, engine: EvaluatedEngine) -> Iterator[Finding]:
    template, uses_chat = template_of(engine.tokenizer), experiment.eval_chat_template
    if "enable_thinking" in template:
        how = "plain" if not uses_chat else "on" if experiment.thinking else "off"
        yield say(f"evaluation.thinking_{how}", "caution")
    elif "<think>" in template and uses_chat:
        yield say("evaluation.thinking_always", "caution")


def _of_set(name: str, documents: Sequence[Row], max_length: int) -> Iterator[Finding]:
    choice = [row for row in documents if row.get("choice_logprobs")]
    if len(choice) >= ENOUGH_DOCUMENTS:
        yield from _choices(name, choice)
    cut = sum(bool(row.get("cut_tokens")) for row in documents)
    if cut:
        level = "alarm" if cut > CUT_SHARE * len(documents) else "caution"
        yield say("evaluation.cut_prompts", level, set=name, cut=cut, total=len(documents), max_length=max_length)
    empty = sum(row.get("answer") is not None and not row["answer"].strip() for row in documents)
    if empty:
        yield say("evaluation.empty_answers", "alarm", set=name, empty=empty)
    ends: dict[str, list[str]] = {}
    for row in documents:
        if row.get("finish_reason"):
            ends.setdefault(row["task"], []).append(row["finish_reason"])
    for task, reasons in ends.items():
        if (count := reasons.count("length")) > 0:
            yield say("evaluation.cut_answers", "caution", task=task, cut=count, total=len(reasons),
                      group=MULTIPLE_CHOICE_GROUP)  # fmt: skip


def _choices(name: str, choice: Sequence[Row]) -> Iterator[Finding]:
    """Signs that log-probabilities are broken although text may read well."""
    total = len(choice)
    accuracy = sum(row["acc"] for row in choice) / total
    chance = sum(1 / len(row["choice_logprobs"]) for row in choice) / total
    if accuracy < chance + CHANCE_Z * math.sqrt(chance * (1 - chance) / total):
        yield say("evaluation.chance", "alarm", set=name, accuracy=accuracy, chance=chance, total=total)
    favourite, count = Counter(row["prediction"] for row in choice).most_common(1)[0]
    if count >= SAME_CHOICE_SHARE * total:
        yield say("evaluation.one_choice", "alarm", set=name, choice="ABCDEFG"[favourite], share=count / total)
    tied = sum(_is_tied(row["choice_logprobs"]) for row in choice) / total
    if tied >= TIED_SHARE:
        yield say("evaluation.tied", "caution", set=name, share=tied)


def _is_tied(logprobs: list[float]) -> bool:
    best = sorted(logprobs)[-2:]
    return len(best) == 2 and best[0] == best[1]


def template_of(tokenizer: Tokenizer) -> str:
    """The text of the chat template, of all where there are several; empty where there is none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else " ".join(map(str, dict(template).values()))


def _model_key(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.lower())
