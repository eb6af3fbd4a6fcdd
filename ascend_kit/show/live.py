"""A sweep as it grows: how long it will take, then a bar, a table and a chart in the browser, plain lines headless.

Table and chart are drawn between points, never while one is measured, and as HTML and PNG: the last state is in the
executed copy and needs no kernel.
"""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING, Any

from ascend_kit.files import Table
from ascend_kit.messages import translate
from ascend_kit.show import sweep_charts, tables
from ascend_kit.show.progress import Progress, clock

if TYPE_CHECKING:
    from ascend_kit.params import Experiment
    from ascend_kit.results import RunFolder

DRAW_EVERY_S = 2.0  # at most; a figure takes some tenths of a second


class LiveSweep(Progress):
    """The `on_progress` of `measure_engines`, and a context manager. `expected` is what `expectations` gave."""

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        engine: Any = None,
        *,
        expected: Table | None = None,
        browser: bool | None = None,
    ) -> None:
        super().__init__("sweep", engine, browser=browser)
        self._experiment, self._folder, self._expected = experiment, folder, expected
        self._shown: list[Any] = []  # handles of the table and of the chart
        self._drawn_s = 0.0

    def __enter__(self) -> LiveSweep:
        if self._expected is not None:
            print(duration(self._expected, self._experiment), flush=True)
        return self

    def __call__(self, done: float, total: float, text: str = "") -> None:
        super().__call__(done, total, text)
        is_between = done == int(done)  # a part of a point is told while it is measured
        if self._browser and is_between and time.monotonic() - self._drawn_s >= DRAW_EVERY_S:
            self._draw()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        super().__exit__(kind, *rest)
        if self._shown:
            self._draw()

    def _draw(self) -> None:
        from IPython.display import display

        from ascend_kit.measure.rows import load_rows

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


def duration(expected: Table, experiment: Experiment) -> str:
    """How many points a sweep has and about how long it takes, as if every engine were as fast as ours should be."""
    possible = expected[expected["reason"].isna()]
    engines, repeats = len(experiment.engine_specs), experiment.sweep_repeats
    seconds = possible["predicted_s"].sum(min_count=1) * engines * repeats
    known = {"points": len(possible) * engines * repeats, "engines": engines}
    if seconds != seconds:
        return translate("sweep.size", **known)
    return translate("sweep.duration", time=clock(max(1.0, seconds)), **known)


def _picture(figure: Any) -> Any:
    from IPython.display import Image

    if figure is None:
        return tables.note("")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, bbox_inches="tight")
    return Image(data=png.getvalue(), format="png")
