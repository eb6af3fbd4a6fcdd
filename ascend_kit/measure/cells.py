"""Runs the cells of a sweep on engines of different sizes, as many at a time as the cards allow.

A cell is a point on a layout of cards. An engine stays open while cells of its layout wait, so a model is loaded once
per engine and not once per cell. Engines load one after the other: they share the disk, and where an engine lies is
known only when it is open. What an engine is and how a cell is measured is the caller's business.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from ascend_kit.measure.expectation import Point
from ascend_kit.measure.packing import Layout, Room, fits, next_layout

TICK_S = 1.0  # between two looks at the running cells
JOIN_S = 30.0  # after an interruption: until a thread whose engine was closed has noticed


class Cell(NamedTuple):
    """One point on one layout; `number` is its place in the sweep."""

    number: int
    layout: Layout
    point: Point

    def __str__(self) -> str:
        return f"{self.layout}, {self.point}"


class Bench(Protocol):
    """An engine of one layout, closed at first. `open` and `measure` are called in a thread."""

    layout: Layout

    def open(self) -> Counter[str]:
        """Load the model; the cards it took of each machine."""

    def measure(self, cell: Cell, neighbours: Sequence[int]) -> tuple[bool, str]:
        """Measure a cell and keep its row; whether that worked, and a few words. `neighbours` grows meanwhile: the
        numbers of the cells that were at work at the same time."""

    def fail(self, cell: Cell, error: BaseException) -> str:
        """Keep a row for a cell whose engine could not be opened; a few words."""

    def close(self) -> None:
        """Free the cards."""


class _Ended(NamedTuple):
    bench: Bench
    cell: Cell
    succeeded: bool
    text: str
    error: BaseException | None = None  # of `open`


class CellRunner:
    """`run` returns when every cell was tried. `machines` have so many cards each, of which `cards` may be used in all;
    without `at_once` one cell runs at a time."""

    def __init__(
        self,
        cells: Sequence[Cell],
        machines: dict[str, int],
        cards: int,
        make_bench: Callable[[Layout], Bench],
        *,
        at_once: bool,
        on_event: Callable[[Cell | None, str], None],
    ) -> None:
        self._waiting, self._machines, self._cards, self._make_bench = list(cells), machines, cards, make_bench
        self._at_once, self._on_event = at_once, on_event
        self._events: queue.Queue[_Ended | None] = queue.Queue()
        self._running: dict[Bench, Cell] = {}
        self._idle: list[Bench] = []
        self._opening: Bench | None = None
        self._taken: dict[Bench, Counter[str]] = {}  # cards of the open engines
        self._threads: dict[Bench, threading.Thread] = {}
        self._neighbours: dict[int, list[int]] = {}

    def run(self) -> None:
        """Measure all cells. `on_event(cell, text)` is called, in this thread, after each one, and about once a second
        with no cell and the running ones as text. An interruption closes all engines."""
        try:
            while self._waiting or self._running:
                while self._start_one():
                    pass
                if not self._running:
                    raise ValueError(
                        f"{self._waiting[0].layout}: no place for it on machines with {self._machines} cards"
                    )
                self._handle()
        finally:
            self._close_all()

    def _start_one(self) -> bool:
        if self._running and not self._at_once:
            return False
        candidates = [cell.layout for cell in self._waiting]
        if self._opening is not None:  # where it will lie is not known yet, so only open engines are sure to have room
            ready = {bench.layout for bench in self._idle}
            candidates = [layout for layout in candidates if layout in ready]
        layout = next_layout(candidates, self._room(idle_too=True))
        if layout is None:
            return False
        self._start(next(cell for cell in self._waiting if cell.layout == layout))
        return True

    def _room(self, *, idle_too: bool) -> Room:
        """What is free, or would be if idle engines were closed."""
        used: Counter[str] = Counter()
        for bench, cards in self._taken.items():
            if not (idle_too and bench in self._idle):
                used.update(cards)
        free = {name: count - used[name] for name, count in self._machines.items()}
        return Room(free, max(self._machines.values()), self._cards - used.total())

    def _start(self, cell: Cell) -> None:
        bench = next((bench for bench in self._idle if bench.layout == cell.layout), None)
        if bench is None:
            bench = self._opening = self._new_bench(cell.layout)
        else:
            self._idle.remove(bench)
        self._neighbours[cell.number] = [other.number for other in self._running.values()]
        for other in self._running.values():
            self._neighbours[other.number].append(cell.number)
        self._waiting.remove(cell)
        self._running[bench] = cell
        # Daemons: a process that is to end must not wait for a measurement.
        thread = threading.Thread(target=self._work, args=(bench, cell), daemon=True, name=f"cell-{cell.number}")
        self._threads[bench] = thread
        thread.start()

    def _new_bench(self, layout: Layout) -> Bench:
        """A bench whose cards are free once idle engines of other layouts have made way."""
        while self._idle and not fits(layout, self._room(idle_too=False)):
            self._close(self._idle.pop())
        return self._make_bench(layout)

    def _work(self, bench: Bench, cell: Cell) -> None:
        """In a thread: open the engine if need be, measure, report."""
        try:
            if bench is self._opening:
                self._taken[bench] = bench.open()
                self._opening = None
                self._events.put(None)
        except BaseException as error:
            self._events.put(_Ended(bench, cell, False, "", error))
            return
        try:
            self._events.put(_Ended(bench, cell, *bench.measure(cell, self._neighbours[cell.number])))
        except BaseException as error:
            self._events.put(_Ended(bench, cell, False, f"failed: {type(error).__name__}: {error}"))

    def _handle(self) -> None:
        """Wait for the next event and take it in."""
        try:
            event = self._events.get(timeout=TICK_S)
        except queue.Empty:
            self._on_event(None, "; ".join(str(cell) for cell in self._running.values()))
            return
        if event is None:
            return
        bench, cell, succeeded, text, error = event
        del self._running[bench]
        if error is not None:
            self._opening = None
            self._close(bench)
            self._give_up(bench, cell, error)
            return
        if succeeded and any(waiting.layout == bench.layout for waiting in self._waiting):
            self._idle.append(bench)
        else:  # nothing more to do for it, or not to be trusted any more
            self._close(bench)
        self._on_event(cell, text)

    def _give_up(self, bench: Bench, cell: Cell, error: BaseException) -> None:
        """An engine could not be opened: so it would be for every cell of the layout, unless another one is open."""
        lost = [cell]
        if not any(other.layout == bench.layout for other in (*self._running, *self._idle)):
            lost += [waiting for waiting in self._waiting if waiting.layout == bench.layout]
        for one in lost:
            if one in self._waiting:
                self._waiting.remove(one)
            self._on_event(one, bench.fail(one, error))

    def _close(self, bench: Bench) -> None:
        self._taken.pop(bench, None)
        self._threads.pop(bench, None)
        bench.close()

    def _close_all(self) -> None:
        threads = dict(self._threads)
        for bench in [*self._running, *self._idle]:
            self._close(bench)
        for bench in self._running:
            threads[bench].join(JOIN_S)
