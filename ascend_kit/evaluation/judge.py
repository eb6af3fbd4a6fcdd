"""What the scores of an evaluation may mean: cautions, and published figures of the same model to compare
with.

Knows tables and names only; computes nothing on the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.evaluation.datasets import MULTIPLE_CHOICE_GROUP, LocalTask
from ascend_kit.params import Experiment

if TYPE_CHECKING:
    import pandas

ENOUGH_DOCUMENTS = 40  # below this, chance and skill overlap anyway
CHANCE_Z = 2.0  # standard errors above guessing that a working model must reach
SAME_CHOICE_SHARE = 0.9
TIED_SHARE = 0.05


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


def chat_template_args(tokenizer: Any) -> dict[str, Any]:
    """Arguments for the chat template: thinking off where the template has the switch.

    A model that may reason first would be scored on the probability that it answers without reasoning.
    """
    return {"enable_thinking": False} if "enable_thinking" in _template(tokenizer) else {}


def flags(
    experiment: Experiment,
    engine: Any,
    tasks: Iterable[LocalTask],
    scores: pandas.DataFrame,
    documents: pandas.DataFrame,
    num_truncated: int,
) -> list[str]:
    """Sentences a reader of the scores must know; empty when there is nothing to say."""
    tasks = list(tasks)
    found = [*_failures(scores), *_settings(experiment, tasks), *_coverage(scores)]
    found += _thinking(experiment, engine)
    if num_truncated:
        found.append(
            f"{num_truncated} inputs were longer than {experiment.eval_max_seq_length} tokens and "
            "lost their beginning; raise eval_max_seq_length to score them whole"
        )
    for name in dict.fromkeys(task.set_name for task in tasks):
        if len(documents):
            found += _answers(name, documents[documents["set"] == name])
    return found


def published(experiment: Experiment, engine: Any, scores: pandas.DataFrame) -> list[dict[str, Any]]:
    """Our score beside the published one, in percent, where model and conditions are the same."""
    names = {_model_key(experiment.model_name), _model_key(Path(experiment.input_model).name)}
    shape = (engine.config.num_layers, engine.config.hidden_size)
    known = [
        item
        for item in PUBLISHED
        if item.model in names
        and shape == (item.num_layers, item.hidden_size)
        and experiment.eval_chat_template == item.uses_chat
    ]
    ours = scores[(scores["metric"] == "acc") & (scores["status"] == "ok")]
    rows = []
    for item in known:
        same = ours[
            (ours["task"] == item.group) & (ours["n"] == item.num_documents) & (ours["num_fewshot"] == item.num_fewshot)
        ]
        rows += [_beside(item, 100 * row.value, 100 * row.stderr) for row in same.itertuples()]
    return rows


def _beside(item: Published, percent: float, stderr: float) -> dict[str, Any]:
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


def _failures(scores: pandas.DataFrame) -> list[str]:
    failed = scores[(scores["status"] != "ok") & (scores["kind"] == "task")]
    return [f"{row.task} failed, and its groups have no mean: {row.error}" for row in failed.itertuples()]


def _settings(experiment: Experiment, tasks: list[LocalTask]) -> Iterator[str]:
    if experiment.eval_limit:
        yield (
            f"only the first {experiment.eval_limit} documents of each task were scored (eval_limit): not "
            "comparable with published scores"
        )
    if experiment.eval_fewshot:
        shots = experiment.eval_fewshot
        for name in sorted({task.set_name for task in tasks if not task.num_fewshot} - {"wikitext"}):
            yield f"{name} is scored with 0 shots: eval_fewshot={shots} does not apply to it"


def _coverage(scores: pandas.DataFrame) -> Iterator[str]:
    if not (scores["kind"] == "group").any():
        return
    main = scores[(scores["metric"] == "acc") & scores["task"].isin(["mmlu", "ceval-valid", "agieval"])]
    for row in main.itertuples():
        if row.num_tasks < row.num_packaged_tasks:
            yield (
                f"{row.task}: the local copy holds {row.num_tasks:.0f} of {row.num_packaged_tasks:.0f} "
                "tasks; the mean is not that of the full benchmark"
            )


def _thinking(experiment: Experiment, engine: Any) -> Iterator[str]:
    template, uses_chat = _template(engine.tokenizer), experiment.eval_chat_template
    if "enable_thinking" in template:
        how = "thinking switched off in the chat template" if uses_chat else "plain prompts"
        yield (
            f"this model can think before it answers; it was scored with {how}, so figures published for "
            "thinking mode do not compare"
        )
    elif "<think>" in template and uses_chat:
        yield (
            "this model's chat template always thinks: choices are scored where a thought would begin, "
            "and the scores mean little; set eval_chat_template: false"
        )


def _answers(name: str, documents: pandas.DataFrame) -> Iterator[str]:
    if "choice_logprobs" in documents:
        choice = documents[documents["choice_logprobs"].notna()]
        if len(choice) >= ENOUGH_DOCUMENTS:
            yield from _choices(name, choice)
    if "finish_reason" in documents:
        for task, rows in documents[documents["finish_reason"].notna()].groupby("task"):
            cut = int((rows["finish_reason"] == "length").sum())
            if cut:
                yield (
                    f"{task}: {cut} of {len(rows)} answers were cut at the task's limit of new tokens; "
                    f"the group agieval counts them, {MULTIPLE_CHOICE_GROUP} leaves generative tasks out"
                )


def _choices(name: str, choice: pandas.DataFrame) -> Iterator[str]:
    """Signs that log-probabilities are broken although text may read well."""
    accuracy = float(choice["acc"].mean())
    chance = float((1 / choice["choice_logprobs"].map(len)).mean())
    if accuracy < chance + CHANCE_Z * math.sqrt(chance * (1 - chance) / len(choice)):
        yield (
            f"{name}: {100 * accuracy:.1f} % of {len(choice)} documents is what guessing gives "
            f"({100 * chance:.1f} %). If generated text reads well, the log-probabilities are wrong "
            "(vllm-ascend#1043 saw 23.03 % on C-Eval); if it does not, look at the conversion's parity"
        )
    counts = choice["prediction"].value_counts()
    if counts.iloc[0] >= SAME_CHOICE_SHARE * len(choice):
        share = 100 * counts.iloc[0] / len(choice)
        yield (
            f"{name}: choice {int(counts.index[0]) + 1} was picked for {share:.0f} % of the documents, "
            "whatever the question"
        )
    tied = float(choice["choice_logprobs"].map(_is_tied).mean())
    if tied >= TIED_SHARE:
        yield (
            f"{name}: the two best choices have equal log-probabilities in {100 * tied:.0f} % of the "
            "documents; the arithmetic is too coarse to tell them apart, and the first one wins"
        )


def _is_tied(logprobs: list[float]) -> bool:
    best = sorted(logprobs)[-2:]
    return len(best) == 2 and best[0] == best[1]


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else " ".join(map(str, dict(template).values()))


def _model_key(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.lower())
