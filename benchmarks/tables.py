"""The results of report.py as Markdown and as a figure."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from make_model import Shape

OURS = "ascend_kit"
INT8 = ("ascend_kit_w8a8", "ascend_kit_w8a16", "openvino_int8", "llamacpp_q8_0")
OURS_INT8 = INT8[:2]
OURS_COLOUR, OURS_INT8_COLOUR, OTHERS_COLOUR = "#0072B2", "#56B4E9", "#B0B0B0"
PANELS_PER_ROW = 3
CUT = 8  # times of the fastest; longer bars are cut
UNITS = {"tok/s": "tokens per second", "s": "seconds", "requests/s": "requests per second"}


@dataclass(frozen=True)
class Headline:
    """The figure that stands for a workload."""

    column: str
    unit: str
    higher_is_better: bool
    title: str


HEADLINES = {
    "W1": Headline("decode_tokens_per_s", "tok/s", True, "W1: one stream, decode"),
    "W2": Headline("wall_s", "s", False, "W2: 32 requests, wall time"),
    "W3": Headline("prompt_tokens_per_s", "tok/s", True, "W3: prefill 4 x 1,024"),
    "W4": Headline("requests_per_s", "requests/s", True, "W4: scoring, shared prefix"),
    "W4U": Headline("requests_per_s", "requests/s", True, "W4U: scoring, nothing shared"),
    "W5": Headline("wall_s", "s", False, "W5: 8,000-token prompt, 64 new"),
}


def markdown(results: dict[str, Any]) -> str:
    parts = [
        _conditions(results),
        _main_table(results),
        _latency_table(results),
        *_ratio_tables(results),
        _goal_lines(results),
    ]
    if any(results["agreement"].values()):
        parts.append(_agreement_lines(results))
    left_out = [f"- {name}: {why}" for name, why in results["absent"].items()]
    if left_out:
        parts.append("Left out:\n" + "\n".join(left_out))
    if results["failed"]:
        parts.append("Failed:\n" + "\n".join(f"- {text}" for text in results["failed"]))
    return "\n\n".join(parts) + "\n"


def _conditions(results: dict[str, Any]) -> str:
    settings, machine, limits = results["settings"], results["machine"], results["ceilings"]
    text = [
        f"{settings['shape']} shape, random bf16 weights; {machine['cpu']}, {settings['threads']} threads "
        f"({', '.join(machine['instructions'])}), {machine['memory_bytes'] / 2**30:.0f} GiB; "
        f"{settings['slots']} slots, {settings['kv_cache_gib']:g} GiB of KV cache; {results['started']}."
    ]
    scales = (
        ("read_bytes_per_s", "read bandwidth", 1e9, "GB/s"),
        ("bf16_flops_per_s", "bf16", 1e12, "TFLOP/s"),
        ("int8_ops_per_s", "int8", 1e12, "TOP/s"),
    )
    for name, words, scale, unit in scales:
        if limits[name]:
            low, middle, high = (limits[name][key] / scale for key in ("min", "median", "max"))
            text.append(f"Ceiling, {words}: {middle:.2f} {unit} ({low:.2f}-{high:.2f}).")
    return "\n".join(text)


def _main_table(results: dict[str, Any]) -> str:
    header = [
        "engine",
        *(f"{name} {h.unit}" for name, h in HEADLINES.items()),
        "W1 of bandwidth",
        "W3 of matrix rate",
        "peak memory",
        "rounds",
    ]
    lines = [_line(header), _line(["---"] * len(header))]
    for engine, parts in results["summary"].items():
        cells = [engine]
        cells += [_cell(parts.get(name, {}).get(headline.column)) for name, headline in HEADLINES.items()]
        cells += [
            _percent(parts.get("W1", {}).get("of_bandwidth_limit")),
            _percent(parts.get("W3", {}).get("of_matrix_limit")),
        ]
        peak = results["peak_bytes"].get(engine)
        rounds = str(results["num_rounds"][engine])
        lines.append(_line([*cells, f"{peak / 2**30:.2f} GiB" if peak else "n/a", rounds]))
    most = max(results["num_rounds"].values(), default=0)
    fewer = [name for name, count in results["num_rounds"].items() if count < most]
    if fewer:
        lines.append(f"\nSlow, and therefore in the first rounds only: {', '.join(fewer)}.")
    return "\n".join(lines)


def _latency_table(results: dict[str, Any]) -> str:
    columns = (
        "output_tokens_per_s",
        "ttft_p50_ms",
        "ttft_p99_ms",
        "tpot_p50_ms",
        "tpot_p99_ms",
        "itl_p50_ms",
        "itl_p99_ms",
    )
    header = ["W2", *columns, "W5 ttft_ms", "W5 decode_tokens_per_s"]
    lines = [_line(header), _line(["---"] * len(header))]
    for engine, parts in results["summary"].items():
        if "W2" in parts or "W5" in parts:
            cells = [_cell(parts.get("W2", {}).get(name), ranged=False) for name in columns]
            cells += [_cell(parts.get("W5", {}).get(name), ranged=False) for name in ("ttft_ms", "decode_tokens_per_s")]
            lines.append(_line([engine, *cells]))
    return "\n".join(lines)


def _ratio_tables(results: dict[str, Any]) -> list[str]:
    return [_ratio_table(results, ours) for ours in (OURS, *OURS_INT8) if ours in results["summary"]]


def _ratio_table(results: dict[str, Any], ours: str) -> str:
    """int8 engines are compared with int8 engines; the bf16 one with all."""
    header = [f"{ours} is so many times as fast as", *HEADLINES]
    lines = [_line(header), _line(["---"] * len(header))]
    for engine in results["summary"]:
        if engine != ours and (ours == OURS or engine in INT8):
            cells = [_cell(results["ratios"][ours].get(name, {}).get(engine)) for name in HEADLINES]
            lines.append(_line([engine, *cells]))
    return "\n".join(lines)


def _goal_lines(results: dict[str, Any]) -> str:
    words = {True: "met", False: "NOT met", None: "not measured"}
    lines = []
    for goal in results["goals"]:
        reached = "n/a" if goal["reached"] is None else f"{goal['reached']:.2f}"
        aim = "no goal" if goal["goal"] is None else f"goal {goal['bound']} {goal['goal']:g}: {words[goal['met']]}"
        lines.append(f"- {goal['workload']} {goal['what']}: {reached}; {aim}")
    return "Goals:\n" + "\n".join(lines)


def _agreement_lines(results: dict[str, Any]) -> str:
    lines = []
    for engine, values in results["agreement"].items():
        tokens, score = values.get("equal_tokens_w1"), values.get("score_difference_w4")
        parts = [f"first {tokens} of 16 greedy tokens equal"] if tokens is not None else []
        parts += [f"log-probabilities within {score:.3f}"] if score is not None else []
        if parts:
            lines.append(f"- {engine}: {', '.join(parts)}")
    return f"Agreement with {OURS} (bf16 and random weights: near ties fall either way):\n" + "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: dict[str, float] | None, ranged: bool = True) -> str:
    if value is None:
        return "-"
    text = _number(value["median"])
    spread = ranged and value["max"] > value["min"]
    return f"{text} ({_number(value['min'])}-{_number(value['max'])})" if spread else text


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _percent(value: dict[str, float] | None) -> str:
    return "n/a" if value is None else f"{value['median']:.0%}"


def draw(results: dict[str, Any], path: Path, shape: Shape) -> None:
    """One panel per workload: medians as bars, ranges as lines, the machine's limit dashed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = [name for name in HEADLINES if any(name in parts for parts in results["summary"].values())]
    engines = list(results["summary"])
    columns = min(PANELS_PER_ROW, len(names))
    rows = -(-len(names) // columns)
    height = 0.3 * len(engines) + 1.3
    figure = Figure(figsize=(2.2 + 4 * columns, height * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    limits = _limits(results["ceilings"], shape)
    for axes, name in zip(panels, names, strict=False):
        _panel(axes, results["summary"], engines, name, limits.get(name))
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    panels[0].set_yticks(range(len(engines)), engines)
    panels[0].set_ylim(len(engines) + 0.1, -0.6)  # downwards, with room for words below the last bar
    words = {"this engine, bf16": OURS_COLOUR, "this engine, int8": OURS_INT8_COLOUR, "others": OTHERS_COLOUR}
    figure.legend(
        handles=[Patch(color=colour, label=text) for text, colour in words.items()],
        loc="outside upper center",
        ncols=len(words),
        frameon=False,
    )
    temporary = path.with_name("." + path.name)
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, path)


def _panel(axes: Any, summary: dict[str, Any], engines: list[str], name: str, limit: float | None) -> None:
    headline = HEADLINES[name]
    values = {
        place: summary[engine][name][headline.column] for place, engine in enumerate(engines) if name in summary[engine]
    }
    longest = max(value["max"] for value in values.values())
    if not headline.higher_is_better:  # one very slow engine must not squeeze the others
        longest = min(longest, CUT * min(value["median"] for value in values.values()))
    axes.set_xlim(0, 1.3 * max(longest, limit or 0))
    _bars(axes, engines, values, longest)
    if limit:
        axes.axvline(limit, linestyle="--", color="#444444", linewidth=1)
        axes.annotate(
            "machine's limit in bf16",
            (limit, 0.02),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            xytext=(-3, 0),
            textcoords="offset points",
            ha="right",
        )
    axes.set_title(headline.title, fontsize=11)
    direction = "higher" if headline.higher_is_better else "lower"
    axes.set_xlabel(f"{UNITS[headline.unit]} ({direction} is better)")
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter("{x:,.0f}" if longest >= 10 else "{x:g}")
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Any, engines: list[str], values: dict[int, dict[str, float]], longest: float) -> None:
    """Bars with their numbers; one that exceeds `longest` is cut there, and says so."""
    for place, value in values.items():
        engine, end = engines[place], min(value["max"], longest)
        colour = OURS_COLOUR if engine == OURS else OURS_INT8_COLOUR if engine in OURS_INT8 else OTHERS_COLOUR
        axes.barh(place, min(value["median"], longest), color=colour, height=0.7)
        axes.plot([min(value["min"], longest), end], [place, place], color="#222222", linewidth=1.5)
        text = _number(value["median"]) + (" (bar cut)" if value["median"] > longest else "")
        axes.annotate(text, (end, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=9)


def _limits(ceilings: dict[str, dict[str, float] | None], shape: Shape) -> dict[str, float]:
    limits = {}
    if ceilings["read_bytes_per_s"]:
        limits["W1"] = ceilings["read_bytes_per_s"]["median"] / shape.read_bytes_per_token
    if ceilings["bf16_flops_per_s"]:
        limits["W3"] = ceilings["bf16_flops_per_s"]["median"] / shape.flops_per_prompt_token
    return limits
