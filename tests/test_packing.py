"""Which cells of a sweep run together, decided without an engine; then the runner with stand-in engines in threads."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_kit.measure.cells import Cell, CellRunner
from ascend_kit.measure.expectation import Point
from ascend_kit.measure.packing import Layout, Room, fits, next_layout

POINT = Point(1, 8, 4, 4)


def layouts_within(cards):
    sizes = [Layout(count, size) for count in range(1, cards + 1) for size in range(1, count + 1) if count % size == 0]
    return st.sampled_from(sizes)


@st.composite
def workloads(draw):
    cards = draw(st.integers(1, 8))
    return cards, draw(st.lists(st.tuples(layouts_within(cards), st.integers(1, 9)), min_size=1, max_size=30))


def simulate(cards, jobs):
    """(start, end, cards) of each job, (layout, duration), on one machine; engines load in no time."""
    waiting, running, spans, now, free = list(enumerate(jobs)), [], {}, 0, cards
    while waiting or running:
        while (layout := next_layout([job[0] for _, job in waiting], Room({"a": free}, cards, free))) is not None:
            entry = next(entry for entry in waiting if entry[1][0] == layout)
            waiting.remove(entry)
            number, (_, duration) = entry
            spans[number] = (now, now + duration, layout.cards)
            heapq.heappush(running, (now + duration, layout.cards))
            free -= layout.cards
        now, count = heapq.heappop(running)
        free += count
    return [spans[number] for number in range(len(jobs))]


@given(workloads())
def test_all_cells_run_once_within_the_cards_and_in_twice_the_least_time_at_most(workload):
    cards, jobs = workload

    spans = simulate(cards, jobs)

    moments = {start for start, _, _ in spans}
    assert all(sum(count for start, end, count in spans if start <= now < end) <= cards for now in moments)
    work = sum(layout.cards * duration for layout, duration in jobs)
    least = max(work / cards, max(duration for _, duration in jobs))
    assert max(end for _, end, _ in spans) <= 2 * least


@given(workloads())
def test_no_cards_are_idle_while_a_cell_that_fits_them_waits(workload):
    cards, jobs = workload

    spans = simulate(cards, jobs)

    for start, _, count in spans:
        for now in {begin for begin, _, _ in spans if begin < start}:
            in_use = sum(other for begin, end, other in spans if begin <= now < end)
            assert count > cards - in_use


def test_the_largest_starts_first_and_smaller_ones_fill_what_is_left():
    spans = simulate(4, [(Layout(1, 1), 2), (Layout(2, 2), 2), (Layout(4, 4), 2), (Layout(3, 1), 2), (Layout(2, 1), 2)])

    assert [start for start, _, _ in spans] == [2, 4, 0, 2, 4]


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 8), min_size=1), layouts_within(8))
def test_a_layout_that_fits_can_be_placed_copy_by_copy_in_any_order(free, layout):
    largest = 8
    room = Room(free, largest, sum(free.values()))
    left = dict(free)

    for _ in range(layout.cards // layout.tensor_parallel):
        place = next((name for name in sorted(left) if left[name] >= layout.tensor_parallel), None)
        if place is None:
            break
        left[place] -= layout.tensor_parallel
    else:
        assert fits(layout, room)
        return
    assert not fits(layout, room)


def test_a_copy_larger_than_any_machine_spans_them_and_the_budget_is_kept():
    assert fits(Layout(8, 8), Room({"a": 4, "b": 4}, 4, 8))
    assert not fits(Layout(4, 4), Room({"a": 3, "b": 3}, 4, 6))
    assert not fits(Layout(4, 1), Room({"a": 8}, 8, 2))


class Machines:
    """Benches that hold cards of one machine while open, and note what happens."""

    def __init__(self, cards, *, broken=(), poor=(), seconds=0.02):
        self.cards, self.broken, self.poor, self.seconds = cards, broken, poor, seconds
        self.lock, self.in_use, self.opened, self.rows, self.events = threading.Lock(), 0, [], [], []

    def run(self, layouts, at_once=True, on_event=None):
        cells = [Cell(number, Layout(*layout), POINT) for number, layout in enumerate(layouts)]
        note = on_event or (lambda cell, text: self.events.append((cell.number, text)) if cell else None)
        runner = CellRunner(
            cells,
            {"a": self.cards},
            self.cards,
            lambda layout: StandInBench(self, layout),
            at_once=at_once,
            on_event=note,
        )
        runner.run()
        assert self.in_use == 0
        return {number: sorted(neighbours) for number, neighbours in self.rows}


class StandInBench:
    def __init__(self, machines, layout):
        self.machines, self.layout, self.is_open = machines, layout, False

    def open(self):
        if self.layout in self.machines.broken:
            raise MemoryError("does not fit")
        with self.machines.lock:
            self.is_open = True
            self.machines.in_use += self.layout.cards
            self.machines.opened.append(self.layout)
            assert self.machines.in_use <= self.machines.cards
        return Counter(a=self.layout.cards)

    def measure(self, cell, neighbours):
        assert self.is_open and cell.layout == self.layout
        time.sleep(self.machines.seconds)
        self.machines.rows.append((cell.number, list(neighbours)))
        return cell.number not in self.machines.poor, "measured"

    def fail(self, cell, error):
        return f"failed: {error}"

    def close(self):
        with self.machines.lock:
            self.machines.in_use -= self.layout.cards if self.is_open else 0
            self.is_open = False


def test_two_cells_of_two_cards_run_at_the_same_time_on_four_and_an_engine_is_used_again():
    machines = Machines(4, seconds=0.1)

    neighbours = machines.run([(2, 2)] * 4)

    assert machines.opened == [Layout(2, 2)] * 2
    assert neighbours[0] and all(neighbours.values())


def test_cells_of_one_two_and_four_cards_are_packed_largest_first():
    machines = Machines(4, seconds=0.1)

    neighbours = machines.run([(1, 1), (2, 1), (4, 2), (1, 1), (2, 2)])

    assert [layout.cards for layout in machines.opened] == [4, 2, 2, 1, 1]
    assert neighbours[2] == [] and 4 in neighbours[1] and 3 in neighbours[0]


def test_one_at_a_time_shares_nothing_and_loads_each_layout_once():
    machines = Machines(4)

    neighbours = machines.run([(1, 1), (2, 1), (1, 1), (2, 1)], at_once=False)

    assert machines.opened == [Layout(2, 1), Layout(1, 1)] and set(map(tuple, neighbours.values())) == {()}
    assert [number for number, _ in machines.events] == [1, 3, 0, 2]


def test_a_layout_that_cannot_be_opened_fails_its_cells_and_no_others():
    machines = Machines(4, broken=[Layout(4, 1)])

    neighbours = machines.run([(4, 1), (1, 1), (4, 1), (2, 1)])

    assert sorted(neighbours) == [1, 3]
    assert [number for number, text in machines.events if "does not fit" in text] == [0, 2]


def test_an_engine_whose_cell_failed_is_replaced():
    machines = Machines(2, poor=[0])

    machines.run([(2, 1)] * 3)

    assert machines.opened == [Layout(2, 1)] * 2


def test_an_interruption_closes_every_engine():
    machines = Machines(4)

    def interrupt(cell, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        machines.run([(2, 1)] * 6, on_event=interrupt)

    assert machines.in_use == 0 and len(machines.rows) < 6


def test_a_layout_that_no_machine_holds_is_refused_and_does_not_hang():
    machines = Machines(2)

    with pytest.raises(ValueError, match=r"3 cards: no place for it on machines with \{'a': 2\} cards"):
        machines.run([(3, 1)])
