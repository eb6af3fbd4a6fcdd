"""What the scores of an evaluation may mean: alarms, cautions, and published figures of the same model.

Knows rows and names only; computes nothing on the model. The texts of findings stand in the catalogue.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from ascend_kit.evaluation.datasets import MULTIPLE_CHOICE_GROUP
from ascend_kit.evaluation.interface import EvaluatedEngine
from ascend_kit.evaluation.tasks import LocalTask
from ascend_kit.files import Table
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
        asked = [task for task in tasks if task.output_type != "loglikelihood_rolling"]
        for name in sorted({task.set_name for task in asked if not task.num_fewshot}):
            yield say("evaluation.zero_shots", "caution", set=name, shots=experiment.eval_fewshot)


def _coverage(scores: Iterable[Row]) -> Iterator[Finding]:
    groups = [row for row in scores if row["kind"] == "group" and row["task"] in WHOLE_SETS and row["metric"] == "acc"]
    parts = [
        f"{row['task']} {row['num_tasks']}/{row['num_packaged_tasks']}"
        for row in groups
        if row["num_tasks"] < row["num_packaged_tasks"]
    ]
    if parts:
        yield say("evaluation.partial_copies", "caution", parts=", ".join(parts))


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
            key = "evaluation.cut_answers_agieval" if name == "agieval" else "evaluation.cut_answers"
            yield say(key, "caution", task=task, cut=count, total=len(reasons), group=MULTIPLE_CHOICE_GROUP)


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


# --- published scores -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A published score in percent, shown only for this model, these shots, this prompt form and all documents.

    Layers and hidden size are those of the model's config.json; they keep a renamed small model from matching.
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
    metric: str = "acc"


QWEN3_REPORT = "Qwen3 technical report, table 6"
ACCURACY_REPORT = "vllm-ascend accuracy report, Atlas A2, commit "
GSM8K_REPORT = ACCURACY_REPORT + "b57fa65aac"
ACCURACY_TESTS = "vllm-ascend, tests/e2e/models/configs"
QWEN25_7B, QWEN3_8B = (28, 3584), (36, 4096)
MMLU, CEVAL, GSM8K = ("mmlu", 14042), ("ceval-valid", 1346), ("gsm8k", 1319)
FLEXIBLE, STRICT = "exact_match,flexible-extract", "exact_match,strict-match"
PUBLISHED = (
    Published("qwen2.5-7b", *QWEN25_7B, *MMLU, 74.16, None, False, QWEN3_REPORT),
    Published("qwen3-8b-base", *QWEN3_8B, *MMLU, 76.89, None, False, QWEN3_REPORT),
    Published("qwen2.5-7b-instruct", *QWEN25_7B, *MMLU, 73.58, 0.36, True, ACCURACY_REPORT + "e29e39a917"),
    Published("qwen2.5-7b-instruct", *QWEN25_7B, *CEVAL, 80.09, 1.05, True, ACCURACY_REPORT + "e29e39a917"),
    Published("qwen3-8b-base", *QWEN3_8B, *CEVAL, 81.87, 1.02, True, ACCURACY_REPORT + "b57fa65aac"),
    Published("qwen2.5-7b-instruct", *QWEN25_7B, *GSM8K, 73.54, None, True, GSM8K_REPORT, 5, FLEXIBLE),
    Published("qwen3-8b-base", *QWEN3_8B, *GSM8K, 83.47, None, True, GSM8K_REPORT, 5, FLEXIBLE),
    Published("qwen3-8b-base", *QWEN3_8B, *GSM8K, 82.71, None, True, ACCURACY_REPORT + "34179055a4", 5, STRICT),
    Published("qwen3-8b", *QWEN3_8B, *GSM8K, 81.0, None, True, ACCURACY_TESTS, 5, FLEXIBLE),
    Published("qwen3-8b", *QWEN3_8B, *GSM8K, 76.5, None, True, ACCURACY_TESTS, 5, STRICT),
    Published("qwen3-8b-w8a8", *QWEN3_8B, *GSM8K, 82.0, None, True, ACCURACY_TESTS, 5, FLEXIBLE),
    Published("qwen3-8b-w8a8", *QWEN3_8B, *GSM8K, 80.0, None, True, ACCURACY_TESTS, 5, STRICT),
)
# Set, what differs, how much it made, where it is told.
REASONS = (
    ("gsm8k", "lm-eval asks 5 shots and extracts by a pattern; Qwen reports 4 shots with reasoning",
     "Qwen3-8B-Base 89.84 against 83", "Qwen3 technical report, section 3.3; vllm-ascend accuracy report"),
    ("gsm8k", "strict-match wants `#### 7`, flexible-extract takes the last number",
     "Qwen3-8B 76.5 strict, 81 flexible", "lm-eval, tasks/gsm8k"),
    ("gsm8k", "an endpoint renders the template itself, with other stops than in-process",
     "Qwen2.5-0.5B-Instruct 32.2 against 34.1 flexible", "vllm-ascend, using_lm_eval.md"),
    ("mmlu, ceval", "shots: evalscope 5; OpenCompass, AISBench 0 with reasoning; lm-eval 0 unless asked, here 5",
     "several points", "defaults of the tools"),
    ("cmmlu, ifeval, gpqa", "shots: evalscope 0, OpenCompass 0 with reasoning", "several points",
     "defaults of the tools"),
    ("gpqa", "few-shot template and strict-match pattern contradict each other in lm-eval",
     "0.0 strict, 54.6 flexible", "lm-evaluation-harness issue 3404"),
    ("ifeval", "graded with the thinking text or without", "Qwen3-1.7B 28.4 with, 58.8 without",
     "lm-evaluation-harness pull request 3240"),
    ("ifeval", "answers cut at the tool's limit of new tokens", "69.3 over all, 95.6 of those that ended",
     "olmo-eval issue 399"),
    ("generative sets", "stop strings that match inside the thought", "GSM8K of 50: 66 to 84, 98 without them",
     "vllm issues 52393 and 53066"),
    ("multiple choice", "the server gives no log-probabilities of prompts: scores at chance without an error",
     "C-Eval 23.0 instead of 80.0", "vllm-ascend issue 1043"),
    ("agieval", "lm-eval's group mean holds generative tasks with 32 new tokens; see agieval_multiple_choice",
     "depends on the model", "lm-eval, tasks/agieval"),
    ("wikitext", "word perplexity (lm-eval) is not the token perplexity of papers", "8.71 against 5.47 for one model",
     "lm-evaluation-harness issue 2301"),
)  # fmt: skip


def published(experiment: Experiment, engine: EvaluatedEngine, scores: Iterable[Row]) -> list[Row]:
    """Our score beside the published one, in percent, where model and conditions are the same."""
    names = {_model_key(experiment.model_name), _model_key(Path(experiment.input_model).name)}
    shape = (engine.config.num_layers, engine.config.hidden_size)
    ours = {
        (row["task"], row["metric"], row["n"], row["num_fewshot"]): row
        for row in scores
        if row["status"] == "ok" and row["stderr"] is not None
    }
    return [
        _beside(item, 100 * row["value"], 100 * row["stderr"])
        for item in PUBLISHED
        if item.model in names
        and shape == (item.num_layers, item.hidden_size)
        and experiment.eval_chat_template == item.uses_chat
        and (row := ours.get((item.group, item.metric, item.num_documents, item.num_fewshot)))
    ]


def reasons(sets: Iterable[str]) -> Table:
    """Why other tools show other scores on these sets; all that is known of them, a line each."""
    import pandas

    names = ["set", "what differs", "how much", "source"]
    table = pandas.DataFrame(REASONS, columns=names)
    asked = [*sets, "generative sets", "multiple choice"]
    return table[table["set"].map(lambda entry: any(name in entry for name in asked))]


def _beside(item: Published, percent: float, stderr: float) -> Row:
    form = "chat template, multi-turn shots" if item.uses_chat else "plain prompt"
    return {
        "group": item.group,
        "metric": item.metric,
        "ours_percent": percent,
        "ours_stderr_points": stderr,
        "published_percent": item.score,
        "published_stderr_points": item.stderr,
        "difference_points": percent - item.score,
        "conditions": f"{item.num_fewshot}-shot, {form}",
        "source": item.source,
    }


def _model_key(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.lower())
