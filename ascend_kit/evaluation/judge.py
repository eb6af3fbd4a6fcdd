"""What the scores of an evaluation may mean: alarms, cautions, and published figures of the same model.

Knows rows and names only; computes nothing on the model. The texts stand in the catalogue.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from string import ascii_uppercase
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
CONSTANT_SHARE = 0.5  # of documents whose choices are all equal: that comes from constant logits, not from rounding
CUT_SHARE = 0.01
FEW_DOCUMENTS = 10  # below this, answers may be alike by chance
ENDED_AT_ONCE = 5  # answers that all end at their first token and are all wrong: the demo's AGIEval asks seven
BLIND_SHARE = 0.95  # of the loss of a model that holds every token of its vocabulary equally likely
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
    choices: dict[str, list[Row]] = {}
    for name in dict.fromkeys(task.set_name for task in tasks):
        rows = [row for row in documents if row["set"] == name]
        found += _of_set(name, rows, experiment.eval_max_seq_length)
        found += _running_text(name, [row for row in rows if row.get("logprob") is not None], engine.config.vocab_size)
        written = {task.task for task in tasks if task.output_type == "generate_until" and task.set_name == name}
        found += _never_right(name, scores, [row for row in rows if row["task"] in written])
        choices[name] = [row for row in rows if row.get("choice_logprobs")]
    small = {name: rows for name, rows in choices.items() if 0 < len(rows) < ENOUGH_DOCUMENTS}
    together = [row for rows in small.values() for row in rows]
    if len(small) > 1 and len(together) >= ENOUGH_DOCUMENTS:  # each is too small to judge, all of them are not
        found += _choices(", ".join(small), together)
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
        if str(row["error"]).startswith("OverflowError"):  # lm-eval's exp() of a loss no model should have
            yield say("evaluation.not_finite", "alarm", set=row["task"], what="the perplexity")


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
    several = [row["choice_logprobs"] for row in choice if len(row["choice_logprobs"]) > 1]
    tied, equal = sum(map(_is_tied, several)), sum(len(set(values)) == 1 for values in several)
    if len(several) >= FEW_DOCUMENTS and equal >= CONSTANT_SHARE * len(several):
        yield say("evaluation.tied", "alarm", set=name, share=equal / len(several))
    elif len(several) >= ENOUGH_DOCUMENTS and tied >= TIED_SHARE * len(several):
        yield say("evaluation.tied", "caution", set=name, share=tied / len(several))
    cut = sum(bool(row.get("cut_tokens")) for row in documents)
    if cut:
        level = "alarm" if cut > CUT_SHARE * len(documents) else "caution"
        yield say("evaluation.cut_prompts", level, set=name, cut=cut, total=len(documents), max_length=max_length)
    yield from _texts(name, [row for row in documents if row.get("answer") is not None])
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
        yield say("evaluation.one_choice", "alarm", set=name, choice=letter(favourite), share=count / total)


def _texts(name: str, documents: Sequence[Row]) -> Iterator[Finding]:
    """Signs that written answers say nothing: empty, or the same whatever was asked."""
    answers = [answer for row in documents for answer in row.get("answers") or [row["answer"]]]
    empty, total = sum(not answer.strip() for answer in answers), len(answers)
    if empty:
        level = "alarm" if empty > CUT_SHARE * total else "caution"
        yield say("evaluation.empty_answers", level, set=name, empty=empty, total=total)
    if total < FEW_DOCUMENTS or empty == total:
        return
    answer, count = Counter(answers).most_common(1)[0]
    expected = Counter(str(row.get("target")) for row in documents).most_common(1)[0][1] / len(documents)
    if count >= SAME_CHOICE_SHARE * total and expected < SAME_CHOICE_SHARE:
        yield say("evaluation.same_answer", "alarm", set=name, share=count / total, total=total, answer=answer[:40])


def _never_right(name: str, scores: Iterable[Row], documents: Sequence[Row]) -> Iterator[Finding]:
    """Written answers none of which counts under any metric: what a broken model writes, and a wrong template gives."""
    tasks, total = {row["task"] for row in documents}, len(documents)
    values = [
        row["value"]
        for row in scores
        if row["kind"] == "task" and row["task"] in tasks and row["status"] == "ok" and row["unit"] == "fraction"
    ]
    at_once = all(row["finish_reason"] == "stop" and row["num_output_tokens"] in (0, 1) for row in documents)
    if values and total >= (ENDED_AT_ONCE if at_once else ENOUGH_DOCUMENTS) and not any(values):
        yield say("evaluation.never_right", "alarm", set=name, total=total)


def _running_text(name: str, documents: Sequence[Row], vocab_size: int) -> Iterator[Finding]:
    """Signs that running text is predicted blindly, or that its log-probabilities were made up."""
    texts = {row["doc_hash"]: row for row in documents if row.get("num_prompt_tokens")}  # pages may be repeated
    counts = [(row["logprob"], row["num_prompt_tokens"]) for row in texts.values()]
    means = [logprob / count for logprob, count in counts]
    if not means:
        return
    if max(means) >= 0 or (len(means) > 1 and max(means) - min(means) < 1e-6):
        yield say("evaluation.constant", "alarm", set=name, value=means[0], total=len(means))
    loss = -math.fsum(logprob for logprob, _ in counts) / sum(count for _, count in counts)
    if loss >= BLIND_SHARE * math.log(vocab_size):
        yield say("evaluation.blind", "alarm", set=name, loss=loss, blind=math.log(vocab_size))


def letter(place: int) -> str:
    """How the choice at a place is called: A, B, C, and numbers where the letters end."""
    return ascii_uppercase[place] if place < len(ascii_uppercase) else str(place + 1)


def _is_tied(logprobs: list[float]) -> bool:
    best = sorted(logprobs)[-2:]
    return len(best) == 2 and best[0] == best[1]


def template_of(tokenizer: Tokenizer) -> str:
    """The text of the chat template, of all where there are several; empty where there is none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else " ".join(map(str, dict(template).values()))
