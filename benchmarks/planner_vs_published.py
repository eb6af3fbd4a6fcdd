"""Prints what the planner predicts beside what was published for Qwen3-8B and Qwen2.5-7B on Ascend cards.

Run: python benchmarks/planner_vs_published.py. Needs no device. The planner's constants are general ones (see
`ascend_kit.measure.forecast.Card`) and none was chosen to fit a row; each row's own conditions are used where
they were published, and an assumption about a missing one is named. Published systems differ in software, so
the ratio says how far a row is from the model's idea of a good implementation, not how good the model is.
"""

from __future__ import annotations

from dataclasses import dataclass

from ascend_kit.device.peaks import PEAKS
from ascend_kit.measure.forecast import Card, Deployment
from ascend_kit.measure.planner import MODELS
from ascend_kit.model.config import ModelConfig

QWEN3_8B, QWEN25_7B = MODELS["Qwen3-8B"], MODELS["Qwen2.5-7B"]
MAX_IN_FLIGHT = 256  # the usual default of serving engines; published pages do not state it


@dataclass(frozen=True)
class Row:
    """One published figure: ms per token at batch 1 (decode rows), or total tokens per second (serving)."""

    model: ModelConfig
    card: str
    quantize: str
    tp_size: int
    prompt_len: int
    output_len: int
    published: float
    source: str
    note: str = ""
    graph_mode: bool = True


RECIPES = "hicann/cann-recipes-infer models/qwen/README.md"
GPUSTACK = "gpustack docs/performance-lab/qwen3-8b/910b.md"
MINDIE = "hiascend.com MindIE Turbo 2.0.RC2 quick start"
_GUESS = "prompt length not stated: 512 assumed"
DECODE = (
    Row(QWEN3_8B, "A3-die", "none", 1, 512, 256, 15.48, RECIPES, _GUESS),
    Row(QWEN3_8B, "A3-die", "none", 2, 512, 256, 10.35, RECIPES, _GUESS),
    Row(QWEN3_8B, "A3-die", "w8a8", 1, 512, 256, 10.46, RECIPES, _GUESS),
    Row(QWEN3_8B, "A3-die", "w8a8", 2, 512, 256, 7.90, RECIPES, _GUESS),
)
_GRADE = "grade of the 910B not stated: 910B3 assumed"
SERVING = (
    Row(QWEN3_8B, "910B3", "none", 1, 128, 4, 5835, GPUSTACK, "vLLM baseline; " + _GRADE),
    Row(QWEN3_8B, "910B3", "w8a8", 1, 128, 4, 16612, GPUSTACK, "best MindIE; " + _GRADE),
    Row(QWEN3_8B, "910B3", "none", 1, 2000, 100, 9589, GPUSTACK, "vLLM baseline; " + _GRADE),
    Row(QWEN3_8B, "910B3", "w8a8", 1, 2000, 100, 14485, GPUSTACK, "best MindIE; " + _GRADE),
    Row(QWEN3_8B, "910B3", "none", 1, 4000, 200, 7677, GPUSTACK, "vLLM baseline; " + _GRADE),
    Row(QWEN3_8B, "910B3", "w8a8", 1, 4000, 200, 11159, GPUSTACK, "best MindIE; " + _GRADE),
    Row(QWEN3_8B, "910B3", "none", 1, 32000, 100, 2891, GPUSTACK, "vLLM baseline; " + _GRADE),
    Row(QWEN3_8B, "910B3", "w8a8", 1, 32000, 100, 7835, GPUSTACK, "best MindIE; " + _GRADE),
    Row(QWEN25_7B, "910B3", "none", 4, 256, 128, 10747.65, MINDIE, "eager, early 2025; " + _GRADE, False),
)


def deployment(row: Row) -> Deployment:
    """The planner's view of a row."""
    return Deployment(
        row.model, Card(PEAKS[row.card]), quantize=row.quantize, tp_size=row.tp_size, graph_mode=row.graph_mode
    )


def decode_figures(row: Row) -> tuple[float, float]:
    """`(floor, prediction)` of one decode step at batch 1, ms."""
    group, context = deployment(row), row.prompt_len + row.output_len / 2
    return group.decode_floor_s(1, context) * 1e3, group.decode_s(1, context) * 1e3


def serving_figures(row: Row) -> tuple[float, float, int]:
    """`(ceiling, prediction, requests in flight)`; total tokens per second, prompt and output together."""
    group = deployment(row)
    running = min(MAX_IN_FLIGHT, group.max_concurrency(row.prompt_len + row.output_len))
    to_total = (row.prompt_len + row.output_len) / row.output_len
    lengths = (row.prompt_len, row.output_len, running)
    return (group.ceiling_tokens_per_s(*lengths) * to_total, group.output_tokens_per_s(*lengths) * to_total, running)


def name(row: Row) -> str:
    """Model, scheme and cards in a few characters."""
    model = "Qwen3-8B" if row.model is QWEN3_8B else "Qwen2.5-7B"
    scheme = "BF16" if row.quantize == "none" else row.quantize.upper()
    return f"{model} {scheme} TP{row.tp_size} {row.card}"


def main() -> None:
    """Print both tables, then the notes."""
    notes: list[str] = []
    print("Decode at batch 1, ms per token")
    print(f"{'':32}{'floor':>8}{'predicted':>11}{'published':>11}{'ratio':>7}")
    for row in DECODE:
        floor, predicted = decode_figures(row)
        ratio = predicted / row.published
        print(f"{name(row):32}{floor:8.2f}{predicted:11.2f}{row.published:11.2f}{ratio:7.2f} {mark(row, notes)}")
    print("\nServing at full load, prompt + output tokens per second")
    print(f"{'':32}{'in/out':>10}{'running':>9}{'ceiling':>9}{'predicted':>11}{'published':>11}{'ratio':>7}")
    for row in SERVING:
        ceiling, predicted, running = serving_figures(row)
        left = f"{name(row):32}{f'{row.prompt_len}/{row.output_len}':>10}{running:9d}{ceiling:9.0f}"
        ratio = predicted / row.published
        print(f"{left}{predicted:11.0f}{row.published:11.0f}{ratio:7.2f} {mark(row, notes)}")
    print("\nratio = predicted / published; running = requests in flight (what fits, at most 256)")
    for number, note in enumerate(notes, 1):
        print(f"[{number}] {note}")


def mark(row: Row, notes: list[str]) -> str:
    """The number of the row's source and conditions in the list of notes, which grows as needed."""
    text = f"{row.source}: {row.note}"
    if text not in notes:
        notes.append(text)
    return f"[{notes.index(text) + 1}]"


if __name__ == "__main__":
    main()
