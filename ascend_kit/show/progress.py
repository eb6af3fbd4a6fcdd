"""Progress of long calls: a widget bar in the browser, plain lines headless, so that both copies read well.

Stored widgets are not drawn by static readers, hence the lines; a bar that has ended is replaced by its last line.
tqdm's bar is not used for that reason: it stays a widget for ever. A sweep also shows its table and chart, drawn
between points, never while one is measured, and as HTML and PNG: the last state is in the executed copy and needs no
kernel.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ascend_kit.measure.rows import asked_rows, load_rows
from ascend_kit.messages import notebook_shell, phrase, translate

if TYPE_CHECKING:
    from ascend_kit.measure.pace import EnginePlan
    from ascend_kit.params import Experiment
    from ascend_kit.results import RunFolder

# The Jupyter server names the session in the kernel's environment; headless executors do not.
BROWSER_VARIABLE = "JPY_SESSION_NAME"
LINE_EVERY_S = 5.0
LINE_EVERY_SHARE = 0.1
DRAW_EVERY_S = 0.5
FIGURE_EVERY_S = 2.0  # at most; a figure takes some tenths of a second
REPLICAS_IN_LINE = 8


def in_browser() -> bool:
    """Whether this process is a kernel behind an open notebook and not a headless execution."""
    return BROWSER_VARIABLE in os.environ and hasattr(notebook_shell(), "kernel")


class Progress:
    """A callback `(done, total, text)`, for every `on_progress` of this package; also a context manager.

    A call that returns to the start (another sweep with the same bar) starts a new count. With an `engine` on several
    cards its replicas are shown as well: a bar for each in the browser, a few words for each in a line headless.
    """

    def __init__(self, label: str, engine: Any = None, *, browser: bool | None = None) -> None:
        self.label = phrase(label)
        self._engine, self._replicas = engine, _Replicas()
        self._browser = in_browser() if browser is None else browser
        self._bar: _Bar | None = None  # made by the first call: work that was done before shows no bar
        self._start = self._last_line_s = time.monotonic()
        self._last_share = self._share = 0.0

    def __call__(self, done: float, total: float, text: str = "") -> None:
        share = done / total if total else 1.0
        if share < self._share:
            self._start, self._last_share, self._last_line_s = time.monotonic(), 0.0, 0.0
        self._share = share
        seconds = time.monotonic() - self._start
        is_due = not self._browser and self._is_due(share)
        if not (self._browser or is_due):
            return
        left = self._left_s(share, seconds) if 0.0 < share < 1.0 else None
        time_text = clock(seconds) + ("" if left is None else translate("progress.left", time=clock(left)))
        line = f"{_count(done, text)}/{_count(total, text)} ({share:.0%}), {time_text}"
        text = phrase(text)
        if self._browser:
            self._bar = self._bar or _Bar(self.label)
            self._bar.bar.value, self._bar.text.value = share, f"{line}  {text}"
            self._replicas.draw(_replica_rows(self._engine))
        else:
            self._last_share, self._last_line_s = share, time.monotonic()
            print(f"{self.label}: {line}{'  ' + text if text else ''}", flush=True)
            print(self._replicas.line(_replica_rows(self._engine)), end="", flush=True)

    def _left_s(self, share: float, seconds: float) -> float | None:
        """Seconds to the end after so many for this share; asked only where it is shown."""
        return seconds / share - seconds

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.finish(f" {translate('progress.stopped')}" if kind else "", "danger" if kind else "success")
        for bar in self._replicas.bars:
            bar.finish()

    def _is_due(self, share: float) -> bool:
        """The end always, else a tenth further or a while later: enough to follow, few enough to keep."""
        if share >= 1.0:
            return self._last_share < 1.0
        waited = time.monotonic() - self._last_line_s
        return waited >= LINE_EVERY_S or (share - self._last_share >= LINE_EVERY_SHARE and waited >= 1.0)


def _replica_rows(engine: Any) -> list[dict[str, Any]]:
    """The replicas of a loaded engine where there are several; their views cost a look each, no call."""
    if engine is None or engine.core is None:
        return []
    rows = engine.stats().get("replicas", [])
    return rows if len(rows) > 1 else []


class _Replicas:
    """All replicas in one view: state, requests, tokens/s and busy share since the last look, memory."""

    def __init__(self) -> None:
        self.bars: list[_Bar] = []
        self._last: dict[int, tuple[float, int, float]] = {}  # replica -> moment, tokens, busy seconds
        self._drawn_s = 0.0

    def line(self, rows: list[dict[str, Any]]) -> str:
        """One line of text, or none; more replicas than a line holds are counted."""
        if not rows:
            return ""
        parts = []
        for row in rows[:REPLICAS_IN_LINE]:
            rate, _ = self._since(row)
            parts.append(phrase(f"{row['replica']}: {_state(row)}{row['finished']} done, {rate:.0f} tokens/s"))
        if len(rows) > REPLICAS_IN_LINE:
            parts.append(phrase(f"{len(rows) - REPLICAS_IN_LINE} more"))
        return f"  {phrase('replicas')}  {'; '.join(parts)}\n"

    def draw(self, rows: list[dict[str, Any]]) -> None:
        """Bars of the busy share below each other, at most twice a second."""
        if not rows or time.monotonic() - self._drawn_s < DRAW_EVERY_S:
            return
        self._drawn_s = time.monotonic()
        self.bars = self.bars or [_Bar(phrase(f"replica {row['replica']}")) for row in rows]
        for shown, row in zip(self.bars, rows, strict=True):
            rate, busy = self._since(row)
            shown.bar.value, shown.bar.bar_style = busy, "" if row["state"] == "ready" else "danger"
            shown.text.value = phrase(
                f"{', '.join(row['card_names'])}: {_state(row)}{row['in_flight']} in flight, {row['finished']} done, "
                f"{rate:.0f} tokens/s, busy {busy:.0%}, {row['peak_memory_bytes'] / 2**30:.1f} GiB at most"
            )

    def _since(self, row: dict[str, Any]) -> tuple[float, float]:
        """(output tokens/s, busy share) since the last look at this replica; zeros at the first."""
        now = (time.monotonic(), row["output_tokens"], row["busy_s"])
        before = self._last.get(row["replica"], now)
        self._last[row["replica"]] = now
        seconds = now[0] - before[0]
        if seconds <= 0:
            return 0.0, 0.0
        return (now[1] - before[1]) / seconds, min(1.0, (now[2] - before[2]) / seconds)


def _state(row: dict[str, Any]) -> str:
    """Only what is out of the ordinary."""
    again = f"{row['restarts']} restarts, " if row["restarts"] else ""
    return again if row["state"] == "ready" else f"{row['state']}, {again}"


class _Bar:
    """A bar with text beside it. A Label shows text as it is: generated text is never markup."""

    def __init__(self, label: str) -> None:
        import ipywidgets
        from IPython.display import display

        style = {"description_width": "initial"}
        self.bar = ipywidgets.FloatProgress(value=0.0, max=1.0, description=label, style=style)
        self.text = ipywidgets.Label()
        self._shown: Any = display(ipywidgets.HBox([self.bar, self.text]), display_id=True)

    def finish(self, how: str = "", style: str = "") -> None:
        """Leave the last text in place of the bar, which needs a kernel; outside a notebook nothing was shown."""
        self.bar.bar_style = style
        if self._shown is not None:
            self._shown.update({"text/plain": f"{self.bar.description}: {self.text.value}{how}"}, raw=True)


def _count(value: float, text: str) -> str:
    """Counts as they are; where the caller counts bytes, MB."""
    return f"{value / 1e6:.1f} MB" if text.startswith("bytes") else f"{int(value)}"  # a part of a point is not done


def clock(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min" if minutes else f"{rest} s"


# --- a sweep ----------------------------------------------------------------------------------------------------------


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
        if self._browser and self._is_between and time.monotonic() - self._drawn_s >= FIGURE_EVERY_S:
            self._draw()

    def _left_s(self, share: float, seconds: float) -> float | None:
        """From the rows between points; while one is measured, that less the time since."""
        if not self._plans:
            return super()._left_s(share, seconds)
        if self._is_between:
            from ascend_kit.measure.pace import left_s  # imports torch

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

        from ascend_kit.show import charts, sweep_charts, tables

        rows = load_rows(self._folder)
        if rows.empty:
            return
        parts = [tables.sweep(rows), charts.picture(sweep_charts.throughput(rows)) or tables.note("")]
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
