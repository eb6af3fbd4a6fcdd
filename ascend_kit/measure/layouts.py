"""A sweep over layouts: every point on engines of several sizes, which share the cards of the experiment.

All engines are replicas on Ray, those of one card too, so that layouts differ in their cards and in nothing else.
Points that were measured at the same time say so (`ran_with`, the numbers of the other cells): separate cards do not
disturb each other, but the host's processor and memory are shared. On a CPU, where the "cards" are the same cores,
cells therefore run one by one unless `sweep_at_once` says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.engine.ray_session import RaySession
from ascend_kit.measure.backends import EngineBackend
from ascend_kit.measure.cells import Cell, CellRunner
from ascend_kit.measure.expectation import sweep_points
from ascend_kit.measure.measurement import KEY, Measurement, Progress
from ascend_kit.measure.packing import Layout, layout_experiments

if TYPE_CHECKING:
    from ascend_kit.params import Experiment
    from ascend_kit.results import RunFolder


def measure_layouts(
    engine: AscendInferEngine,
    experiment: Experiment,
    folder: RunFolder,
    ceilings: dict[str, Any],
    *,
    on_progress: Progress | None = None,
) -> None:
    """Measure every point on every layout of `sweep_layouts` that has no ok row yet, and close `engine` before.

    Points go in the order of the sweep, layouts with most cards first. ValueError, before anything is closed, for a
    layout that the model cannot be split into.
    """
    plans = layout_experiments(experiment)
    for plan in plans.values():
        AscendInferEngine.from_experiment(plan, engine.model_path)  # checks that the model can be divided so
    known = {one: Measurement(EngineBackend(engine, plan), plan, folder, ceilings) for one, plan in plans.items()}
    pairs = [(layout, point) for layout in plans for point in sweep_points(experiment)]
    cells = [Cell(number, layout, point) for number, (layout, point) in enumerate(pairs)]
    done = folder.done_keys("rows", KEY)
    waiting = [cell for cell in cells if known[cell.layout].key(cell.point) not in done]
    tell = _Teller(len(cells), len(cells) - len(waiting), on_progress)
    kind, path = engine.device.kind, engine.model_path
    engine.close()
    if not waiting:
        return
    at_once = kind != "cpu" if experiment.sweep_at_once is None else experiment.sweep_at_once
    session = RaySession(
        kind, experiment.cards, experiment.ray_address, experiment.device_id, cards_in_use=experiment.cards * at_once
    )
    try:
        CellRunner(
            waiting,
            dict(session.machines()),
            experiment.cards,
            lambda layout: _EngineBench(layout, plans[layout], path, folder, ceilings, known[layout]),
            at_once=at_once,
            on_event=tell,
        ).run()
    finally:
        session.close()


class _EngineBench:
    """A `Bench` with an engine of its own."""

    def __init__(
        self,
        layout: Layout,
        plan: Experiment,
        model_path: str,
        folder: RunFolder,
        ceilings: dict[str, Any],
        known: Measurement,
    ) -> None:
        self.layout, self._plan, self._folder, self._ceilings, self._known = layout, plan, folder, ceilings, known
        self._engine = AscendInferEngine.from_experiment(plan, model_path)
        self._measurement: Measurement | None = None
        self._is_closed = False

    def open(self) -> Counter[str]:
        self._engine.load_model()
        if self._is_closed:
            self._engine.close()
            raise RuntimeError("the sweep was interrupted")
        backend = EngineBackend(self._engine, self._plan)
        self._measurement = Measurement(backend, self._plan, self._folder, self._ceilings)
        return Counter(place.address for one in self._engine.core.replicas for place in one.places)

    def measure(self, cell: Cell, neighbours: Sequence[int]) -> tuple[bool, str]:
        return self._measurement.measure(cell.point, {"cell": cell.number, "ran_with": neighbours})

    def fail(self, cell: Cell, error: BaseException) -> str:
        return self._known.fail(cell.point, {"cell": cell.number, "ran_with": []}, error)

    def close(self) -> None:
        self._is_closed = True
        if self._measurement is not None:
            self._measurement.is_stopped = True
        self._engine.close()


class _Teller:
    """Turns what the runner reports into progress: how many cells are done, and which are at work."""

    def __init__(self, total: int, done: int, on_progress: Progress | None) -> None:
        self.total, self.done, self.on_progress = total, done, on_progress

    def __call__(self, cell: Cell | None, text: str) -> None:
        self.done += cell is not None
        if self.on_progress:
            self.on_progress(self.done, self.total, f"{cell}: {text}" if cell else f"at work: {text}")
