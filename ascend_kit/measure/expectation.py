"""The points of a sweep, and what the machine's ceilings allow at each of them, before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ascend_kit.measure import costs, metrics
from ascend_kit.measure.backends import Backend, EngineBackend
from ascend_kit.measure.ceilings import measure_ceilings
from ascend_kit.measure.costs import Limit
from ascend_kit.measure.metrics import RequestRecord
from ascend_kit.measure.packing import layout_experiments
from ascend_kit.measure.planner import Card, Deployment

if TYPE_CHECKING:
    import pandas

    from ascend_kit.device.device import Device
    from ascend_kit.engine.engine import AscendInferEngine
    from ascend_kit.params import Experiment
    from ascend_kit.results import RunFolder

_CACHE_BYTES = 2**28  # weights below this may live in a CPU's cache and are read at its speed


@dataclass(frozen=True)
class Point:
    """One measurement: so many requests of these lengths, so many of them in flight."""

    concurrency: int
    prompt_len: int
    output_len: int
    num_requests: int
    repeat: int = 0

    def __str__(self) -> str:
        return (
            f"concurrency {self.concurrency}, prompt {self.prompt_len}, output {self.output_len}, repeat {self.repeat}"
        )


class SweepError(ValueError):
    """The sweep asks for something that no engine could do."""


def sweep_points(experiment: Experiment) -> list[Point]:
    """Every point of the experiment, repeats outermost: a drifting machine then touches all points alike."""
    return [
        Point(concurrency, prompt_len, output_len, _num_requests(experiment, concurrency), repeat)
        for repeat in range(experiment.sweep_repeats)
        for prompt_len in experiment.sweep_prompt_len
        for output_len in experiment.sweep_output_len
        for concurrency in experiment.sweep_concurrency
    ]


def check_points(points: Sequence[Point], max_seq_length: int) -> None:
    """Raise SweepError naming every pair of lengths that exceeds `max_seq_length`, before any work."""
    bad = sorted({(p.prompt_len, p.output_len) for p in points if p.prompt_len + p.output_len > max_seq_length})
    if bad:
        text = ", ".join(f"{prompt} + {output} = {prompt + output}" for prompt, output in bad)
        raise SweepError(
            f"prompt + output tokens exceed max_seq_length {max_seq_length}: {text}; lower sweep_prompt_len "
            "or sweep_output_len, or raise max_seq_length"
        )


def expectations(engine: AscendInferEngine, experiment: Experiment, folder: RunFolder) -> pandas.DataFrame:
    """One row per layout and point without its repeats: floors and ceiling from measured ceilings, times in ms.

    `engine` is a loaded engine. Ceilings are measured once (2-4 s) and kept in the folder.
    """
    import pandas

    ceilings = load_ceilings(EngineBackend(engine, experiment), folder)
    points = [point for point in sweep_points(experiment) if point.repeat == 0]
    rows = []
    for layout, plan in layout_experiments(experiment).items():
        known = PointCosts(EngineBackend(engine, plan), ceilings)
        rows += [{**layout._asdict(), **asdict(point), **known.ceilings(point)} for point in points]
    return pandas.DataFrame(rows)


class PointCosts:
    """Floors of a backend's model on a machine, and how near a measurement came to them."""

    def __init__(self, backend: Backend, measured: dict[str, Any]) -> None:
        self.config, self.slots, self.devices = backend.config, backend.slots, backend.num_devices
        self.replicas = backend.replicas
        variant = backend.variant()
        stored = backend.weight_bytes()
        self.step_weights = costs.step_weight_bytes(self.config, stored, variant["precision"])
        self.kv_token_bytes = costs.kv_bytes_per_token(self.config, variant["precision"])
        int8 = measured.get("int8_ops_per_s") if variant["quantize"] in ("w8a8", "mixed") else None
        rate = int8 or measured.get(f"{variant['precision']}_flops_per_s")
        read = measured.get("read_bytes_per_s")
        self.one = Limit(rate, read)
        weights = costs.WeightBytes(stored, self.step_weights)
        self.deployment = _deployment(backend, variant, weights, measured)

    def batch(self, point: Point) -> int:
        """Requests that one step can serve."""
        return min(point.concurrency, self.slots or point.concurrency, point.num_requests)

    def ceilings(self, point: Point) -> dict[str, Any]:
        """Limits of a point from the measured ceilings, and a prediction; None where unknown."""
        whole, group = self._limit(self.devices), self._limit(max(1, self.devices // self.replicas))
        weights, batch = self._weights_per_round(point), self.batch(point)
        context = point.prompt_len + point.output_len / 2
        decode = costs.decode_floor_s(self.config, whole, weights, self.kv_token_bytes, batch, context)
        prefill = costs.prefill_floor_s(self.config, group, self.step_weights, point.prompt_len)
        ceiling = costs.throughput_ceiling(
            self.config,
            whole,
            step_weights=weights,
            kv_token_bytes=self.kv_token_bytes,
            concurrency=batch,
            prompt_len=point.prompt_len,
            output_len=point.output_len,
        )
        return {
            "kv_bytes_per_token": self.kv_token_bytes,
            "step_weight_bytes": self.step_weights,
            "decode_floor_ms": decode and decode * 1e3,
            "prefill_floor_ms": prefill and prefill * 1e3,
            "ceiling_tokens_per_s": ceiling,
            "predicted_tokens_per_s": self._prediction(point),
        }

    def utilisation(
        self, point: Point, records: Sequence[RequestRecord], summary: dict[str, Any]
    ) -> dict[str, float | None]:
        """`mfu` of the point, `mbu` of its median decode step, `ceiling_share` of the ceiling; all 0..1."""
        flops = costs.request_work(self.config, list(records))
        context = point.prompt_len + point.output_len / 2
        weights = self._weights_per_round(point)
        step_bytes = costs.decode_bytes(weights, self.kv_token_bytes, self.batch(point), context)
        step_s = (summary["itl_p50_ms"] or 0.0) / 1e3
        ceiling = self.ceilings(point)["ceiling_tokens_per_s"]
        rate = summary["output_tokens_per_s"]
        return {
            "mfu": metrics.mfu(flops, summary["wall_s"], self.one.flops_per_s, self.devices),
            "mbu": metrics.mbu(step_bytes, step_s, self.one.bytes_per_s, self.devices),
            "ceiling_share": rate / ceiling if rate and ceiling else None,
        }

    def _prediction(self, point: Point) -> float | None:
        if self.deployment is None:
            return None
        per_replica = max(1, self.batch(point) // self.replicas)
        busy = min(self.replicas, self.batch(point))
        return busy * self.deployment.output_tokens_per_s(point.prompt_len, point.output_len, per_replica)

    def _weights_per_round(self, point: Point) -> int:
        """Weight bytes read while each request in flight gains a token, over all busy replicas."""
        return self.step_weights * min(self.replicas, self.batch(point))

    def _limit(self, devices: int) -> Limit:
        rate, read = self.one.flops_per_s, self.one.bytes_per_s
        return Limit(rate and rate * devices, read and read * devices)


def _deployment(
    backend: Backend, variant: dict[str, Any], weights: costs.WeightBytes, measured: dict[str, Any]
) -> Deployment | None:
    """What the planner knows of a backend: its card from the peak table, else as measured."""
    if backend.device.kind == "cpu" and backend.replicas > 1:
        return None  # replicas on one CPU share it in ways that the planner does not model
    card = _card(backend.device, measured, variant["precision"])
    return card and Deployment(
        backend.config,
        card,
        variant["precision"],
        variant["quantize"],
        tp_size=max(1, backend.num_devices // backend.replicas),
        launches_per_layer=backend.launches_per_layer,
        graph_mode=variant["graph_mode"],
        known_weights=weights,
    )


def _card(device: Device, measured: dict[str, Any], precision: str) -> Card | None:
    if device.peak is not None:
        return Card.from_peak(device.peak)
    if measured.get(f"{precision}_flops_per_s") is None:
        return None
    return Card.from_ceilings(measured, memory_bytes=device.total_memory_bytes, precision=precision)


def load_ceilings(backend: Backend, folder: RunFolder) -> dict[str, Any]:
    """The folder's ceilings when they are of this device, else measured now and kept.

    Weights smaller than a cache are read at the cache's speed, so the buffer is made their size.
    """
    known = folder.read_json("ceilings")
    precision = backend.variant()["precision"]
    if known and known.get("device") == backend.device.name and f"{precision}_flops_per_s" in known:
        return known
    stored = backend.weight_bytes()
    small = stored if stored < _CACHE_BYTES else None
    found = measure_ceilings(backend.device, dtypes=sorted({"bf16", "fp32", "int8", precision}), buffer_bytes=small)
    folder.write_json("ceilings", found)
    return found


def _num_requests(experiment: Experiment, concurrency: int) -> int:
    return experiment.sweep_requests_per_point or max(2 * concurrency, 4)
