"""Batch inference: every prompt of a file answered, answers and request timelines kept, resumable.

Answers go to the table `answers` as they finish and, once all are there, into one JSON file in prompt order.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.files import to_json, write_atomic
from ascend_kit.measure.metrics import RequestRecord, e2e_s, record_from_output, summarize, tpot_s, ttft_s
from ascend_kit.prompts import Prompt, PromptsError, read_prompts
from ascend_kit.results import RunFolder

if TYPE_CHECKING:
    import pandas

    from ascend_kit.engine.engine import AscendInferEngine
    from ascend_kit.engine.sequence import RequestOutput, SamplingParams
    from ascend_kit.params import Experiment

Progress = Callable[[int, int, str], None]
__all__ = ["BatchResult", "PromptsError", "load_answers", "load_metrics", "read_prompts", "run_batch"]
TABLE = "answers"
KEY = ("index", "prompt")


@dataclass(frozen=True)
class BatchResult:
    """Answers, one row per prompt in prompt order, and the JSON file that holds them."""

    answers: pandas.DataFrame
    path: Path


def run_batch(
    engine: AscendInferEngine, experiment: Experiment, folder: RunFolder, *, on_progress: Progress | None = None
) -> BatchResult:
    """Answer every prompt of `prompts_file` that has no answer yet, `concurrency` requests in flight.

    A prompt that the engine refuses becomes a failed row and the others go on. The JSON file (`output_path`,
    or generations.json in the run folder) is written once every prompt was tried.
    """
    prompts = read_prompts(experiment.prompts_file)
    folder.begin(experiment, TABLE, "generations")
    done = folder.done_keys(TABLE, KEY)
    waiting = deque((i, prompt) for i, prompt in enumerate(prompts) if (i, prompt) not in done)
    finished, session = len(prompts) - len(waiting), uuid.uuid4().hex[:8]
    for index, prompt, output in _serve(engine, experiment, waiting):
        record = record_from_output(output)
        folder.append(TABLE, {"session": session, **_row(index, prompt, output, record)})
        finished += 1
        if on_progress:
            on_progress(finished, len(prompts), f"{len(record.token_times_s)} tokens for prompt {index}")
    answers = load_answers(folder)
    path = Path(experiment.output_path) if experiment.output_path else folder.path / "generations.json"
    write_atomic(path, to_json(_for_people(answers), indent=1) + "\n")
    return BatchResult(answers, path)


def load_answers(folder: RunFolder) -> pandas.DataFrame:
    """The newest row of each prompt, in prompt order."""
    rows = folder.load(TABLE)
    if rows.empty:
        return rows
    return rows.drop_duplicates("index", keep="last").sort_values("index").reset_index(drop=True)


def load_metrics(answers: pandas.DataFrame) -> pandas.DataFrame:
    """`summarize` of each session's requests. Clocks of different processes do not compare, so a resumed run
    has one row for each time it was started.
    """
    import pandas

    sessions = answers.groupby("session", sort=False) if len(answers) else []
    rows = [
        {"session": name, **summarize([RequestRecord.from_row(row) for row in group.to_dict("records")])}
        for name, group in sessions
    ]
    return pandas.DataFrame(rows)


def _serve(
    engine: AscendInferEngine, experiment: Experiment, waiting: deque[tuple[int, Prompt]]
) -> Iterator[tuple[int, Prompt, RequestOutput]]:
    """Closed loop: a new request starts when one ends; requests left in flight are cancelled."""
    in_flight: dict[int, tuple[int, Prompt]] = {}
    try:
        while waiting or in_flight:
            while waiting and len(in_flight) < experiment.concurrency:
                index, prompt = waiting.popleft()
                request = engine.add_request(
                    _encode(engine, experiment, prompt),
                    _sampling(experiment, index),
                    arrival_s=time.perf_counter(),
                    is_watched=False,
                )
                in_flight[request] = (index, prompt)
            for output in engine.step():
                if output.index in in_flight:
                    yield *in_flight.pop(output.index), output
    finally:
        for request in in_flight:
            engine.cancel(request)


def _encode(engine: AscendInferEngine, experiment: Experiment, prompt: Prompt) -> str | list[int]:
    if not experiment.chat_template and prompt.messages is None:
        return prompt
    text = engine.tokenizer.apply_chat_template(prompt.as_messages(), tokenize=False, add_generation_prompt=True)
    # The template has its own special tokens: the tokenizer must not add another set.
    return engine.tokenizer.encode(text, add_special_tokens=False)


def _sampling(experiment: Experiment, index: int) -> SamplingParams:
    from ascend_kit.engine.sequence import SamplingParams

    # A seed of its own per prompt: the answer does not depend on what else runs, nor on a resumption.
    return SamplingParams(
        max_new_tokens=experiment.max_new_tokens, temperature=experiment.temperature, top_k=experiment.top_k,
        top_p=experiment.top_p, seed=experiment.seed + index,
    )  # fmt: skip


def _row(index: int, prompt: str, output: RequestOutput, record: RequestRecord) -> dict[str, Any]:
    failed = output.finish_reason == "error"
    return {
        **record.to_row(), "index": index, "prompt": prompt, "text": output.text,
        "ttft_ms": _ms(ttft_s(record)), "tpot_ms": _ms(tpot_s(record)), "e2e_ms": _ms(e2e_s(record)),
        "status": "failed" if failed else "ok", "error": output.error,
    }  # fmt: skip


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _for_people(answers: pandas.DataFrame) -> list[dict[str, Any]]:
    """What the JSON file holds per prompt: the text and how it ended; timelines stay in the table."""
    names = ["index", "prompt", "text", "finish_reason", "num_prompt_tokens", "num_output_tokens", "error"]
    return answers[names].to_dict("records")
