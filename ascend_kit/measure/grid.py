"""The points of a sweep: every combination of its load, what of it cannot be, and about how long the rest takes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ascend_kit.files import file_hash
from ascend_kit.measure.loads import TIMED
from ascend_kit.measure.points import PointForecast
from ascend_kit.measure.rows import Point

if TYPE_CHECKING:
    from ascend_kit.params import Experiment

TIMED_REQUESTS = 64
AXES = ("prompt_len", "output_len", "load", "rate", "burstiness", "shared_prefix", "turns", "length_spread")


def sweep_points(experiment: Experiment) -> list[Point]:
    """Every point of the experiment, repeats outermost: a drifting machine then touches all points alike."""
    axes = [experiment.swept(name) if name not in ("prompt_len", "output_len") else experiment.sweep[name]
            for name in AXES]  # fmt: skip
    every = [
        make_point(experiment, concurrency, dict(zip(AXES, values, strict=True)))
        for values in itertools.product(*axes)
        for concurrency in experiment.sweep["concurrency"]
    ]
    once = list(dict.fromkeys(every))
    return [replace(point, repeat=repeat) for repeat in range(experiment.sweep_repeats) for point in once]


def make_point(experiment: Experiment, concurrency: int, values: dict[str, Any]) -> Point:
    """One point; what has no meaning for its kind of load is None."""
    load = values["load"]
    is_timed, data = load in TIMED, experiment.trace_file if load == "trace" else experiment.load_prompts
    default = TIMED_REQUESTS if is_timed or load == "all_at_once" else max(2 * concurrency, 4)
    limits: dict[str, Any] = {f"{name}_limit_ms": value for name, value in experiment.limits.items()}
    return Point(
        concurrency, values["prompt_len"], values["output_len"],
        (experiment.sweep_requests_per_point or default) * (values["turns"] if load != "trace" else 1),
        experiment.seed, **limits,
        load=load, rate=values["rate"] if is_timed else None,
        burstiness=values["burstiness"] if load == "gamma" else None,
        rate_end=experiment.rate_end if load == "ramp" else None,
        turns=values["turns"], think_s=experiment.think_s if values["turns"] > 1 else 0.0,
        shared_prefix=values["shared_prefix"], length_spread=values["length_spread"],
        data=None if data is None else file_hash(data)[:12],
    )  # fmt: skip


def shuffled(points: Sequence[Point], seed: int) -> list[Point]:
    """The points in a seeded order within each repeat, so that no drift falls together with an axis."""
    groups: dict[int, list[Point]] = {}
    for point in points:
        groups.setdefault(point.repeat, []).append(point)
    for repeat, group in groups.items():
        random.Random(f"{seed} {repeat}").shuffle(group)
    return [point for group in groups.values() for point in group]


def why_impossible(point: Point, max_seq_length: int, known: PointForecast) -> str | None:
    """Why a point cannot be measured whatever the engine does, or None."""
    if point.data is None and point.longest_len > max_seq_length:
        turns = f"{point.turns} x " if point.turns > 1 else ""
        return (
            f"{turns}{point.prompt_len} + {point.output_len} tokens are above max_seq_length {max_seq_length}; lower "
            "prompt_len or output_len in sweep, or raise max_seq_length"
        )
    group = known.measured
    if group is None:
        return None
    if group.kv_bytes_free() <= 0:
        return f"the weights ({group.weights.stored / 2**30:.1f} GiB) leave no memory for KV: use more cards or int8"
    if group.max_concurrency(point.longest_len) == 0:
        return f"no request of {point.longest_len} tokens fits beside the weights"
    return None


def estimate_s(points: Sequence[Point], known: PointForecast) -> float | None:
    """About how long the points take without loading and warm-up, from predictions or else ceilings; None unknown."""
    total = 0.0
    for point in points:
        limits = known.limits(point)
        rate = limits["predicted_tokens_per_s"] or limits["ceiling_tokens_per_s"]
        if not rate:
            return None
        seconds = point.num_requests * point.output_len / rate
        total += max(seconds, point.num_requests / point.rate if point.rate and point.load != "trace" else 0.0)
    return total
