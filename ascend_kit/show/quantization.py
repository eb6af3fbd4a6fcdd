"""What int8 costs linear by linear, and which mix was chosen: figures and table from a conversion's manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ascend_kit.show import figure, plots, tables

if TYPE_CHECKING:
    from ascend_kit.results import RunFolder


def show_choice(folder: RunFolder, quantization: dict[str, Any], max_kl: float | None) -> None:
    """Display sensitivity, candidates and the chosen mix; one sentence where nothing was measured.

    `quantization` is the manifest's part of that name. Figures go to `folder`.
    """
    import pandas
    from IPython.display import display

    if not quantization.get("sensitivity"):
        print("Nothing was measured linear by linear: only quantize: auto does that.")
        return
    sensitivity, candidates = (pandas.DataFrame(quantization[name]) for name in ("sensitivity", "candidates"))
    by_linear = plots.sensitivity(sensitivity, quantization["linears"])
    display(figure.keep(folder, "sensitivity", by_linear, "KL divergence caused by each linear alone"))
    mixes = plots.mixes(candidates, quantization["chosen"], max_kl)
    display(figure.keep(folder, "mixes", mixes, "KL divergence of each mix against the bytes it reads"))
    columns = {
        "candidate": candidates["candidate"],
        "read per step, MB": candidates["weight_bytes"] / 1e6,
        "predicted step, ms": candidates["predicted_step_s"].astype(float) * 1e3,
        "KL, nats/token": candidates["kl"],
        "accuracy lost, %": candidates["accuracy_loss"] * 100,
    }
    display(tables.readable(pandas.DataFrame(columns)))
    print(f"Chosen: {quantization['chosen']}.")
