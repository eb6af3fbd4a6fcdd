"""The throughput sweep: every combination of load and engine parameters on every engine, a row per point, resumable.

Rows go to `rows`, raw request timelines to `requests`, the load of each card to `cards`, what an engine held over time
to `samples`, measured ceilings to `ceilings`; `sweep` holds what was asked for last. A row is written when its point
ends. A row counts as done only for the same point on an engine of the same identity, so a sweep can grow: rows that are
not asked for any more stay in their file and take part in nothing.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ascend_kit.device.device import resolve_device, select_device
from ascend_kit.engine.elsewhere import apart
from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.engine.processes import needs_process
from ascend_kit.identity import Identity
from ascend_kit.measure.baseline import ContinuousBackend, TransformersBackend, require_continuous, source_of
from ascend_kit.measure.ceilings import measure_ceilings
from ascend_kit.measure.engines import Backend, BackendElsewhere, EngineBackend, Machine, reckon_weight_bytes
from ascend_kit.measure.forecast import Card
from ascend_kit.measure.grid import shuffled, sweep_points, why_impossible
from ascend_kit.measure.metrics import mean_interval
from ascend_kit.measure.points import PointForecast, PointRunner
from ascend_kit.measure.remote import EndpointBackend
from ascend_kit.measure.rows import Point, SweepError, load_rows, raise_if_failed
from ascend_kit.measure.search import USUAL_PROBES, search_points, searched_loads

if TYPE_CHECKING:
    import pandas

    from ascend_kit.params import Experiment
    from ascend_kit.params.engines import EngineSpec
    from ascend_kit.results import RunFolder

TABLES = ("rows", "requests", "cards", "samples", "ceilings", "sweep", "search", "mlflow")
_CACHE_BYTES = 2**28  # weights below this may live in a CPU's cache and are read at its speed
Progress = Callable[[float, int, str], None]  # points done, points in all, text


def expectations(engine: AscendInferEngine, experiment: Experiment, folder: RunFolder) -> pandas.DataFrame:
    """One row per combination and point without its repeats: floors and ceiling from measured ceilings, times in ms,
    and `reason` where it cannot be measured.

    The engine is loaded if it is not. Ceilings are measured once (2-4 s) and kept in the folder.
    """
    import pandas

    ceilings = load_ceilings(EngineBackend(engine, experiment), folder)
    stored = int(engine.load_model().stats()["weight_bytes"])
    points = [point for point in sweep_points(experiment) if point.repeat == 0]
    rows = []
    for settings in experiment.sweep_settings:
        plan = experiment.alone(**settings)
        known = PointForecast(EngineBackend(engine, plan), stored, ceilings)
        layout = {**settings, "cards": plan.cards, "tensor_parallel": plan.tensor_parallel}
        for point in points:
            row = {**layout, **asdict(point), **known.limits(point)}
            rows.append({**row, "reason": why_impossible(point, plan.max_seq_length, known)})
    return pandas.DataFrame(rows)


def measure_engines(
    experiment: Experiment,
    folder: RunFolder,
    *,
    engine: AscendInferEngine | None = None,
    on_progress: Progress | None = None,
    ceilings: dict[str, Any] | None = None,
) -> pandas.DataFrame:
    """The sweep on every engine of `engines`, one after the other; returns all rows that are asked.

    `engine` is ours as the experiment describes it, loaded or not; without it one is made. Each engine is closed before
    the next is opened: two models at a time would compete for memory and cores. An engine whose points are all done is
    not opened.
    """
    specs, ended = experiment.engine_specs, 0
    if any(spec.batching == "continuous" for spec in specs):
        require_continuous(resolve_device(experiment.device, experiment.device_id)[0])
    for number, spec in enumerate(specs):
        plan = experiment.alone(**spec.settings, sweep=experiment.sweep) if spec.settings else experiment
        before, backend = ended, open_backend(spec, plan, folder, engine)

        def tell(done: float, total: int, text: str, before: int = before, left: int = len(specs) - number) -> None:
            """One count over all engines; those to come are taken to have as many points as this one."""
            nonlocal ended
            ended = before + total
            if on_progress is not None:
                on_progress(before + done, before + total * left, text)

        try:
            run_sweep(backend, plan, folder, on_progress=tell, ceilings=ceilings, is_first=number == 0)
        finally:
            backend.close()
    return load_rows(folder)


def open_backend(
    spec: EngineSpec, plan: Experiment, folder: RunFolder, engine: AscendInferEngine | None = None
) -> Backend:
    """The engine of an entry, whose settings `plan` has, not opened yet. `engine` serves one of ours that has none."""
    if spec.openai is not None:
        return EndpointBackend(spec.name, spec.openai, plan, folder.path)
    if spec.kind == "transformers":
        # Where our engine runs in a process of its own, so does this one: a ratio of the two is fair then.
        is_apart = needs_process(resolve_device(plan.device, plan.device_id)[0])
        return BackendElsewhere(_transformers, plan, spec) if is_apart else _transformers(plan, spec)
    if spec.settings or engine is None:
        engine = AscendInferEngine.from_experiment(plan)
    return EngineBackend(engine, plan, spec.name)


def _transformers(experiment: Experiment, spec: EngineSpec) -> TransformersBackend:
    settings: dict[str, Any] = {
        "device": select_device(experiment.device, experiment.device_id), "precision": experiment.precision,
        "max_seq_length": experiment.max_seq_length, "name": spec.name,
    }  # fmt: skip
    if spec.batching == "continuous":
        return ContinuousBackend(source_of(experiment), max_tokens_per_step=experiment.max_tokens_per_step, **settings)
    return TransformersBackend(source_of(experiment), padding=spec.padding, **settings)


def run_sweep(
    engine: AscendInferEngine | Backend,
    experiment: Experiment,
    folder: RunFolder,
    *,
    on_progress: Progress | None = None,
    ceilings: dict[str, Any] | None = None,
    is_first: bool | None = None,
) -> pandas.DataFrame:
    """Measure every point that has no ok row yet on one engine; returns the rows that are asked, failed ones included.

    `engine` is an AscendInferEngine or any `Backend`, and is opened when a point needs it. `on_progress(done, total,
    text)` is called after every point and about once a second meanwhile. `ceilings` as `measure_ceilings` returns them;
    by default those in the folder, else measured now. A point that cannot be is a row with the reason and costs
    nothing; SweepError when none can. A point that fails is a row, the others go on, and the stage ends as failed.
    `is_first`: what was asked of other engines before is not asked any more; by default so for ours.

    Where the sweep varies engine parameters, the engine is closed, and one of ours is opened for each combination.
    """
    variants, points = _variants(engine, experiment), sweep_points(experiment)
    name = variants[0][0].name
    is_first = name == "ascend_kit" if is_first is None else is_first
    with folder.working(experiment, *TABLES, part=name):
        runners = [
            PointRunner(backend, experiment, folder, ceilings or load_ceilings(backend, folder), settings)
            for backend, settings in variants
        ]
        asked = [_without_impossible(runner, points) for runner in runners]
        if not any(possible for possible, _ in asked):
            raise SweepError(f"{name}: no point can be measured; the first: {next(iter(asked[0][1].values()))}")
        note = _Note(folder, name, is_first)
        is_searched = experiment.search != "none"
        searches = [  # how many points each search is taken to be as long as
            is_searched * USUAL_PROBES * len(searched_loads(possible, experiment.search)) for possible, _ in asked
        ]
        total, before = sum(len(possible) for possible, _ in asked) + sum(searches), 0
        for runner, (possible, reasons) in zip(runners, asked, strict=True):
            runner.write_pruned(reasons)
            note.add(runner.identity, [*possible, *reasons])

        def tell(done: float, text: str) -> None:
            if on_progress is not None:
                on_progress(before + done, total, text)

        for runner, (possible, _), length in zip(runners, asked, searches, strict=True):
            try:
                own, more = list(possible), shuffled(possible, experiment.seed)
                while more:
                    runner.run(more, tell)
                    before += len(more)
                    more = _repeats_wanted(runner, own, experiment)
                    own, total = own + more, total + len(more)
                    note.add(runner.identity, more)
                if length:
                    search_points(runner, possible, experiment, note.add, tell)
                    before += length
            finally:
                if len(runners) > 1:
                    runner.backend.close()
        rows = load_rows(folder)
        try:
            raise_if_failed(rows.loc[rows["backend"] == name])
        except SweepError as error:
            folder.fail(str(error))
    return rows


def _variants(engine: AscendInferEngine | Backend, experiment: Experiment) -> list[tuple[Backend, dict[str, Any]]]:
    """The engine itself, or one of ours for each combination of engine parameters, each with them; ValueError for one
    that the model cannot be split into, before anything is closed."""
    backend = engine if isinstance(engine, Backend) else EngineBackend(engine, experiment)
    every = experiment.sweep_settings
    if not isinstance(backend, EngineBackend):
        return [(backend, {})]  # it has the parameters it has
    current = {key: getattr(experiment, key) for key in every[0]}
    if every == [current]:
        return [(backend, current)]
    found: list[tuple[Backend, dict[str, Any]]] = []
    for settings in every:
        plan = experiment.alone(**settings)
        same = plan.converted_folder == experiment.converted_folder and plan.use_model == experiment.use_model
        made = AscendInferEngine.from_experiment(plan, backend.engine.model_path if same else None)
        found.append((EngineBackend(made, plan, backend.name), settings))
    backend.close()
    return found


def _without_impossible(runner: PointRunner, points: Sequence[Point]) -> tuple[list[Point], dict[Point, str]]:
    """The points that can be measured, and the others with the reason."""
    longest = min(runner.backend.max_seq_length, runner.experiment.max_seq_length)
    known = PointForecast(runner.backend, None, runner.ceilings)
    reasons = {point: why_impossible(point, longest, known) for point in points}
    return [p for p, reason in reasons.items() if reason is None], {p: text for p, text in reasons.items() if text}


def _repeats_wanted(runner: PointRunner, points: Sequence[Point], experiment: Experiment) -> list[Point]:
    """The next repeat of each point whose 95 % interval is still wider than `sweep_precision`."""
    if experiment.sweep_precision is None:
        return []
    rates: dict[Point, list[float]] = {}
    for point, row in runner.measured(points).items():
        if row["status"] == "ok":
            rates.setdefault(replace(point, repeat=0), []).append(row["output_tokens_per_s"])
    counts = collections.Counter(replace(point, repeat=0) for point in points)
    wanted = []
    for point, values in rates.items():
        share = mean_interval(values).share
        is_wide = share is None or share > experiment.sweep_precision
        if is_wide and len(values) == counts[point] < experiment.sweep_max_repeats:  # a failed repeat is not repeated
            wanted.append(replace(point, repeat=counts[point]))
    return wanted


# --- what was measured ------------------------------------------------------------------------------------------------


def load_ceilings(backend: Backend, folder: RunFolder) -> dict[str, Any]:
    """The folder's ceilings when they are of this device, else measured now and kept.

    Weights smaller than a cache are read at the cache's speed, so the buffer is made their size.
    """
    known, variant = folder.read_json("ceilings"), backend.variant()
    device, precision = backend.device, variant["precision"]
    if known and known.get("device") == device.name and f"{precision}_flops_per_s" in known:
        return known
    if device.kind == "endpoint":
        return _nominal(device)
    stored = reckon_weight_bytes(backend.config, precision, variant["quantize"])
    small = stored if stored < _CACHE_BYTES else None
    dtypes = sorted({"bf16", "fp32", "int8", precision})
    found = apart(device.kind, functools.partial(measure_ceilings, dtypes=dtypes, buffer_bytes=small), device)
    folder.write_json("ceilings", found)
    return found


def _nominal(device: Machine) -> dict[str, Any]:
    """The peaks of a card that cannot be measured from here, in the form of measured ceilings; nothing is kept."""
    peak = device.peak
    if peak is None:
        return {"device": device.name}
    rates = {f"{name}_flops_per_s": peak.bf16_flops for name in ("bf16", "fp16")}
    return {"device": device.name, **rates, "int8_ops_per_s": peak.int8_ops, "launch_s": Card(peak).launch_s,
            "read_bytes_per_s": peak.bandwidth_bytes_per_s, "source": "nominal"}  # fmt: skip


class _Note:
    """sweep.json: which points are asked of an engine, configuration by configuration."""

    def __init__(self, folder: RunFolder, name: str, is_first: bool) -> None:
        self._folder, self._name = folder, name
        self._before = {} if is_first else {k: v for k, v in (folder.read_json("sweep") or {}).items() if k != name}
        self._points: dict[str, tuple[Identity, list[Point]]] = {}

    def add(self, identity: Identity, points: Sequence[Point]) -> None:
        """Ask for more; in the order of repeats and then as they came."""
        _, known = self._points.setdefault(identity.id, (identity, []))
        known[:] = sorted(dict.fromkeys([*known, *points]), key=lambda point: point.repeat)
        entry = {
            "identities": [one.to_row() for one, _ in self._points.values()],
            "points": [[asdict(point) for point in own] for _, own in self._points.values()],
        }
        self._folder.write_json("sweep", {**self._before, self._name: entry})
