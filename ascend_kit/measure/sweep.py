"""The throughput sweep: concurrency x prompt length x output length x repeats, one row per point, resumable.

Rows go to `rows`, raw request timelines to `requests`, the load of each card to `cards`, measured ceilings to
`ceilings`; `sweep` holds what was asked for last. A row is written when its point ends. A row counts as done only for
the same point on an engine of the same identity, so a sweep can grow: rows that are not asked for any more stay in
their file and take part in nothing. Several `sweep_layouts` are measured one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ascend_kit.engine.elsewhere import apart
from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.identity import Identity
from ascend_kit.measure.baseline import baseline_backend
from ascend_kit.measure.ceilings import measure_ceilings
from ascend_kit.measure.engines import Backend, EngineBackend, Machine, as_backend, reckon_weight_bytes
from ascend_kit.measure.forecast import Card
from ascend_kit.measure.points import KEY, Point, PointForecast, PointRunner
from ascend_kit.results import newest_rows

if TYPE_CHECKING:
    import pandas

    from ascend_kit.params import Experiment
    from ascend_kit.results import RunFolder

TABLES = ("rows", "requests", "cards", "ceilings", "sweep")
_CACHE_BYTES = 2**28  # weights below this may live in a CPU's cache and are read at its speed
Progress = Callable[[float, int, str], None]  # points done, points in all, text


class SweepError(ValueError):
    """The sweep asks for something that no engine could do, or some of its points could not be measured."""


def sweep_points(experiment: Experiment) -> list[Point]:
    """Every point of the experiment, repeats outermost: a drifting machine then touches all points alike."""
    return [
        Point(
            concurrency,
            prompt_len,
            output_len,
            experiment.sweep_requests_per_point or max(2 * concurrency, 4),
            experiment.seed,
            experiment.ttft_limit_ms,
            experiment.tpot_limit_ms,
            repeat,
        )
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

    The engine is loaded if it is not. Ceilings are measured once (2-4 s) and kept in the folder.
    """
    import pandas

    ceilings = load_ceilings(EngineBackend(engine, experiment), folder)
    stored = int(engine.load_model().stats()["weight_bytes"])
    points = [point for point in sweep_points(experiment) if point.repeat == 0]
    rows = []
    for cards, size in experiment.sweep_layouts:
        known = PointForecast(EngineBackend(engine, experiment.on_cards(cards, size)), stored, ceilings)
        layout = {"cards": cards, "tensor_parallel": size}
        rows += [{**layout, **asdict(point), **known.limits(point)} for point in points]
    return pandas.DataFrame(rows)


def run_sweep(
    engine: AscendInferEngine | Backend,
    experiment: Experiment,
    folder: RunFolder,
    *,
    on_progress: Progress | None = None,
    ceilings: dict[str, Any] | None = None,
) -> pandas.DataFrame:
    """Measure every point that has no ok row yet; returns the rows of what is asked, failed ones included.

    `engine` is an AscendInferEngine or any `Backend`, and is opened when a point needs it. `on_progress(done, total,
    text)` is called after every point and about once a second meanwhile. `ceilings` as `measure_ceilings` returns them;
    by default those in the folder, else measured now. Raises SweepError for impossible points before any work. A point
    that fails is a row, the others go on, and the stage ends as failed.

    Where the experiment's `sweep_layouts` are others than the engine's own, the engine is closed: its cards are needed.
    """
    backends, points = _backends(engine, experiment), sweep_points(experiment)
    check_points(points, min(backends[0].max_seq_length, experiment.max_seq_length))
    name = backends[0].name
    with folder.working(experiment, *TABLES, part=name):
        ceilings = ceilings or load_ceilings(backends[0], folder)
        runners = [PointRunner(backend, experiment, folder, ceilings) for backend in backends]
        _note_asked(folder, name, [runner.identity for runner in runners], points)
        for number, runner in enumerate(runners):

            def tell(done: float, text: str, before: int = number * len(points)) -> None:
                if on_progress is not None:
                    on_progress(before + done, len(runners) * len(points), text)

            try:
                runner.run(points, tell)
            finally:
                if len(runners) > 1:
                    runner.backend.close()
        rows = load_rows(folder)
        error = error_of(rows.loc[rows["backend"] == name])
        if error is not None:
            folder.fail(str(error))
    return rows


def _backends(engine: AscendInferEngine | Backend, experiment: Experiment) -> list[Backend]:
    """The engine itself, or one of ours for each layout of cards; ValueError for one that the model cannot be split
    into, before anything is closed."""
    backend, own = as_backend(engine, experiment), (experiment.cards, experiment.tensor_parallel)
    if not isinstance(backend, EngineBackend) or experiment.sweep_layouts == [own]:
        return [backend]
    plans = [experiment.on_cards(*layout) for layout in experiment.sweep_layouts]
    path = backend.engine.model_path
    found: list[Backend] = [EngineBackend(AscendInferEngine.from_experiment(plan, path), plan) for plan in plans]
    backend.close()
    return found


def run_baseline_sweep(
    experiment: Experiment, folder: RunFolder, *, on_progress: Progress | None = None
) -> pandas.DataFrame:
    """The same sweep with transformers' `generate`, unless `sweep_baseline` is off; returns all rows that are asked.

    Call it once the engine is closed: two models at a time would compete for memory. The checkpoint is not
    even loaded when every point is done.
    """
    if not experiment.sweep_baseline:
        with folder.working(experiment, part="transformers"):
            _note_asked(folder, "transformers", [], [])
        return load_rows(folder)
    backend = baseline_backend(experiment)
    try:
        return run_sweep(backend, experiment, folder, on_progress=on_progress)
    finally:
        backend.close()


# --- what was measured ------------------------------------------------------------------------------------------------


def load_rows(folder: RunFolder) -> pandas.DataFrame:
    """`asked_rows` as a table."""
    import pandas

    return pandas.DataFrame(asked_rows(folder))


def asked_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """The newest row of every point that was asked for last, engine by engine in the order of the points.

    Reads files only. A good row goes before a failed one. All rows of a folder that says nothing of what was asked.
    """
    asked = folder.read_json("sweep")
    if asked is None:
        return list(folder.rows("rows"))
    rows: list[dict[str, Any]] = []
    for entry in asked.values():
        points = [tuple(point[name] for name in KEY) for point in entry["points"]]
        for parts in entry["identities"]:
            found = newest_rows(folder.rows_of("rows", Identity.from_row(parts)), KEY)
            rows += [found[point] for point in points if point in found]
    return rows


def load_cards(folder: RunFolder) -> pandas.DataFrame:
    """What each card did during the points that `load_rows` gives."""
    cards, rows = folder.load("cards"), load_rows(folder)
    return cards if cards.empty or rows.empty else cards.loc[cards["point_id"].isin(rows["point_id"])]


def failed_points(rows: pandas.DataFrame) -> pandas.DataFrame:
    """The rows of `load_rows` whose point could not be measured."""
    return rows if rows.empty else rows.loc[rows["status"] != "ok"]


def error_of(rows: pandas.DataFrame) -> SweepError | None:
    """What ends the stage as failed: an error naming points that could not be measured, None where there are none."""
    failed = failed_points(rows)
    if failed.empty:
        return None
    first = failed.iloc[0]
    point = f"concurrency {first['concurrency']}, prompt {first['prompt_len']}, output {first['output_len']}"
    return SweepError(
        f"{len(failed)} of {len(rows)} points failed; the first: {first['backend']}, {point}: {first['error']}"
    )


def raise_if_failed(rows: pandas.DataFrame) -> None:
    """The SweepError of `error_of`: what ends a notebook with a failure."""
    error = error_of(rows)
    if error is not None:
        raise error


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


def _note_asked(folder: RunFolder, name: str, identities: list[Identity], points: list[Point]) -> None:
    """Keep what is asked of one kind of engine. Our own comes first: what it is compared with must be asked for again,
    for it may have changed as well."""
    before = {} if name == "ascend_kit" else folder.read_json("sweep") or {}
    parts = [identity.to_row() for identity in identities]
    entry = {"identities": parts, "points": [asdict(point) for point in points]}
    folder.write_json("sweep", {**before, name: entry})
