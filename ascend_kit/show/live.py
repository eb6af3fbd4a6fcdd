"""A sweep as it grows: how long it will take, then a bar, a table and a chart in the browser, plain lines headless.

Table and chart are drawn between points, never while one is measured, and as HTML and PNG: the last state is in the
executed copy and needs no kernel.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ascend_kit.measure.pace import EnginePlan, left_s
from ascend_kit.measure.rows import asked_rows, load_rows
from ascend_kit.messages import translate
from ascend_kit.show import sweep_charts, tables
from ascend_kit.show.progress import Progress, clock

if TYPE_CHECKING:
    from ascend_kit.params import Experiment
    from ascend_kit.results import RunFolder

DRAW_EVERY_S = 2.0  # at most; a figure takes some tenths of a second


class LiveSweep(Progress):
    """The `on_progress` of `measure_engines`, and a context manager. `plans` is what `engine_plans` gave."""

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        engine: Any = None,
        *,
        plans: Sequence[EnginePlan] = (),
        browser: bool | None = None,
    ) -> None:
        super().__init__("sweep", engine, browser=browser)
        self._experiment, self._folder, self._plans = experiment, folder, plans
        self._reckoned: tuple[float, float] | None = None  # moment, seconds left then
        self._shown: list[Any] = []  # handles of the table and of the chart
        self._drawn_s, self._is_between = 0.0, True

    def __enter__(self) -> LiveSweep:
        if self._plans:
            print(duration(self._plans), flush=True)
        return self

    def __call__(self, done: float, total: float, text: str = "") -> None:
        self._is_between = done == int(done)  # a part of a point is told while it is measured
        super().__call__(done, total, text)
        if self._browser and self._is_between and time.monotonic() - self._drawn_s >= DRAW_EVERY_S:
            self._draw()

    def _left_s(self, share: float, seconds: float) -> float | None:
        """From the rows between points; while one is measured, that less the time since."""
        if not self._plans:
            return super()._left_s(share, seconds)
        if self._is_between:
            found = left_s(self._plans, asked_rows(self._folder))
            self._reckoned = None if found is None else (time.monotonic(), found)
        if self._reckoned is None:
            return None
        left = self._reckoned[1] - (time.monotonic() - self._reckoned[0])
        return left if left >= 1 else None  # it takes longer than its like: better no word than a wrong one

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        super().__exit__(kind, *rest)
        if self._shown:
            self._draw()

    def _draw(self) -> None:
        from IPython.display import display

        rows = load_rows(self._folder)
        if rows.empty:
            return
        parts = [tables.sweep(rows), _picture(sweep_charts.throughput(rows))]
        if self._shown:
            for handle, part in zip(self._shown, parts, strict=True):
                if handle is not None:  # outside a kernel there is none
                    handle.update(part)
        else:
            self._shown = [display(part, display_id=True) for part in parts]
        self._drawn_s = time.monotonic()


def duration(plans: Sequence[EnginePlan]) -> str:
    """How many points a sweep has, and how long those take whose speed could be predicted."""
    known = {"points": sum(plan.num_points for plan in plans), "engines": len(plans)}
    seconds = [plan.seconds for plan in plans if plan.seconds is not None]
    if not seconds:
        return translate("sweep.size", **known)
    text = translate("sweep.duration", time=clock(max(1.0, sum(seconds))), **known)
    unknown = ", ".join(plan.name for plan in plans if plan.seconds is None)
    return text + (translate("sweep.unknown_speed", names=unknown) if unknown else "")


def _picture(figure: Any) -> Any:
    from IPython.display import Image

    if figure is None:
        return tables.note("")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, bbox_inches="tight")
    return Image(data=png.getvalue(), format="png")
