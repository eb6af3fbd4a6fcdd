"""One prefill and some decode steps of an engine core under the profiler, after the same steps without it."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, NamedTuple

from ascend_kit.device.profiler import Profile, Profiler
from ascend_kit.engine.sequence import SamplingParams, Sequence

if TYPE_CHECKING:
    from ascend_kit.engine.core import EngineCore

PASSES = ("warm", "plain", "profiled")  # first calls load kernels; the second is what a step takes without a profiler


class Phase(NamedTuple):
    """Steps of one kind: prefill or decode."""

    name: str
    batch: int
    context_len: float  # tokens that a row sees, on average; of a prefill the prompt's length
    steps: int
    step_ms: float  # without the profiler
    profiled_step_ms: float
    profile: Profile


def tokens_needed(prompt_len: int, batch: int, steps: int) -> int:
    """Longest sequence of `profile_core`: those whose prompts come first decode while the others' are computed."""
    return prompt_len + batch + steps + 2


def profile_core(core: EngineCore, prompts: Seq[Seq[int]], steps: int, folder: str) -> list[Phase]:
    """The prefill of one prompt alone, then at least `steps` decode steps of a third of `prompts` together.

    The prompts are of equal length and distinct, so that each of the three passes computes its own. Raw traces go to
    `folder`. ProfileError when the profiler records nothing.
    """
    batch = len(prompts) // len(PASSES)
    found: dict[str, list[Phase]] = {}
    for number, name in enumerate(PASSES):
        part = prompts[number * batch : (number + 1) * batch]
        found[name] = _both_phases(core, part, steps, folder if name == "profiled" else None)
    return [
        phase._replace(step_ms=plain.step_ms) for plain, phase in zip(found["plain"], found["profiled"], strict=True)
    ]


def _both_phases(core: EngineCore, prompts: Seq[Seq[int]], steps: int, folder: str | None) -> list[Phase]:
    """Prefill and decode once, over prompts of their own."""
    now = time.perf_counter()
    sampling = SamplingParams(max_new_tokens=tokens_needed(0, len(prompts), steps), ignore_eos=True)
    sequences = [Sequence(prompt, sampling, arrival_s=now, is_watched=False) for prompt in prompts]
    for sequence in sequences:
        refusal = core.refusal(sequence)
        if refusal is not None:
            raise ValueError(f"the profile's requests cannot run: {refusal}")
    try:
        core.add(sequences[0])
        prefill = _phase(core, folder, "prefill", sequences[:1], lambda: sequences[0].num_output_tokens > 0)
        for sequence in sequences[1:]:
            core.add(sequence)
        while not all(sequence.num_output_tokens for sequence in sequences):
            core.step(_go_on)
        last = core.counts["steps"] + steps
        return [prefill, _phase(core, folder, "decode", sequences, lambda: core.counts["steps"] >= last)]
    finally:
        for sequence in sequences:
            if sequence.id in core.sequences:
                core.finish(sequence, "cancelled")


def _phase(
    core: EngineCore, folder: str | None, name: str, sequences: Seq[Sequence], is_done: Callable[[], bool]
) -> Phase:
    profiler = Profiler(core.device, folder, name) if folder else None
    before, context = core.counts["steps"], sum(one.num_tokens for one in sequences) / len(sequences)
    core.device.synchronize()
    if profiler is not None:
        profiler.start()
    started = time.perf_counter()
    while not is_done():
        core.step(_go_on)
    core.device.synchronize()
    took_s = time.perf_counter() - started
    profile = profiler.stop() if profiler is not None else Profile([], 0.0, "")
    count = core.counts["steps"] - before
    if name == "decode":
        context += count / 2
    step_ms = took_s / count * 1e3
    return Phase(name, len(sequences), context, count, step_ms, step_ms, profile)


def _go_on(sequence: Sequence, token: int) -> None:
    """No answer ends: every step has the whole batch."""
