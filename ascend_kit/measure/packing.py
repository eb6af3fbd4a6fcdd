"""Which sweep cells start next: each needs some cards, and there are only so many. Plain Python: no engine, no clock.

The rule is one sentence: of the waiting cells the one that needs most cards and fits now starts, equals in input
order. Cards are busy whenever something fits them, and no schedule of the same cells on one machine can be more than
twice as fast (Garey and Graham, SIAM J. Comput. 4 (1975): at any two moments further apart than the longest cell,
more than all cards together are in use).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ascend_kit.params import Experiment


class Layout(NamedTuple):
    """How an engine uses cards: cards / tensor_parallel copies of the model, each over tensor_parallel cards."""

    cards: int
    tensor_parallel: int

    def __str__(self) -> str:
        split = f", tensor parallel {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        return f"{self.cards} card{'s' if self.cards > 1 else ''}{split}"


class Room(NamedTuple):
    """Cards that are free now. `largest`: cards of the largest machine, free or not; `budget`: how many may be taken
    in all, where machines have more than the experiment asks for."""

    free: Mapping[str, int]
    largest: int
    budget: int


def fits(layout: Layout, room: Room) -> bool:
    """Whether the free cards hold the layout. A copy of the model stays within a machine where one is large enough;
    replicas may lie on different ones."""
    if layout.cards > room.budget:
        return False
    if layout.tensor_parallel > room.largest:
        return layout.cards <= sum(room.free.values())
    copies = sum(count // layout.tensor_parallel for count in room.free.values())
    return copies >= layout.cards // layout.tensor_parallel


def next_layout(waiting: Iterable[Layout], room: Room) -> Layout | None:
    """The waiting layout with most cards that fits, equals in input order; None when nothing fits."""
    fitting = [layout for layout in waiting if fits(layout, room)]
    return max(fitting, key=lambda layout: layout.cards, default=None)  # max keeps the first of equals


def layout_experiments(experiment: Experiment) -> dict[Layout, Experiment]:
    """For each of `sweep_layouts` the experiment as if it were about that layout alone, on a Ray that is there."""
    return {
        Layout(*pair): experiment.on_cards(*pair, ray_address=experiment.ray_address or "auto")
        for pair in experiment.sweep_layouts
    }
