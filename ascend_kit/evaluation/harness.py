"""Run lm-eval's tasks on the engine and keep every answer: one task at a time, rows as they finish.

Tables of the run folder: `scores` (a row per task and metric), `documents` (a row per document, with the
log-probability of each choice) and `evaluation_cards` (a row per task and card), every row with the identity of what
produced it; `evaluation.json` says which identity was asked for, and holds groups, cautions and published figures. A
finished task is not repeated where its identity is the one asked for; one that fails becomes a failed row and the
others go on.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

from ascend_kit.evaluation import judge, scores
from ascend_kit.evaluation.datasets import LocalTask, check_data, go_offline, groups_of, write_task_folder
from ascend_kit.evaluation.files import DataError
from ascend_kit.evaluation.interface import EvaluatedEngine
from ascend_kit.evaluation.perplexity import PAPER_CONTEXT_LEN, token_perplexity
from ascend_kit.evaluation.scores import EvaluationResult, load_evaluation
from ascend_kit.identity import Identity, hash_value
from ascend_kit.measure.cards import CardMeter
from ascend_kit.params import Experiment
from ascend_kit.results import RunFolder

if TYPE_CHECKING:
    from ascend_kit.evaluation.adapter import EngineLM

Progress = Callable[[int, int, str], None]  # documents done, documents in all, task
CARDS = "evaluation_cards"
TABLES = ("scores", "documents", CARDS, "evaluation")
FEWSHOT_SEED = 1234  # lm-eval's default; the sets here take the first shots anyway


def evaluate(
    engine: EvaluatedEngine, experiment: Experiment, folder: RunFolder, *, on_progress: Progress | None = None
) -> EvaluationResult:
    """Evaluate a loaded engine on `experiment.eval_datasets` and write everything to `folder`.

    Data faults raise DataError before anything is scored. Failing tasks do not raise here, so that the rest
    is computed and shown, but the stage ends as failed; look at `result.failed` or end with
    `result.raise_if_failed()`. `on_progress(done, total, task)` counts documents.
    """
    tasks = check_data(experiment)
    if not tasks:
        raise DataError("dataset_path is the word demo: use demo.resolve(experiment), which builds the sample sets")
    go_offline()
    with folder.working(experiment, *TABLES):
        _Session(engine, experiment, folder, tasks, on_progress or (lambda done, total, task: None)).run()
        result = load_evaluation(folder)
        if result.error is not None:
            folder.fail(str(result.error))
    return result


class _Session:
    """One call of `evaluate`: what all its tasks share."""

    def __init__(
        self,
        engine: EvaluatedEngine,
        experiment: Experiment,
        folder: RunFolder,
        tasks: list[LocalTask],
        on_progress: Progress,
    ) -> None:
        self.engine, self.experiment, self.folder, self.tasks = engine, experiment, folder, tasks
        self.on_progress = on_progress
        self.uses_chat = experiment.eval_chat_template
        self.limit = experiment.eval_limit
        self.max_length = min(experiment.eval_max_seq_length, engine.max_seq_length)
        from ascend_kit.engine.text import thinking_option  # imports torch

        chat = thinking_option(engine.tokenizer, experiment.thinking) if self.uses_chat else {}
        self.thinking = chat.get("enable_thinking")
        self.identities = {task.task: self._identity(task) for task in tasks}
        self.total = sum(self._size(task) for task in tasks)
        self.num_finished = 0

    def run(self) -> None:
        from lm_eval.tasks import TaskManager

        from ascend_kit.evaluation.adapter import EngineLM

        self._write_summary()  # from now on rows of anything else are out of the tables
        done = scores.finished(self.folder, self.identities)
        lm = EngineLM(
            self.engine,
            max_length=self.max_length,
            # Every replica gets a full batch; a stand-in without replicas counts as one.
            batch_size=self.experiment.eval_batch_size * getattr(self.engine, "num_replicas", 1),
            thinking=self.experiment.thinking,
        )
        with tempfile.TemporaryDirectory(prefix="ascend-eval-") as scratch:
            write_task_folder(self.tasks, scratch)
            manager = TaskManager(include_path=scratch, include_defaults=False)
            for task in self.tasks:
                self.on_progress(self.num_finished, self.total, task.task)
                keys = {(task.task, metric, self._size(task)) for metric in scores.metrics_of(task)}
                if not keys <= done:
                    self._record(lm, task, manager)
                self.num_finished += self._size(task)
        self.on_progress(self.num_finished, self.total, "")
        self._finish()

    def _identity(self, task: LocalTask) -> Identity:
        """What the answers to a task depend on: the engine's identity, the data, and how the task is asked."""
        base: Identity = self.engine.identity
        template = hash_value(self.engine.tokenizer.chat_template) if self.uses_chat else None
        return base.with_parts(
            data=task.data_hash,
            task={
                "name": task.task,
                "version": task.version,
                "num_fewshot": task.num_fewshot,
                "chat_template": template,
                "thinking": self.thinking,
                "metrics": scores.metrics_of(task),
            },
            engine={**(base.engine or {}), "eval_max_length": self.max_length},
            versions={**(base.versions or {}), "lm_eval": version("lm-eval")},
        )

    def conditions(self, task: LocalTask) -> str:
        """How the task is asked, for people; what a row belongs to is its identity."""
        return ", ".join(
            (
                f"{task.num_fewshot}-shot",
                "chat template" if self.uses_chat else "plain prompt",
                f"first {self.limit} documents" if self.limit else "all documents",
                f"context {self.max_length} tokens",
            )
        )

    def _size(self, task: LocalTask) -> int:
        return min(task.num_documents, self.limit or task.num_documents)

    def _record(self, lm: EngineLM, task: LocalTask, manager: Any) -> None:
        """Run one task and append its rows: documents first, so that a score row means they are all there."""
        head = {
            "task": task.task,
            "set": task.set_name,
            "kind": "task",
            "num_fewshot": task.num_fewshot,
            "conditions": self.conditions(task),
        }
        identity = self.identities[task.task]
        start, load = time.perf_counter(), CardMeter(self.engine)
        try:
            score_rows, document_rows = self._run(lm, task, manager)
        except Exception as error:  # any failure of a task is a result; the next task may work
            failure = {"metric": None, "n": 0, "status": "failed", "error": f"{type(error).__name__}: {error}"}
            self.folder.append("scores", {**head, **failure}, identity)
            return
        wall_s = time.perf_counter() - start
        facts = {"task": task.task, "set": task.set_name}
        self.folder.append_all(CARDS, [{**facts, **row} for row in load.rows()], identity)
        self.folder.append_all("documents", [{**facts, **row} for row in document_rows], identity)
        self.folder.append_all("scores", [{**head, **row, "wall_s": wall_s} for row in score_rows], identity)

    def _run(self, lm: EngineLM, task: LocalTask, manager: Any) -> tuple[list[dict], list[dict]]:
        from lm_eval import evaluator

        lm.on_requests = _Counter(partial(self._advance, task), self._size(task), task.output_type)
        with _quiet():
            configured = manager.load([task.task])["tasks"][task.task]
            configured.set_config("num_fewshot", task.num_fewshot)
            configured.set_fewshot_seed(FEWSHOT_SEED)
            found = evaluator.evaluate(
                lm=lm,
                task_dict={"tasks": {task.task: configured}},
                limit=self.limit,
                apply_chat_template=self.uses_chat,
                fewshot_as_multiturn=self.uses_chat,
            )
        found = cast(dict[str, Any], found)
        documents = [scores.document_row(task, sample, lm) for sample in found["samples"][task.task]]
        rows = [scores.score_row(found["results"][task.task], metric, documents) for metric in task.metrics]
        if task.set_name == "wikitext":
            pages = task.rows[task.eval_split][: self._size(task)]
            rows.append(self._token_perplexity([page["page"] for page in pages]))
        return rows, documents

    def _advance(self, task: LocalTask, documents: int) -> None:
        self.on_progress(self.num_finished + documents, self.total, task.task)

    def _token_perplexity(self, pages: list[str]) -> dict[str, Any]:
        found = token_perplexity(
            self.engine,
            pages,
            context_len=min(PAPER_CONTEXT_LEN, self.max_length),
            batch_size=self.experiment.eval_batch_size,
        )
        head = {"metric": "token_perplexity", "unit": scores.UNITS["token_perplexity"], "n": len(pages)}
        return {**head, **asdict(found)}

    def _finish(self) -> None:
        table, documents = scores.load_scores(self.folder), scores.document_rows(self.folder)
        groups = [row for group in groups_of(self.tasks) for row in scores.group_rows(group, table)]
        rows = [*table.to_dict("records"), *groups]
        flags = judge.flags(self.experiment, self.engine, self.tasks, rows, documents)
        self._write_summary(
            groups=groups,
            flags=[flag.to_row() for flag in flags],
            published=judge.published(self.experiment, self.engine, rows),
        )
        for flag in flags:
            if flag.level == "alarm":
                self.folder.alarm(f"{flag.key} {flag.values.get('set', '')}".strip(), str(flag), **flag.values)

    def _write_summary(self, **found: Any) -> None:
        identities = {task: identity.id for task, identity in self.identities.items()}
        self.folder.write_json("evaluation", {"identities": identities, **found})


class _Counter:
    """Turns answered requests into documents for the progress line."""

    def __init__(self, report: Callable[[int], None], size: int, output_type: str) -> None:
        self.report, self.size, self.answered = report, size, 0
        # Exact for four choices, nearly so for AGIEval's four or five; of WikiText, windows are counted.
        self.per_document = 4 if output_type == "multiple_choice" else 1

    def __call__(self, requests: int) -> None:
        self.answered += requests
        self.report(min(self.size, self.answered // self.per_document))


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval 0.4.13 draws a bar per task while building prompts, without a switch, and warns of its own
    YAML.

    Our progress counts all documents, and truncated inputs are counted by the adapter. Delete the bar's part
    when `build_all_requests` can be told to draw none.
    """
    import lm_eval.api.task as module

    logger = logging.getLogger("lm_eval")
    bar, level = module.tqdm, logger.level
    module.tqdm = lambda items, **_: items
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        module.tqdm = bar
        logger.setLevel(level)
