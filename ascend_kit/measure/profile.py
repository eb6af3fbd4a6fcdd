"""`profile: true`: where the time of a prefill and of a decode step goes, and what bounds it.

`profile_steps` has a row per phase, `profile` a row per operator of a phase, `profile/` the raw traces. A step's time
is that without the profiler, on a CPU that with it: there the operators' own times contain what profiling costs.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from ascend_kit.device.profiler import ProfileError
from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.engine.profile import PASSES, Phase, tokens_needed
from ascend_kit.measure.engines import EngineBackend
from ascend_kit.measure.forecast import Deployment, decode_flops, prefill_flops
from ascend_kit.measure.points import PointForecast
from ascend_kit.measure.sweep import load_ceilings
from ascend_kit.measure.workload import make_requests
from ascend_kit.results import newest_rows

if TYPE_CHECKING:
    from ascend_kit.params import Experiment
    from ascend_kit.results import RunFolder

TABLES = ("profile_steps", "profile")
STEPS = 8
NEAR_A_CEILING = 1 / 3  # of the operators' time: below it neither memory nor products explain them
KEY = ("phase", "batch", "prompt_len")


def profile_engine(engine: AscendInferEngine, experiment: Experiment, folder: RunFolder) -> None:
    """Profile the engine, loaded or not, where `profile` asks for it and the folder does not have it yet.

    The batch is the largest concurrency that is asked for and fits, the prompts have the first length that is asked.
    """
    if not experiment.profile:
        return
    engine.load_model()
    batch = min(experiment.batch_size, max(experiment.sweep.get("concurrency", [1])))
    room = engine.max_seq_length - tokens_needed(0, batch, STEPS)
    prompt_len = min(experiment.sweep.get("prompt_len", [64])[0], room)
    if prompt_len < 1:
        raise ValueError(f"profile: max_seq_length={engine.max_seq_length} has no room for a prompt and {STEPS} steps")
    identity = engine.identity
    known = newest_rows(folder.rows_of("profile_steps", identity), KEY)
    if ("decode", batch, prompt_len) in known:
        return
    with folder.working(experiment, *TABLES, identity=identity, part="profile"):
        backend = EngineBackend(engine, experiment)
        known_limits = PointForecast(backend, backend.weight_bytes(), load_ceilings(backend, folder)).measured
        requests = make_requests(
            batch * len(PASSES), prompt_len, 1, vocab_size=engine.config.vocab_size, seed=experiment.seed,
            avoid_ids=engine.config.eos_token_ids,
        )  # fmt: skip
        core = engine.core
        assert core is not None, "it is loaded"
        path = folder.path / "profile"
        try:
            phases = core.profile([list(request.prompt_token_ids) for request in requests], STEPS, str(path))
        except ProfileError as error:  # what is measured without a profiler can still be measured
            folder.fail(str(error))
            return
        device = backend.device
        facts = {"prompt_len": prompt_len, "model": experiment.model_name, "device": device.name}
        for phase in phases:
            key = {"profile_id": uuid.uuid4().hex[:12], "phase": phase.name}
            step = step_row(phase, device.kind, known_limits)
            rows = [{**key, **row} for row in operator_rows(phase, step["counted_step_ms"])]
            folder.append_all("profile", rows, identity)
            # Last: it stands for the phase being done.
            folder.append("profile_steps", {**key, **facts, "device_kind": device.kind, **step}, identity)


def step_row(phase: Phase, device_kind: str, limits: Deployment | None) -> dict[str, Any]:
    """What a step of the phase takes, of what, and what bounds it. Shares are of `counted_step_ms` and add up to 1."""
    step_ms = phase.profiled_step_ms if device_kind == "cpu" else phase.step_ms
    profile, steps = phase.profile, phase.steps
    memory_ms, arithmetic_ms = _floors_ms(phase, limits)
    busy_ms = min(step_ms, profile.busy_ms / steps)
    communication_ms = min(busy_ms, profile.time_of("communication") / steps)
    shares = {
        "host_share": 1 - busy_ms / step_ms,
        "communication_share": communication_ms / step_ms,
        "operator_share": (busy_ms - communication_ms) / step_ms,
    }
    return {
        "batch": phase.batch,
        "context_len": phase.context_len,
        "steps": steps,
        "step_ms": phase.step_ms,
        "profiled_step_ms": phase.profiled_step_ms,
        "counted_step_ms": step_ms,
        "host_gap_ms": step_ms - busy_ms,
        "launches_per_step": profile.launches / steps,
        **shares,
        "memory_floor_ms": memory_ms,
        "arithmetic_floor_ms": arithmetic_ms,
        "bound": bound_of(busy_ms - communication_ms, memory_ms, arithmetic_ms, **shares),
        "longest_operator": profile.operators[0].name,
        "longest_share": profile.operators[0].total_ms / steps / step_ms,
        "trace": f"profile/{profile.trace}",
    }


def bound_of(
    operators_ms: float,
    memory_ms: float | None,
    arithmetic_ms: float | None,
    *,
    host_share: float,
    communication_share: float,
    operator_share: float,
) -> str:
    """host, communication, memory, arithmetic, or operators: neither ceiling explains the time that these take."""
    if host_share >= max(communication_share, operator_share):
        return "host"
    if communication_share > operator_share:
        return "communication"
    if memory_ms is None or arithmetic_ms is None or max(memory_ms, arithmetic_ms) < NEAR_A_CEILING * operators_ms:
        return "operators"
    return "memory" if memory_ms >= arithmetic_ms else "arithmetic"


def _floors_ms(phase: Phase, limits: Deployment | None) -> tuple[float | None, float | None]:
    """Least time of a step for its bytes and for its products at the measured ceilings."""
    if limits is None:
        return None, None
    if phase.name == "decode":
        flops = decode_flops(limits.config, phase.batch, phase.context_len)
        num_bytes = limits.decode_bytes(phase.batch, phase.context_len)
    else:
        flops = prefill_flops(limits.config, round(phase.context_len)) / phase.steps
        num_bytes = float(limits.weights.per_step)
    limit = limits.limit()
    return num_bytes / limit.bytes_per_s * 1e3, flops / limit.flops_per_s * 1e3


def operator_rows(phase: Phase, step_ms: float) -> list[dict[str, Any]]:
    """A row per operator, the longest first."""
    return [
        {
            "operator": one.name,
            "kind": one.kind,
            "calls_per_step": one.calls / phase.steps,
            "ms_per_step": one.total_ms / phase.steps,
            "share": one.total_ms / phase.steps / step_ms,
        }
        for one in phase.profile.operators
    ]
