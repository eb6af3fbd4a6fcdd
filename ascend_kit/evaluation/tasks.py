"""What an evaluation asks: the tasks of an experiment, a plain text as a task, and the documents drawn from them."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from ascend_kit.evaluation.datasets import SETS, LocalTask, find_tasks, go_offline, wanted_folder
from ascend_kit.evaluation.files import DataError
from ascend_kit.evaluation.other_tasks import other_tasks
from ascend_kit.files import Table, require_regular
from ascend_kit.params import Experiment
from ascend_kit.params.experiment import DEMO

TEXT = "text:"
PAGE_CHARACTERS = 8000  # a text is cut between paragraphs into pages of about this length
DISAGREEMENT = 0.1  # share of documents that two precisions of one model answer differently, an upper guess
POWER = 0.8
Z = NormalDist().inv_cdf(0.975)


def check_data(experiment: Experiment) -> list[LocalTask]:
    """The tasks of an experiment, every file and row of them checked, without a model: DataError with all faults.

    The demo's own data is right when it is built and not looked at. Its questions say nothing about another model: then
    `dataset_path` must be given, unless everything asked for is a text or may be downloaded.
    """
    written = experiment.model_dump()  # the word demo as it was written, wherever the demo lies
    sets = [name for name in experiment.eval_datasets if name in SETS]
    others = [name for name in experiment.eval_datasets if name not in SETS]
    if written["dataset_path"] in (None, DEMO) and written["input_model"] != DEMO and sets:
        raise DataError(
            f"dataset_path is not given, and the demo's questions say nothing about {experiment.input_model}: name a "
            f"folder that holds {', '.join(wanted_folder(SETS[name]) for name in sets)}"
        )
    path = experiment.needed("dataset_path") if sets else experiment.dataset_path
    tasks: list[LocalTask] = []
    if path != DEMO:
        tasks += find_tasks(path or ".", sets, num_fewshot=experiment.eval_fewshot)
    if any(not name.startswith(TEXT) for name in others):
        go_offline(may_download=experiment.allow_download)
    for name in others:
        try:
            tasks += [text_task(name)] if name.startswith(TEXT) else other_tasks(name, experiment)
        except DataError as error:
            raise DataError(f"eval_datasets: {error}") from None
    return tasks


# --- plain texts ------------------------------------------------------------------------------------------------------


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


# --- documents asked --------------------------------------------------------------------------------------------------


def drawn_documents(tasks: Iterable[LocalTask], experiment: Experiment) -> dict[str, list[int]]:
    """The documents that `eval_limit` leaves, spread over the subjects of each set; tasks asked whole are left out."""
    sets: dict[str, dict[str, int]] = {}
    for task in tasks:
        sets.setdefault(task.set_name, {})[task.task] = task.num_documents
    parts = [draw(sizes, experiment.eval_limit, experiment.seed) for sizes in sets.values()]
    return {task: numbers for part in parts for task, numbers in part.items()}


def expected_widths(experiment: Experiment) -> Table:
    """What the documents asked can show, before asking: a row per set and one for all, in points.

    `half_width_points` is half of a score's 95 % interval at its widest; `detectable_points` the difference between two
    runs on the same documents that is seen with 80 % power where they disagree on a tenth of them.
    """
    import pandas

    tasks = check_data(experiment)
    drawn = drawn_documents(tasks, experiment)
    counts: dict[str, list[int]] = {}
    for task in tasks:
        if task.output_type != "loglikelihood_rolling":
            found = counts.setdefault(task.set_name, [0, 0])
            found[0] += len(drawn.get(task.task) or range(task.num_documents))
            found[1] += task.num_documents
    if len(counts) > 1:
        counts["all"] = [sum(pair[place] for pair in counts.values()) for place in (0, 1)]
    rows = [
        {
            "set": name,
            "documents": asked,
            "of": whole,
            "half_width_points": 100 * half_width(asked),
            "detectable_points": 100 * detectable(asked),
        }
        for name, (asked, whole) in counts.items()
    ]
    return pandas.DataFrame(rows)


def allocate(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """How many documents of each subject: in proportion to their sizes (largest remainders), at least one of each."""
    total = sum(sizes.values())
    if limit >= total:
        return dict(sizes)
    exact = {name: limit * size / total for name, size in sizes.items()}
    found = {name: max(1, math.floor(value)) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: math.floor(exact[name]) - exact[name]):
        if sum(found.values()) < limit and found[name] < sizes[name]:
            found[name] += 1
    return found


def draw(sizes: Mapping[str, int], limit: int | None, seed: int) -> dict[str, list[int]]:
    """Numbers of the documents to ask, in the order of the data; subjects that are asked as a whole are left out."""
    if limit is None:
        return {}
    counts = allocate(sizes, limit)
    return {
        name: sorted(random.Random(f"{seed} {name}").sample(range(size), counts[name]))
        for name, size in sizes.items()
        if counts[name] < size
    }


def half_width(n: int) -> float:
    """Half of a 95 % interval of an accuracy of n documents at its widest, a fraction."""
    return Z * math.sqrt(0.25 / n)


def detectable(n: int, disagreement: float = DISAGREEMENT) -> float:
    """The smallest difference of two runs on the same n documents that is seen with 80 % power, a fraction."""
    return (Z + NormalDist().inv_cdf(POWER)) * math.sqrt(disagreement / n)
