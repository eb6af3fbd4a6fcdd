"""Perplexity of a model on running text, of two runs on the same pages, and a plain text as a task.

Token perplexity is what quantisation papers report; lm-eval's word and byte perplexity come from its own task. They are
different numbers: lm-eval scores each page by itself and divides by words or bytes, here the pages become one text, cut
into windows, and the sum is divided by tokens. Compare each with its own kind only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_kit.evaluation.compare import Run, pair_documents
from ascend_kit.evaluation.files import DataError
from ascend_kit.evaluation.interface import EvaluatedEngine
from ascend_kit.evaluation.scores import CONFIDENCE, ratio
from ascend_kit.evaluation.tasks import LocalTask
from ascend_kit.files import require_regular

TEXT = "text:"
PAGE_CHARACTERS = 8000  # a text is cut between paragraphs into pages of about this length
PAPER_CONTEXT_LEN = 2048
PAGE_SEPARATOR = "\n\n"
BOOTSTRAPS = 4000


@dataclass(frozen=True)
class TokenPerplexity:
    """exp(total negative log-likelihood / scored tokens), with everything it depends on.

    `stderr` treats windows as independent samples and is None for a single one. `stride` equals
    `context_len`: windows do not overlap. The first token of each window has no context and is not scored.
    """

    value: float
    stderr: float | None
    num_tokens: int
    context_len: int
    stride: int
    num_windows: int
    first_token: str = "not scored"
    text: str = "raw pages joined by a blank line"


def token_perplexity(
    engine: EvaluatedEngine,
    pages: Sequence[str],
    *,
    context_len: int = PAPER_CONTEXT_LEN,
    batch_size: int = 8,
    known: Mapping[int, float] | None = None,
    on_window: Callable[[int, float], None] | None = None,
) -> TokenPerplexity:
    """Score the joined pages in windows of `context_len` tokens.

    The rest shorter than a window is left out, as in the published figures, unless the whole text is shorter.
    Windows whose negative log-likelihood is `known` are not scored again; `on_window` hears of each that is.
    Raises ValueError for a text of fewer than two tokens or a window the engine cannot hold.
    """
    if not 2 <= context_len <= engine.max_seq_length:
        raise ValueError(f"context_len={context_len} must lie between 2 and max_seq_length={engine.max_seq_length}")
    ids = list(engine.tokenizer.encode(PAGE_SEPARATOR.join(pages)))
    if len(ids) < 2:
        raise ValueError(f"perplexity needs at least two tokens, the text has {len(ids)}")
    windows = [ids[start : start + context_len] for start in range(0, len(ids) - context_len + 1, context_len)] or [ids]
    found = {number: value for number, value in (known or {}).items() if number < len(windows)}
    missing = [number for number in range(len(windows)) if number not in found]
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        scores = engine.score([(windows[number][:1], windows[number][1:]) for number in batch])
        for number, score in zip(batch, scores, strict=True):
            found[number] = -score.logprob
            if on_window:
                on_window(number, -score.logprob)
    nll = [found[number] for number in range(len(windows))]
    tokens = [len(window) - 1 for window in windows]
    mean, stderr = ratio(nll, tokens)
    value = math.exp(mean)
    return TokenPerplexity(
        value, None if stderr is None else value * stderr, sum(tokens), context_len, context_len, len(windows)
    )


# --- two runs ---------------------------------------------------------------------------------------------------------


def compare_perplexity(baseline: Run, candidate: Run) -> dict[str, Any] | None:
    """Bits per byte of the common WikiText pages: both, difference and its 95 % paired bootstrap interval.

    None where no page can be paired; bits per byte also compares across tokenizers.
    """
    pages = pair_documents(baseline, candidate, "logprob").rows
    if not pages:
        return None
    bits = [[-row["logprob"] / math.log(2) for row in side] for side in zip(*pages, strict=True)]
    sizes = [float(row["bytes"]) for row, _ in pages]
    change, low, high = bootstrap_ratio_difference(bits[0], bits[1], sizes)
    return {
        "baseline": baseline.name,
        "candidate": candidate.name,
        "n": len(pages),
        "baseline_bits_per_byte": sum(bits[0]) / sum(sizes),
        "candidate_bits_per_byte": sum(bits[1]) / sum(sizes),
        "difference_bits_per_byte": change,
        "low_bits_per_byte": low,
        "high_bits_per_byte": high,
        "outcome": "worse" if low > 0 else "better" if high < 0 else "no difference seen",
    }


def bootstrap_ratio_difference(
    baseline: Sequence[float], candidate: Sequence[float], sizes: Sequence[float]
) -> tuple[float, float, float]:
    """(difference, low, high) of sum(totals) / sum(sizes), candidate minus baseline, documents drawn in pairs.

    For bits per byte: totals are negative log-likelihoods of a page in bits, sizes its bytes. Percentile interval.
    """
    import numpy

    weights = numpy.asarray(sizes, dtype=float)
    change = numpy.asarray(candidate, dtype=float) - numpy.asarray(baseline, dtype=float)
    mean = float(change.sum() / weights.sum())
    if len(weights) < 2:  # one page says nothing of how others differ
        return mean, -math.inf, math.inf
    random, tail = numpy.random.default_rng(0), 50 * (1 - CONFIDENCE)
    # Drawn in turns: all at once would be a table of draws x documents.
    draws = (random.integers(0, len(weights), len(weights)) for _ in range(BOOTSTRAPS))
    values = [change[drawn].sum() / weights[drawn].sum() for drawn in draws]
    low, high = numpy.percentile(values, [tail, 100 - tail])
    return mean, float(low), float(high)


# --- a text as a task -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextTask(LocalTask):
    """A plain text, scored page by page as lm-eval scores WikiText."""

    def config(self, folder: Path) -> dict[str, Any]:
        """What the task's YAML file says."""
        metrics = [{"metric": name, "aggregation": "weighted_perplexity"} for name in self.metrics[:2]]
        return {
            **self.data_settings(folder),
            "task": self.task,
            "output_type": "loglikelihood_rolling",
            "test_split": "test",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [*metrics, {"metric": self.metrics[2], "aggregation": "bits_per_byte"}],
            "metadata": {"version": self.version},
        }


def text_task(name: str) -> TextTask:
    """The task `text:<file>`; DataError where the file is no UTF-8 text."""
    path = Path(name.removeprefix(TEXT)).expanduser()
    try:
        require_regular(path)
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: cannot be read as UTF-8 text ({getattr(error, 'strerror', None) or error})") from None
    pages = list(_pages(text))
    if not pages:
        raise DataError(f"{name}: holds no text")
    plain = "text_" + re.sub(r"\W+", "_", path.stem)
    return TextTask(
        task=plain,
        set_name=plain,
        packaged_yaml=path,
        output_type="loglikelihood_rolling",
        files={"test": (path,)},
        rows={"test": [{"page": page} for page in pages]},
        metrics=("word_perplexity", "byte_perplexity", "bits_per_byte"),
    )


def _pages(text: str) -> Iterator[str]:
    page = ""
    for paragraph in text.split("\n\n"):
        page = f"{page}\n\n{paragraph}" if page else paragraph
        if len(page) >= PAGE_CHARACTERS:
            yield page
            page = ""
    if page.strip():
        yield page
