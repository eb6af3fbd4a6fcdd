"""The throughput sweep: concurrency x prompt length x output length x repeats, one row per point, resumable.

Rows go to `rows`, raw request timelines to `requests`, the load of each card to `cards`, measured ceilings to
`ceilings`. A row is written when its point ends; a point that fails becomes a row with status failed and its error,
and the sweep goes on. With several `sweep_layouts` every point is measured on each of them, see `layouts`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ascend_kit.measure.backends import Backend, as_backend, baseline_backend
from ascend_kit.measure.expectation import check_points, load_ceilings, sweep_points
from ascend_kit.measure.measurement import KEY, Measurement, Progress

if TYPE_CHECKING:
    import pandas

    from ascend_kit.params import Experiment
    from ascend_kit.results import RunFolder

TABLES = ("rows", "requests", "cards", "ceilings")


def run_sweep(
    engine: Any,
    experiment: Experiment,
    folder: RunFolder,
    *,
    on_progress: Progress | None = None,
    ceilings: dict[str, Any] | None = None,
) -> pandas.DataFrame:
    """Measure every point that has no ok row yet; returns all rows of the folder, failed ones included.

    `engine` is a loaded AscendInferEngine or any `Backend`. `on_progress(done, total, text)` is called after every
    point and about once a second meanwhile. `ceilings` as `measure_ceilings` returns them; by default those in the
    folder, else measured now. Raises SweepError for impossible points before any work.

    Where the experiment's `sweep_layouts` are others than the engine's own, the engine is closed: its cards are needed.
    """
    backend = as_backend(engine, experiment)
    points = sweep_points(experiment)
    check_points(points, min(backend.max_seq_length, experiment.max_seq_length))
    folder.begin(experiment, *TABLES)
    ceilings = ceilings or load_ceilings(backend, folder)
    if backend is not engine and experiment.sweep_layouts != [(experiment.cards, experiment.tensor_parallel)]:
        from ascend_kit.measure.layouts import measure_layouts

        measure_layouts(engine, experiment, folder, ceilings, on_progress=on_progress)
    else:
        _measure_points(backend, experiment, folder, ceilings, on_progress)
    return load_rows(folder)


def _measure_points(
    backend: Backend, experiment: Experiment, folder: RunFolder, ceilings: dict[str, Any], on_progress: Progress | None
) -> None:
    """Every point on one engine, one after the other."""
    measurement = Measurement(backend, experiment, folder, ceilings)
    points, done = sweep_points(experiment), folder.done_keys("rows", KEY)
    for number, point in enumerate(points):
        name = f"{backend.name}: {point}"

        def tell(share: float, number: int = number, name: str = name) -> None:
            if on_progress:
                on_progress(number + share, len(points), name)

        text = "already done"
        if measurement.key(point) not in done:
            _, text = measurement.measure(point, {"cell": number, "ran_with": []}, on_share=tell)
        if on_progress:
            on_progress(number + 1, len(points), f"{name}: {text}")


def load_rows(folder: RunFolder) -> pandas.DataFrame:
    """All rows of a sweep in the order of its points, whenever they were measured; engine by engine."""
    rows = folder.load("rows")
    if rows.empty or "cell" not in rows:
        return rows
    order = {name: place for place, name in enumerate(dict.fromkeys(rows["backend"]))}
    by = rows.assign(_backend=rows["backend"].map(order)).sort_values(["_backend", "cell"], kind="stable")
    return by.drop(columns="_backend").reset_index(drop=True)


def run_baseline_sweep(
    experiment: Experiment, folder: RunFolder, *, device: Any = None, on_progress: Progress | None = None
) -> pandas.DataFrame:
    """The same sweep with transformers' `generate`, unless `sweep_baseline` is off; returns all rows.

    Call it once the engine is closed: two models at a time would compete for memory. The checkpoint is not
    even loaded when every point is done.
    """
    if not experiment.sweep_baseline:
        return load_rows(folder)
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
