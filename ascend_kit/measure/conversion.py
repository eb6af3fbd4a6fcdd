"""Convert a checkpoint as an experiment says, and publish the result only if it answers like the source.

Both are computed in float32 straight from their files, one layer in memory at a time, on a fixed set of
texts: this judges what was written, not an engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ascend_kit.checkpoint.conversion import ConversionResult
    from ascend_kit.params import Experiment

Progress = Callable[..., None]
# Written for this purpose: prose, numbers, code, Chinese, a list, a dialogue.
TEXTS = (
    "A river that runs slowly carries fine sand, and a river that runs fast carries stones as well.",
    "The train leaves at 8:45 and needs 2 hours and 20 minutes, so it arrives at 11:05.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total",
    "水在标准大气压下的沸点是一百摄氏度，而在高山上，水在较低的温度就会沸腾。",
    "Shopping list: bread, milk, six eggs, two lemons, a bag of rice and a small piece of cheese.",
    "Question: Which planet is nearest to the sun?\nAnswer: Mercury is the planet nearest to the sun.",
)


@dataclass(frozen=True)
class CheckedConversion:
    """What `convert` did, and the parity figures: one row per figure with its limit and whether it holds."""

    result: ConversionResult
    parity: list[dict[str, Any]]


def convert_checked(experiment: Experiment, *, on_progress: Progress | None = None) -> CheckedConversion:
    """Convert `input_model` to `converted_folder`; ParityError, and no result, if parity misses a limit.

    A folder that is reused is compared again: it may have been changed since.
    """
    from ascend_kit.checkpoint.convert import convert

    found: list[list[dict[str, Any]]] = []
    result = convert(
        experiment,
        on_progress=on_progress,
        before_publish=lambda folder: found.append(parity(experiment, folder)),
    )
    return CheckedConversion(result, found[0] if found else parity(experiment, result.folder))


def parity(experiment: Experiment, folder: Path) -> list[dict[str, Any]]:
    """Figures of a converted folder against its source on `TEXTS`; ParityError if one misses its limit."""
    from transformers import AutoTokenizer

    from ascend_kit.checkpoint.convert import open_source
    from ascend_kit.checkpoint.huggingface import open_checkpoint
    from ascend_kit.checkpoint.parity import compare, files_model, limits_for

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    source = open_source(Path(experiment.input_model), experiment.framework, experiment.tokenizer_path)
    report = compare(
        files_model(source, "source"),
        files_model(open_checkpoint(Path(folder)), "result"),
        [tokenizer.encode(text) for text in TEXTS],
        limits=limits_for(experiment.precision, experiment.quantize.replace("auto", "mixed")),
    )
    return report.check().table()
