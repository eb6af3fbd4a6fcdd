"""A figure of simulated plans: at which load tensor parallel gives more than replicas, and where that ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ascend_kit.files import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from ascend_kit.show.drawing import FONT, PALETTE, finish, log2_axis, make_grid, nothing, value_axis


def layouts_by_load(plans: Table) -> Figure:
    """Predicted output tokens/s against requests in flight, a line per tensor-parallel size, a panel per `model` and
    number of `cards`. A split that does not divide the model, or a load that does not fit, has no point."""
    drawable = plans.dropna(subset=["output_tokens_per_s"]) if not plans.empty else plans
    if drawable.empty:
        return nothing("no plan fits: use a larger card, more cards or a smaller precision")
    models, cards = list(dict.fromkeys(drawable["model"])), sorted(drawable["cards"].unique())
    sizes = sorted(drawable["tensor_parallel"].unique())
    figure, grid = make_grid(len(cards), len(models), height=3.4, width=5.4)
    for line, count in zip(grid, cards, strict=True):
        for axes, model in zip(line, models, strict=True):
            part = drawable[(drawable["model"] == model) & (drawable["cards"] == count)]
            for size, colour in zip(sizes, PALETTE, strict=False):
                one = part[part["tensor_parallel"] == size].sort_values("concurrency")
                axes.plot(one["concurrency"], one["output_tokens_per_s"], "o-", markersize=4, color=colour,
                          label="replicas of one card" if size == 1 else f"tensor parallel {size}")  # fmt: skip
            log2_axis(axes, part["concurrency"])
            value_axis(axes, "predicted output tokens/s", log=True)
            axes.set_title(f"{model} on {count} cards", fontsize=FONT)
    return finish(figure, "The same cards as replicas or tensor parallel: simulated, not measured")
