"""Several runs beside each other, as a figure."""

from __future__ import annotations

from ascend_kit.files import Table


def interval_points(table: Table) -> Table:
    """Rows of a comparison's table that have both values, as `plots.accuracy_vs_throughput` wants them."""
    table = table.dropna(subset=["accuracy_percent", "output_tokens_per_s"])
    spread = table["accuracy_high_percent"].astype(float) - table["accuracy_low_percent"].astype(float)
    return table.assign(
        accuracy=table["accuracy_percent"].astype(float) / 100,
        accuracy_stderr=spread / (2 * 1.96 * 100),
        tokens_per_s=table["output_tokens_per_s"].astype(float),
        tokens_per_s_low=table.get("output_tokens_per_s_low"),
        tokens_per_s_high=table.get("output_tokens_per_s_high"),
    )
