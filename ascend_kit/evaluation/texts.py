"""A plain text as a task, scored page by page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_kit.evaluation.files import DataError
from ascend_kit.evaluation.tasks import LocalTask
from ascend_kit.files import require_regular

TEXT = "text:"
PAGE_CHARACTERS = 8000  # a text is cut between paragraphs into pages of about this length


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
        files={"test": (path,)},
        rows={"test": [{"page": page} for page in pages]},
        eval_split="test",
        num_fewshot=0,
        output_type="loglikelihood_rolling",
        metrics=("word_perplexity", "byte_perplexity", "bits_per_byte"),
        version=1.0,
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
