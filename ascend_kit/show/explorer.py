"""The views of 07_explore: controls in JupyterLab, and below them what they choose; headless the first choice of each.

What is drawn stands in outputs of its own and not inside a widget: a copy saved from JupyterLab shows the last choice
to a reader without a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ascend_kit.evaluation.compare import Run
from ascend_kit.files import Table
from ascend_kit.measure.rows import RATE
from ascend_kit.messages import phrase, translate
from ascend_kit.results import RunFolder
from ascend_kit.show import charts, explore, history, sweep_charts, tables
from ascend_kit.show.panel import show_widget
from ascend_kit.show.progress import in_browser

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST_CHOSEN = 4
MOST_LISTED = 60
MOST_DOCUMENTS = 100
EMPTY = "<p></p>"  # the note in place of a part that is not there
VIEWS = {"throughput": ("requests in flight", "output tokens/s"), "latency": ("requests in flight", "median TTFT, ms"),
         "pareto": ("median TPOT, ms", "output tokens/s")}  # fmt: skip
Draw = Callable[..., Sequence[Any]]  # values of the controls -> the parts to display, None for an empty one
# Name -> what to choose from, worked out anew for every choice of runs; None is a field to write in.
Controls = dict[str, Callable[[], list[str]] | None]


class Explorer:
    """Looks around in all runs below `root`. `chosen` are ticked at first, by default the newest with results.

    Figures of a headless pass are kept in `folder`.
    """

    def __init__(
        self, root: str | Path, chosen: Sequence[str] = (), folder: RunFolder | None = None, browser: bool | None = None
    ) -> None:
        self.every, self.folder = explore.find_runs(root), folder
        self.listed = explore.run_list(self.every.values())
        measured = [name for name, run in self.every.items() if run.sweep or run.has("acc")]
        named = [name for name in self.every if name in chosen or name.rpartition("/")[2] in chosen]
        self.chosen = named or measured[:FIRST_CHOSEN]
        self._browser = in_browser() if browser is None else browser
        self._views: list[_View] = []

    @property
    def runs(self) -> list[Run]:
        """The chosen runs."""
        return [self.every[name] for name in self.chosen]

    def choose(self) -> None:
        """The list of all runs with a box to tick for each; every view follows."""
        from IPython.display import display

        if not self._browser or self.listed.empty:
            display(tables.readable(self.listed))
            return
        import ipywidgets as w

        shown, cells = self.listed.head(MOST_LISTED), []
        for row in shown.to_dict("records"):
            box = w.Checkbox(value=row["run"] in self.chosen, indent=False, layout={"width": "20px"})
            box.observe(lambda change, name=row["run"]: self._tick(name, change["new"]), "value")
            cells += [box, *(w.HTML(_cell(value)) for value in row.values())]
        head = [w.HTML(f"<b>{tables.markup(phrase(name))}</b>") for name in ("", *shown.columns)]
        widths = f"24px repeat({len(shown.columns)}, auto)"
        grid = w.GridBox([*head, *cells], layout={"grid_template_columns": widths, "grid_gap": "0 14px"})
        title = w.HTML(translate("explore.choose"))
        show_widget(w.VBox([title, grid]), tables.readable(self.listed))

    def _tick(self, name: str, is_on: bool) -> None:
        wanted = {*self.chosen, name} if is_on else {*self.chosen} - {name}
        self.chosen = [one for one in self.every if one in wanted]
        for view in self._views:
            view.renew()

    def chart(self) -> None:
        """Any column against any other for the chosen runs; headless throughput, latency and the Pareto figure."""
        from IPython.display import display

        if self._browser:
            first, second = VIEWS["throughput"]
            self._show("chart", {"axis_x": partial(_axes, first), "axis_y": partial(_axes, second)}, self._chart)
            return
        table = explore.points(self.runs)
        for name, (x, y) in VIEWS.items():
            figure = explore.chart(table, x, y) if len(table) else None
            display(*filter(None, [self._keep(name, figure, f"{y} against {x}")]))

    def _chart(self, axis_x: str, axis_y: str) -> list[Any]:
        table = explore.points(self.runs)
        spec, picture = explore.vega(table, axis_x, axis_y), charts.picture(explore.chart(table, axis_x, axis_y))
        if spec is None:
            return [None]
        return [_Bundle({explore.VEGA_LITE: spec} | ({"image/png": picture._repr_png_()} if picture else {}))]

    def point(self) -> None:
        """One point: its row, the spread of TTFT and ITL, when each request waited and ran, what was held meanwhile."""
        self._show("point", {"point": lambda: list(explore.point_names(self._points()))}, self._point)

    def _points(self) -> Table:
        table = explore.points(self.runs)
        return table.sort_values(RATE, ascending=False, ignore_index=True) if len(table) else table

    def _point(self, point: str) -> list[Any]:
        import pandas

        table = self._points()
        place = explore.point_names(table).get(point)
        if place is None:
            return [None] * 4
        row = table.loc[place].dropna().to_dict()
        first = {name: row[name] for name in (*tables.SWEEP, *row) if name in row}
        requests, samples = (
            explore.lines_of(self.every[row["run"]], table, row["point_id"]) for table in ("requests", "samples")
        )
        spread, timeline = explore.histograms(requests), sweep_charts.request_timeline(requests)
        over_time = sweep_charts.over_time(samples, pandas.DataFrame([row]))
        return [
            tables.readable(pandas.DataFrame([first])),
            self._keep("histograms", spread, f"TTFT and ITL of one point: {point}"),
            self._keep("timeline", timeline, f"Requests of one point over time: {point}"),
            self._keep("over_time", over_time, f"Requests, KV cache and memory over time: {point}"),
        ]

    def profile(self) -> None:
        """Where a run's prefill and decode steps spend their time: operators, launches, the host's gap."""
        self._show("profile", {"profiled": self._profiled}, self._profile)

    def _profiled(self) -> list[str]:
        return [run.name for run in self.runs if len(tables.operators(run.folder))]

    def _profile(self, profiled: str) -> list[Any]:
        if profiled not in self.every:
            return [None] * 2
        folder = self.every[profiled].folder
        figure = self._keep("profile", charts.profile(folder), "Operators of a prefill and of a decode step by time")
        return [tables.readable(tables.operators(folder), keys=2), figure]

    def documents(self) -> None:
        """A task's documents that a run got wrong, or that turned over between two runs; with a search."""
        controls: Controls = {"run": self._evaluated, "task": self._tasks,
                              "other": lambda: [translate("explore.wrong"), *self._evaluated()],
                              "search": None}  # fmt: skip
        self._show("documents", controls, self._documents)

    def _evaluated(self) -> list[str]:
        return [run.name for run in self.runs if run.has("acc")]

    def _tasks(self) -> list[str]:
        return sorted({task for run in self.runs for task in run.answers("acc")})

    def _documents(self, run: str, task: str, other: str, search: str) -> list[Any]:
        if run not in self.every:
            return [None]
        found = explore.documents(self.every[run], task, self.every.get(other), search)
        return [tables.readable(found.head(MOST_DOCUMENTS))]

    def history(self) -> Table:
        """The table of repeated runs with regressions marked, after its figure; over all runs, not only the chosen."""
        from IPython.display import display

        table = history.history(self.every.values())
        figure = self._keep("history", history.history_chart(table), "Output tokens per second over versions")
        shown = tables.readable(table, keys=2) or tables.note(translate("explore.no_runs_again"))
        display(*filter(None, [shown, figure]))
        return table

    def _keep(self, name: str, figure: Figure | None, caption: str) -> Any:
        if self.folder is not None and not self._browser:
            return charts.keep(self.folder, f"explore_{name}", figure, caption, of_this_run=False)
        return charts.picture(figure)

    def _show(self, name: str, controls: Controls, draw: Draw) -> None:
        self._views.append(_View(name, controls, draw, self._browser))


class _View:
    """Controls and what is drawn for their values, one output for each part; headless the values stand above."""

    def __init__(self, name: str, controls: Controls, draw: Draw, browser: bool) -> None:
        from IPython.display import display

        self.name, self.controls, self.draw = name, controls, draw
        self.fields: dict[str, Any] = {}
        if browser:
            self._make_fields()
        parts = self._parts()
        if not browser:
            chosen = ", ".join(map(phrase, filter(None, self.values().values()))) if self._has_choice() else ""
            display(*[part for part in (tables.note(chosen), *parts) if part.data != EMPTY])
            return
        self.handles = [cast(Any, display(part, display_id=True)) for part in parts]

    def values(self) -> dict[str, str]:
        """The choice of each control; the first of what there is where nothing was chosen."""
        if self.fields:
            return {name: field.value or "" for name, field in self.fields.items()}
        return {name: next(iter(found() if found else ()), "") for name, found in self.controls.items()}

    def renew(self, *_: Any) -> None:
        """Draw again; controls offer what the chosen runs have."""
        for name, field in self.fields.items():
            found = self.controls[name]
            options = _titled(found()) if found else None
            if options is not None and tuple(options) != tuple(field.options):
                kept, values = field.value, [value for _, value in options]
                field.options = options
                field.value = kept if kept in values else next(iter(values), None)
        for handle, part in zip(self.handles, self._parts(), strict=True):
            handle.update(part)

    def _has_choice(self) -> bool:
        return bool(next(iter(self.values().values())))

    def _parts(self) -> list[Any]:
        """What is drawn, with nothing in place of empty parts; where all are empty, one sentence says why."""
        parts = self.draw(**self.values())
        why = "explore.none" if self._has_choice() else f"explore.no_{self.name}"
        told = translate(why) if all(part is None for part in parts) else ""
        return [tables.note(told if place == 0 else "") if part is None else part for place, part in enumerate(parts)]

    def _make_fields(self) -> None:
        import ipywidgets as w

        for name, found in self.controls.items():
            style = {"description": translate(f"explore.{name}"), "layout": {"width": "auto", "max_width": "560px"}}
            self.fields[name] = w.Dropdown(options=_titled(found()), **style) if found else w.Text(**style)
        show_widget(w.HBox(list(self.fields.values()), layout={"flex_flow": "row wrap"}))
        for field in self.fields.values():
            field.observe(self.renew, "value")


class _Bundle:
    """One output in several formats; the reader takes the richest that it knows."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {"text/plain": "", **self.data}


def _cell(value: Any) -> str:
    return f"<span style='white-space:normal'>{tables.markup(tables.cell_text(value))}</span>"


def _axes(first: str) -> list[str]:
    return list(dict.fromkeys([first, *explore.AXES]))


def _titled(options: list[str]) -> list[tuple[str, str]]:
    return [(phrase(option), option) for option in options]
