"""How sure the answers are against how often they are right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ascend_kit.files import Table
from ascend_kit.show.drawing import FONT, GREY, config_looks, finish, make_grid, tip

if TYPE_CHECKING:
    from matplotlib.figure import Figure


ENOUGH = 10  # documents of a bin: its accuracy is known to some 30 points at worst


def reliability(table: Table) -> Figure | None:
    """Accuracy against mean confidence of each bin, a line per set; on the diagonal confidence is what it says.

    Bins of fewer than ten documents are grey points beside the lines.
    """
    if table.empty:
        return None
    looks = config_looks(table["set"])
    figure, ((axes,),) = make_grid(1, 1, height=4.4, width=6)
    axes.plot([0, 100], [0, 100], "--", color=GREY, label="as sure as right")
    for name, part in table.groupby("set", sort=True):
        is_known = part["documents"] >= ENOUGH
        for here, look in ((part[~is_known], {"color": GREY, "linestyle": "none", "marker": "."}),
                           (part[is_known], {**looks[str(name)], "label": str(name)})):  # fmt: skip
            if here.empty:
                continue
            points = axes.plot(100 * here["confidence"], 100 * here["accuracy"], **look)
            tip(
                points[0],
                [f"{row.accuracy:.0%} right of {row.documents} at {row.confidence:.0%}" for row in here.itertuples()],
            )
    axes.set_xlim(0, 102)
    axes.set_ylim(0, 102)
    axes.set_xlabel("confidence: share of the best choice's probability, % (mean of a bin)", fontsize=FONT)
    axes.set_ylabel("right answers, %", fontsize=FONT)
    return finish(
        figure, "Calibration", "accuracy against confidence in ten bins of each set; grey: fewer than ten documents"
    )
