"""How long a sweep will take: by the planner before it starts, by what was measured as soon as there is something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.measure.baseline import TransformersBackend
from ascend_kit.measure.engines import EngineBackend, reckon_weight_bytes
from ascend_kit.measure.grid import estimate_s, sweep_points, why_impossible
from ascend_kit.measure.points import PointForecast
from ascend_kit.measure.sweep import load_ceilings
from ascend_kit.params.engines import PLAIN, EngineSpec

if TYPE_CHECKING:
    from ascend_kit.params import Experiment
    from ascend_kit.results import RunFolder


@dataclass(frozen=True)
class EnginePlan:
    """What is asked of one engine: points with their repeats, and seconds at the predicted speed, None unknown."""

    name: str
    num_points: int
    seconds: float | None


def engine_plans(engine: AscendInferEngine, experiment: Experiment, folder: RunFolder) -> list[EnginePlan]:
    """One for each entry of `engines`, without what `sweep_precision` and `search` will add. Nothing is loaded for it:
    `engine` stands for the model and the machine, and padding and eager operators are counted for transformers."""
    ceilings = load_ceilings(EngineBackend(engine, experiment), folder)
    return [_plan(spec, engine, experiment, ceilings) for spec in experiment.engine_specs]


def _plan(spec: EngineSpec, engine: AscendInferEngine, experiment: Experiment, ceilings: dict[str, Any]) -> EnginePlan:
    points = sweep_points(experiment)
    if spec.openai is not None:  # a server is as fast as it is
        return EnginePlan(spec.name, len(points), None)
    is_ours, count, seconds = spec.kind == "ascend_kit", 0, 0.0
    base = experiment.alone(**spec.settings, sweep=experiment.sweep) if spec.settings else experiment
    for settings in base.sweep_settings if is_ours else [{**PLAIN, "cards": 1, "tensor_parallel": 1}]:
        plan = base.alone(**settings)
        backend = EngineBackend(engine, plan)
        if not is_ours:
            backend.launches_per_layer, backend.slots = TransformersBackend.launches_per_layer, None
        known = PointForecast(backend, reckon_weight_bytes(engine.config, plan.precision, plan.quantize), ceilings)
        asked = [point for point in points if why_impossible(point, plan.max_seq_length, known) is None]
        if spec.padding == "max":
            asked = [replace(point, prompt_len=plan.max_seq_length - point.output_len) for point in asked]
        count += len(asked)
        seconds += estimate_s(asked, known) or float("nan")
    return EnginePlan(spec.name, count, seconds if seconds == seconds else None)


def left_s(plans: Sequence[EnginePlan], rows: Iterable[dict[str, Any]]) -> float | None:
    """Seconds until the planned points are done, given the rows there are; None before anything was measured.

    An engine goes on as fast as its points so far. One that has not begun takes its predicted time, corrected by how
    wrong the predictions of the others were, and their mean time of loading; without a prediction, their mean time a
    point.
    """
    took: dict[str, list[float]] = {plan.name: [] for plan in plans}  # of each point, without loading
    ended = [row for row in rows if row["status"] != "pruned" and row["backend"] in took]
    num_ended = Counter(row["backend"] for row in ended)
    timed = [row for row in ended if row.get("measured_in_s") is not None]
    for row in timed:
        took[row["backend"]].append(row["measured_in_s"] - row["open_s"])
    begun = [plan for plan in plans if took[plan.name]]
    if not begun:
        return None
    mean = sum(map(sum, took.values())) / sum(map(len, took.values()))
    known = [plan for plan in begun if plan.seconds]
    predicted = sum(plan.seconds * len(took[plan.name]) / plan.num_points for plan in known if plan.seconds)
    wrong = sum(sum(took[plan.name]) for plan in known) / predicted if predicted else None
    left = 0.0
    for plan in plans:
        todo, own = max(0, plan.num_points - num_ended[plan.name]), took[plan.name]
        if own:
            left += todo * sum(own) / len(own)
        elif todo:
            each = wrong * plan.seconds / plan.num_points if wrong and plan.seconds else mean
            left += todo * each + sum(row["open_s"] for row in timed) / len(begun)
    return left
