"""Batch inference: every prompt of a file answered, answers and request timelines kept, resumable.

Answers go to the table `answers` as they finish; `batch` holds what was asked for last, and once every prompt was tried
one JSON file holds its answers in the order of the prompts. An answer belongs to the text of its prompt and to the
identity of what gave it: prompts that are gone, and answers of other weights, stay in the table and take part in
nothing.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.engine.sequence import RequestOutput, SamplingParams, Timeline
from ascend_kit.engine.text import render_chat
from ascend_kit.files import hash_value, to_json, write_atomic
from ascend_kit.measure.answers import TABLE, answers_file, load_answers
from ascend_kit.measure.metrics import RequestRecord, e2e_s, in_ms, record_from_output, tpot_s, ttft_s
from ascend_kit.params import Experiment
from ascend_kit.prompts import Prompt, read_prompts
from ascend_kit.results import RunFolder

if TYPE_CHECKING:
    import pandas

Progress = Callable[[int, int, str], None]


def run_batch(
    engine: AscendInferEngine, experiment: Experiment, folder: RunFolder, *, on_progress: Progress | None = None
) -> pandas.DataFrame:
    """Answer every prompt of `prompts_file` that has no answer yet, `concurrency` requests in flight; a row per prompt,
    in prompt order.

    The engine is loaded if it is not. A prompt that cannot be encoded, or that the engine refuses, becomes a failed row
    and the others go on. The JSON file (`output_path`, or generations.json in the run folder) is written once every
    prompt was tried. Empty answers are an alarm of the stage.
    """
    prompts = read_prompts(experiment.needed("prompts_file"))
    sampling = _sampling(experiment, engine.load_model().model_path)
    if any(_needs_template(experiment, prompt) for prompt in prompts):
        engine.render_chat("", thinking=experiment.thinking)  # ValueError where the template cannot do it
    identity = engine.identity.with_parts(task=_task(experiment, sampling))
    hashes = [hash_value(prompt.messages or str(prompt)) for prompt in prompts]
    with folder.working(experiment, TABLE, "batch", "generations", identity=identity):
        folder.write_json("batch", {
            "identity": identity.to_row(), "prompts": hashes, "is_sampled": sampling.temperature > 0,
        })  # fmt: skip
        known = load_answers(folder)
        done = set(known["index"][known["status"] == "ok"]) if len(known) else set()
        waiting = deque((i, prompt) for i, prompt in enumerate(prompts) if i not in done)
        finished, session = len(prompts) - len(waiting), uuid.uuid4().hex[:8]
        for index, prompt, output in _serve(engine, experiment, sampling, waiting):
            record = record_from_output(output)
            row = _row(index, prompt, output, record)
            head = {"session": session, "prompt_hash": hashes[index], "plain_ops": experiment.plain_operators}
            folder.append(TABLE, head | row, identity)
            finished += 1
            if on_progress:
                on_progress(finished, len(prompts), f"{len(record.token_times_s)} tokens for prompt {index}")
        answers = load_answers(folder)
        told = ["index", "prompt", "text", "finish_reason", "num_prompt_tokens", "num_output_tokens", "error"]
        write_atomic(answers_file(experiment), to_json(answers.loc[:, told].to_dict("records"), indent=1) + "\n")
        unused = bool(engine.tokenizer.chat_template) and not experiment.chat_template
        _raise_alarms(answers, folder, "; the tokenizer has a chat template: try chat_template: true" if unused else "")
    return answers


def _serve(
    engine: AscendInferEngine, experiment: Experiment, sampling: SamplingParams, waiting: deque[tuple[int, Prompt]]
) -> Iterator[tuple[int, Prompt, RequestOutput]]:
    """Closed loop: a new request starts when one ends; requests left in flight are cancelled."""
    in_flight: dict[int, tuple[int, Prompt]] = {}
    try:
        while waiting or in_flight:
            while waiting and len(in_flight) < experiment.concurrency:
                index, prompt = waiting.popleft()
                arrival = time.perf_counter()
                # A seed of its own per prompt: the answer does not depend on what else runs, nor on a resumption.
                own = replace(sampling, seed=experiment.seed + index)
                try:
                    text = _encode(engine, experiment, prompt)
                    request = engine.add_request(text, own, arrival_s=arrival, is_watched=False)
                except (TypeError, ValueError) as error:  # half an emoji, a template that takes no system message
                    yield index, prompt, _refused(index, arrival, error)
                    continue
                in_flight[request] = (index, prompt)
            for output in engine.step():
                if output.index in in_flight:
                    yield *in_flight.pop(output.index), output
    finally:
        for request in in_flight:
            engine.cancel(request)


def _encode(engine: AscendInferEngine, experiment: Experiment, prompt: str) -> str | list[int]:
    if not _needs_template(experiment, prompt):
        return prompt
    messages = getattr(prompt, "messages", None)
    text = render_chat(engine.tokenizer, messages or str(prompt), thinking=experiment.thinking)
    # The template has its own special tokens: the tokenizer must not add another set.
    return engine.tokenizer.encode(text, add_special_tokens=False)


def _needs_template(experiment: Experiment, prompt: str) -> bool:
    return experiment.chat_template or getattr(prompt, "messages", None) is not None


def _sampling(experiment: Experiment, model_path: str) -> SamplingParams:
    """How every prompt is decoded, but for its seed. `sampling: model` fills in what is at its default."""
    names = {item.name for item in fields(SamplingParams)} & Experiment.model_fields.keys() - {"seed"}
    values = {name: getattr(experiment, name) for name in names}
    if experiment.sampling == "given":
        return SamplingParams(**values)
    known = Experiment.model_fields
    given = {name: value for name, value in values.items() if value != known[name].default or name == "max_new_tokens"}
    return SamplingParams.from_model(model_path, **given)


def _task(experiment: Experiment, sampling: SamplingParams) -> dict[str, Any]:
    """What is asked of the engine besides the prompts: the part of an answer's identity beside the engine's own."""
    chat = {"chat_template": experiment.chat_template, "thinking": bool(experiment.thinking)}
    return {**vars(sampling), **chat, "seed": experiment.seed if sampling.temperature > 0 else None}


def _refused(index: int, arrival_s: float, error: Exception) -> RequestOutput:
    """The output of a prompt that never reached the engine."""
    timeline = Timeline(arrival_s, finished_s=time.perf_counter())
    return RequestOutput(index, [], [], "", "error", f"{type(error).__name__}: {error}", None, timeline)


def _raise_alarms(answers: pandas.DataFrame, folder: RunFolder, remedy: str) -> None:
    """Tell the stage of empty answers, with what may help against them, and of logits that are no numbers."""
    faults = {
        "empty_answers": ("are empty", (answers["status"] == "ok") & (answers["text"].str.strip() == "")),
        "not_finite": ("ended with logits that are no numbers", answers["error"].fillna("").str.contains("not finite")),
    }
    for key, (text, is_bad) in faults.items():
        bad = list(answers["index"][is_bad])
        if bad:
            places = ", ".join(map(str, bad[:5]))
            said = f"{len(bad)} of {len(answers)} answers {text} (prompts {places})"
            folder.alarm(key, said + (remedy if key == "empty_answers" else ""), count=len(bad))


def _row(index: int, prompt: str, output: RequestOutput, record: RequestRecord) -> dict[str, Any]:
    return {
        **record.to_row(), "index": index, "prompt": prompt, "text": output.text,
        "ttft_ms": in_ms(ttft_s(record)), "tpot_ms": in_ms(tpot_s(record)), "e2e_ms": in_ms(e2e_s(record)),
        "status": "failed" if output.finish_reason == "error" else "ok", "error": output.error,
    }  # fmt: skip
