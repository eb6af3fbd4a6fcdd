"""Published scores of the same models, and why tools differ on the same set. Plain data and a lookup."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_kit.evaluation.interface import EvaluatedEngine
from ascend_kit.files import Table
from ascend_kit.params import Experiment

Row = dict[str, Any]


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
