"""What the scores of an evaluation may mean: alarms, cautions, and published figures of the same model.

Knows rows and names only; computes nothing on the model. The texts stand in the catalogue.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
