"""The throughput sweep: concurrency x prompt length x output length x repeats, one row per point, resumable.

Rows go to `rows`, raw request timelines to `requests`, measured ceilings to `ceilings`. A row is written when
its point ends; a point that fails becomes a row with status failed and its error, and the sweep goes on.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ascend_kit.measure import metrics
from ascend_kit.measure.backends import Backend, as_backend, baseline_backend
from ascend_kit.measure.expectation import Point, PointCosts, check_points, load_ceilings, sweep_points
from ascend_kit.measure.metrics import Limits, RequestRecord
from ascend_kit.measure.workload import Request, make_requests

if TYPE_CHECKING:
    import pandas

    from ascend_kit.params import Experiment
    from ascend_kit.results import RunFolder

Progress = Callable[[int, int, str], None]
TABLES = ("rows", "requests", "ceilings")
# What makes two rows measurements of the same thing. A resumed sweep skips a point whose key has an ok row.
KEY = (
    "backend",
    "device",
    "model",
    "precision",
    "quantize",
    "graph_mode",
    "operator_fusion",
    "memory_optimize",
    "num_devices",
    "slots",
    "concurrency",
    "prompt_len",
    "output_len",
    "num_requests",
    "seed",
    "repeat",
)
_WARM_UP_TOKENS = 4
_WARM_UP_SEED = 2**31


def run_sweep(
    engine: Any,
    experiment: Experiment,
    folder: RunFolder,
    *,
    on_progress: Progress | None = None,
    ceilings: dict[str, Any] | None = None,
) -> pandas.DataFrame:
    """Measure every point that has no ok row yet; returns all rows of the folder, failed ones included.

    `engine` is a loaded AscendInferEngine or any `Backend`. `on_progress(done, total, text)` is called after
    every point. `ceilings` as `measure_ceilings` returns them; by default those in the folder, else measured
    now. Raises SweepError for impossible points before any work.
    """
    backend = as_backend(engine, experiment)
    points = sweep_points(experiment)
    check_points(points, min(backend.max_seq_length, experiment.max_seq_length))
    folder.begin(experiment, *TABLES)
    sweep = _Sweep(backend, experiment, folder, ceilings or load_ceilings(backend, folder))
    done = folder.done_keys("rows", KEY)
    for number, point in enumerate(points, 1):
        facts = sweep.facts(point)
        if tuple(facts[key] for key in KEY) in done:
            text = f"{backend.name}: {point}: already done"
        else:
            text = f"{backend.name}: {point}: {sweep.measure(point, facts)}"
        if on_progress:
            on_progress(number, len(points), text)
    return folder.load("rows")


def run_baseline_sweep(
    experiment: Experiment, folder: RunFolder, *, device: Any = None, on_progress: Progress | None = None
) -> pandas.DataFrame:
    """The same sweep with transformers' `generate`, unless `sweep_baseline` is off; returns all rows.

    Call it once the engine is closed: two models at a time would compete for memory. The checkpoint is not
    even loaded when every point is done.
    """
    if not experiment.sweep_baseline:
        return folder.load("rows")
    from ascend_kit.device.device import select_device

    backend = baseline_backend(experiment, device or select_device(experiment.device, experiment.device_id))
    try:
        return run_sweep(backend, experiment, folder, on_progress=on_progress)
    finally:
        backend.close()


def failed_points(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Rows that failed and were not measured successfully later, newest failure of each point only."""
    if rows.empty:
        return rows
    newest = rows.drop_duplicates(subset=[key for key in KEY if key in rows], keep="last")
    return newest[newest["status"] != "ok"]


class _Sweep:
    """The parts of a sweep that stay the same from point to point."""

    def __init__(self, backend: Backend, experiment: Experiment, folder: RunFolder, ceilings: dict[str, Any]) -> None:
        self.backend, self.experiment, self.folder = backend, experiment, folder
        self.limits = Limits(experiment.ttft_limit_ms, experiment.tpot_limit_ms)
        self.variant = backend.variant()
        self.weight_bytes = backend.weight_bytes()
        self.costs = PointCosts(backend, ceilings)
        self._warm: set[tuple[int, int]] = set()

    def facts(self, point: Point) -> dict[str, Any]:
        """What is known of a point before measuring: its key and its ceilings."""
        experiment, backend = self.experiment, self.backend
        return {
            "backend": backend.name,
            "device": backend.device.name,
            "model": experiment.model_name,
            **self.variant,
            "num_devices": backend.num_devices,
            "slots": backend.slots,
            **asdict(point),
            "seed": experiment.seed,
            "weight_bytes": self.weight_bytes,
            **self.costs.ceilings(point),
        }

    def measure(self, point: Point, facts: dict[str, Any]) -> str:
        """Run one point and append its rows; returns a few words on the outcome."""
        start = time.perf_counter()
        ids = {"point_id": uuid.uuid4().hex[:12]}
        try:
            self._warm_up(point)
            row = self._measured(point, ids)
        except Exception as error:  # any failure of a point is a result; the next point may work
            text = f"{type(error).__name__}: {error}"
            self.folder.append("rows", {**ids, **facts, "status": "failed", "error": text})
            return f"failed: {text}"
        self.folder.append("rows", {**ids, **facts, **row, "measured_in_s": time.perf_counter() - start})
        return f"{row['output_tokens_per_s']:.1f} output tokens/s"

    def _measured(self, point: Point, ids: dict[str, str]) -> dict[str, Any]:
        requests = self._requests(point, point.num_requests, point.output_len, point.repeat)
        device = self.backend.device
        device.synchronize()
        device.reset_peak_memory()
        records = self.backend.run(requests, point.concurrency)
        for record in records:  # before the row: a row without its raw samples would be worse than the reverse
            self.folder.append("requests", {**ids, **record.to_row()})
        check_complete(requests, records)
        summary = metrics.summarize(records, limits=self.limits)
        return {
            **summary,
            **self.costs.utilisation(point, records, summary),
            "peak_memory_bytes": device.peak_memory_bytes(),
        }

    def _warm_up(self, point: Point) -> None:
        """A short run of the same shape, once: first calls load kernels, capture graphs and grow pools."""
        shape = (point.concurrency, point.prompt_len)
        if shape in self._warm:
            return
        count = min(point.concurrency, point.num_requests)
        requests = self._requests(point, count, min(_WARM_UP_TOKENS, point.output_len), _WARM_UP_SEED)
        self.backend.run(requests, point.concurrency)
        self._warm.add(shape)

    def _requests(self, point: Point, count: int, output_len: int, salt: int) -> list[Request]:
        config = self.backend.config
        # The point is part of the seed: no prompt returns within a sweep, so no cache can serve it.
        seed = (self.experiment.seed, point.concurrency, point.prompt_len, point.output_len, salt)
        return make_requests(
            count,
            point.prompt_len,
            output_len,
            vocab_size=config.vocab_size,
            seed=seed,
            avoid_ids=getattr(config, "eos_token_ids", ()),
        )


def check_complete(requests: Sequence[Request], records: Sequence[RequestRecord]) -> None:
    """Raise RuntimeError unless every request came back, without error, with exactly the tokens asked for."""
    asked = {request.index: request.num_output_tokens for request in requests}
    missing = asked.keys() - {record.index for record in records}
    failed = [record for record in records if not record.is_complete]
    wrong = [r for r in records if r.is_complete and r.num_output_tokens != asked.get(r.index)]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(asked)} requests failed; the first: {failed[0].error}")
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(asked)} requests never came back")
    if wrong:
        first = wrong[0]
        raise RuntimeError(
            f"{len(wrong)} of {len(asked)} requests have a wrong length; request {first.index} was "
            f"asked for {asked.get(first.index)} tokens and gave {first.num_output_tokens}"
        )
