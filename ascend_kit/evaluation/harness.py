"""Run lm-eval's tasks on the engine and keep every answer: all tasks together, each document on disk at once.

Tables of the run folder: `documents` (a row per document as it is answered, with question, answer and the
log-probability of each choice; packed at the end), `perplexity_windows` (a row per window of running text), `scores`
(a row per task and metric) and `evaluation_cards` (a row per card), every row with the identity of what produced it;
`evaluation.json` says which identity was asked for, and holds the documents drawn, groups, cautions and published
figures. A document is not asked again where its identity is the one asked for; a task that fails becomes a failed row
and the others go on.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

from ascend_kit.evaluation import judge, scores
from ascend_kit.evaluation.datasets import check_data, drawn_documents, groups_of, write_task_folder
from ascend_kit.evaluation.files import DataError
from ascend_kit.evaluation.interface import EvaluatedEngine
from ascend_kit.evaluation.perplexity import PAPER_CONTEXT_LEN, token_perplexity
from ascend_kit.evaluation.scores import EvaluationResult, document_rows, load_evaluation, load_scores
from ascend_kit.evaluation.sequential import EnoughEvidence, Stop
from ascend_kit.evaluation.tasks import LmEvalExport, LocalTask, go_offline, load_task
from ascend_kit.files import hash_value
from ascend_kit.identity import Identity
from ascend_kit.messages import say
from ascend_kit.params import Experiment
from ascend_kit.results import RunFolder

if TYPE_CHECKING:
    from ascend_kit.evaluation.answering import Answered, DocumentLM

Progress = Callable[[int, int, str], None]  # documents done, documents in all, task
CARDS = "evaluation_cards"
WINDOWS = "perplexity_windows"
TABLES = ("scores", "documents", CARDS, WINDOWS, "evaluation")
ALL_TASKS = "all"
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
    cannot = getattr(engine, "cannot", None)
    reasons = {task.task: why for task in tasks if cannot and (why := cannot(task.output_type))}
    if reasons:
        raise DataError(f"{', '.join(reasons)} cannot be asked: {next(iter(reasons.values()))}")
    go_offline(may_download=experiment.allow_download)
    with folder.working(experiment, *TABLES):
        _Session(engine, experiment, folder, tasks, on_progress or (lambda done, total, task: None)).run()
        result = load_evaluation(folder)
        if result.error is not None:
            folder.fail(str(result.error))
        folder.pack("documents")
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
        self.engine, self.experiment, self.folder = engine, experiment, folder
        self.tasks = {task.task: task for task in tasks}
        self.on_progress = on_progress
        self.uses_chat = experiment.eval_chat_template
        self.max_length = min(experiment.eval_max_seq_length, engine.max_seq_length)
        from ascend_kit.engine.text import thinking_option  # imports torch

        chat = thinking_option(engine.tokenizer, experiment.thinking) if self.uses_chat else {}
        self.thinking = chat.get("enable_thinking")
        template = judge.template_of(engine.tokenizer) if self.uses_chat else ""
        thinks = self.thinking or ("<think>" in template and "enable_thinking" not in template)
        self.thinking_budget = experiment.eval_thinking_budget if thinks else None
        sampling = {
            "temperature": experiment.eval_temperature,
            "top_p": experiment.eval_top_p,
            "top_k": experiment.eval_top_k,
            "max_gen_toks": experiment.eval_max_new_tokens,
        }
        self.sampling = {name: value for name, value in sampling.items() if value is not None}
        self.identity = engine.identity
        self.identities = {task.task: self._identity(task) for task in tasks}
        self.drawn = drawn_documents(tasks, experiment)
        self.configured: dict[str, Any] = {}
        self.known = self._known_rows()
        self.live = scores.Live(self.tasks.values(), self.drawn)
        self.stop = (
            None if experiment.eval_stop_against is None else Stop(experiment, self.tasks, self.identities, self.drawn)
        )
        self.export = LmEvalExport(
            folder, experiment.model_name, engine.tokenizer.chat_template if self.uses_chat else None
        )
        self.wall_s: defaultdict[str, float] = defaultdict(float)
        self._last_s = time.perf_counter()

    def run(self) -> None:
        from ascend_kit.engine.opened_model import CardMeter  # imports torch
        from ascend_kit.evaluation.answering import DocumentLM

        self._write_summary()  # from now on rows of anything else are out of the tables
        before: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in load_scores(self.folder).to_dict("records"):
            before[row["task"]].append(row)
        todo = [name for name in self.tasks if not scores.is_finished(before[name], self.drawn.get(name))]
        self.live.skipped = sum(self.live.sizes[name] for name in self.tasks.keys() - set(todo))
        self.on_progress(*self.live.progress())
        if todo:
            lm = DocumentLM(
                self.engine,
                known=self._known_answers,
                on_documents=self._keep,
                # Every replica gets a full batch; a stand-in without replicas counts as one.
                together=self.experiment.eval_batch_size * getattr(self.engine, "num_replicas", 1),
                indices=self.drawn,
                order=self.stop.places if self.stop else None,
                max_length=self.max_length,
                thinking=self.experiment.thinking,
                thinking_budget=self.thinking_budget,
                sampling=self.sampling,
                seed=self.experiment.seed,
            )
            load = CardMeter(self.engine)
            with tempfile.TemporaryDirectory(prefix="ascend-eval-") as scratch:
                self._evaluate_and_record(lm, todo, scratch)
            rows = [{"task": ALL_TASKS, **row} for row in load.rows()]
            self.folder.append_all(CARDS, rows, self.identity)
        self.on_progress(*self.live.progress())
        self._finish()

    # --- identity -----------------------------------------------------------------------------------------------------

    def _identity(self, task: LocalTask) -> Identity:
        """What the answers to a task depend on: the engine's identity, the data, and how the task is asked."""
        base = self.identity
        template = hash_value(self.engine.tokenizer.chat_template) if self.uses_chat else None
        generation = {
            "samples": self.experiment.eval_samples,
            "thinking_budget": self.thinking_budget,
            "sampling": self.sampling or None,
        }
        return base.with_parts(
            data=task.data_hash,
            task={
                "name": task.task,
                "version": task.version,
                "num_fewshot": task.num_fewshot,
                "chat_template": template,
                "thinking": self.thinking,
                "metrics": task.metrics,
                **(generation if task.output_type == "generate_until" else {}),
            },
            engine={**(base.engine or {}), "eval_max_length": self.max_length},
            versions={**(base.versions or {}), "lm_eval": version("lm-eval")},
        )

    def conditions(self, task: LocalTask) -> str:
        """How the task is asked, for people; what a row belongs to is its identity."""
        drawn = self.drawn.get(task.task)
        return ", ".join(
            (
                f"{task.num_fewshot}-shot",
                "chat template" if self.uses_chat else "plain prompt",
                f"{len(drawn)} of {task.num_documents} documents" if drawn else "all documents",
                f"context {self.max_length} tokens",
            )
        )

    # --- answers ------------------------------------------------------------------------------------------------------

    def _known_rows(self) -> dict[tuple[str, int], dict[str, Any]]:
        """The documents that were answered before under the identity asked for now."""
        recorded = self.folder.identities()

        @cache
        def agrees(task: str, identity: str) -> bool:
            return identity in recorded and self.identities[task].agrees(recorded[identity], "resume")

        return {
            (row["task"], row["doc_id"]): row
            for row in self.folder.rows("documents")
            if row["task"] in self.identities and agrees(row["task"], row.get("identity", ""))
        }

    def _known_answers(self, document: Answered) -> list[Any] | None:
        from ascend_kit.evaluation.answering import answers_of

        row = self.known.get(document.key)
        answers = None if row is None else answers_of(row, document)
        if row is not None and answers is not None:
            self.live.add(document.key, row)
            self._look([(document.key, row)])
        return answers

    def _keep(self, documents: list[Answered]) -> None:
        """Write answered documents to the disk, and tell how far the evaluation is."""
        from ascend_kit.evaluation.answering import document_row

        rows: dict[str, list[dict[str, Any]]] = {}
        for document in documents:
            task = document.key[0]
            head = {"task": task, "set": self.tasks[task].set_name}
            row = {**head, **document_row(self.configured[task], document)}
            rows.setdefault(task, []).append(row)
            self.known[document.key] = row
            self.live.add(document.key, row)
        now = time.perf_counter()
        for task, part in rows.items():
            self.folder.append_all("documents", part, self.identities[task])
            self.wall_s[task] += (now - self._last_s) * len(part) / len(documents)
        self._last_s = now
        self.on_progress(*self.live.progress())
        self._look([(document.key, self.known[document.key]) for document in documents])

    def _look(self, rows: list[tuple[tuple[str, int], dict[str, Any]]]) -> None:
        if self.stop is not None:
            self.stop.look(rows)

    # --- scores -------------------------------------------------------------------------------------------------------

    def _evaluate_and_record(self, lm: DocumentLM, todo: list[str], scratch: str) -> None:
        """Ask all tasks together; where one cannot be asked or scored at all, each by itself, from the same answers."""
        from ascend_kit.evaluation.answering import quiet

        write_task_folder(self.tasks.values(), scratch)
        with quiet():
            errors = self._configure(lm, scratch, todo)
            for name, error in errors.items():
                self._record(self.tasks[name], None, error)
            able = [name for name in todo if name not in errors]
            try:
                found = self._scored(lm, able) if able else {}
            except EnoughEvidence:
                able = self._leave_out_unanswered(lm)
                found = self._scored(lm, able)
            except Exception:  # which of them it was is found out one by one
                found = {}
                for name in able:
                    try:
                        found |= self._scored(lm, [name]) if name not in lm.failed else {}
                    except Exception as error:  # any failure of a task is a result; the others go on
                        lm.failed[name] = error
        for name in able:
            self._record(self.tasks[name], found.get(name), lm.failed.get(name))

    def _leave_out_unanswered(self, lm: DocumentLM) -> list[str]:
        """Only what was answered is scored: the drawn documents are those, and tasks without any are left out."""
        for name, task in list(self.tasks.items()):
            asked = self.drawn.get(name) or range(task.num_documents)
            numbers = [number for number in asked if (name, number) in self.known]
            if numbers:
                self.drawn[name] = numbers
            else:
                del self.tasks[name], self.identities[name]
        lm.indices = self.drawn
        self._write_summary()
        return list(self.tasks)

    def _configure(self, lm: DocumentLM, folder: str, todo: list[str]) -> dict[str, Exception]:
        """Build lm-eval's tasks; what cannot be asked is said before anything is."""
        errors: dict[str, Exception] = {}
        for name in todo:
            try:
                task = load_task(folder, name)
                task.set_config("num_fewshot", self.tasks[name].num_fewshot)
                task.set_fewshot_seed(FEWSHOT_SEED)
                if task.OUTPUT_TYPE == "generate_until":
                    lm.job("", task.config.generation_kwargs or {})
                    if self.experiment.eval_samples > 1:
                        task.set_config("repeats", self.experiment.eval_samples)
                self.configured[name] = task
            except Exception as error:  # a data file or a package that the task needs is not there
                errors[name] = error
        return errors

    def _scored(self, lm: DocumentLM, names: list[str]) -> dict[str, dict[str, Any]]:
        """lm-eval's results of these tasks."""
        from lm_eval import evaluator

        sizes = {name: self.tasks[name].num_documents for name in names}
        found = evaluator.evaluate(
            lm=lm,
            task_dict=cast(Any, {"tasks": {name: self.configured[name] for name in names}}),
            samples={name: self.drawn.get(name) or list(range(sizes[name])) for name in names} if self.drawn else None,
            apply_chat_template=self.uses_chat,
            fewshot_as_multiturn=self.uses_chat,
            confirm_run_unsafe_code=self.experiment.allow_code_execution,
        )
        found = cast(dict[str, Any], found)
        self.export.keep({**found, "samples": {k: v for k, v in found["samples"].items() if k not in lm.failed}})
        return found["results"]

    def _record(self, task: LocalTask, results: dict[str, Any] | None, error: Exception | None) -> None:
        """Append the score rows of a task, all together; one of a failure where it failed."""
        identity, drawn = self.identities[task.task], self.drawn.get(task.task)
        head = {
            "task": task.task,
            "set": task.set_name,
            "kind": "task",
            "num_fewshot": task.num_fewshot,
            "conditions": self.conditions(task),
            "plain_ops": None if self.experiment.eval_endpoint else self.experiment.plain_operators,
            "drawn": scores.drawn_key(drawn),
            "num_rows": 1,
        }
        try:
            if error is None:
                rows = scores.score_rows(task, results or {}, self._documents(task.task))
                if task.output_type == "loglikelihood_rolling" and task.rows:
                    rows.append(self._token_perplexity(task))
                head |= {"num_rows": len(rows), "wall_s": self.wall_s[task.task]}
                self.folder.append_all("scores", [{**head, **row} for row in rows], identity)
        except Exception as other:  # a window that cannot be scored, for instance
            error = other
        if error is not None:
            failure = {"metric": None, "n": 0, "status": "failed", "error": f"{type(error).__name__}: {error}"}
            self.folder.append("scores", {**head, **failure}, identity)

    def _documents(self, task: str) -> list[dict[str, Any]]:
        numbers = self.drawn.get(task) or range(self.tasks[task].num_documents)
        return [self.known[task, number] for number in numbers]

    def _token_perplexity(self, task: LocalTask) -> dict[str, Any]:
        pages = task.rows[task.eval_split]
        texts = [pages[number]["page"] for number in self.drawn.get(task.task) or range(len(pages))]
        context_len = min(PAPER_CONTEXT_LEN, self.max_length)
        identity, asked = self.identities[task.task], hash_value([context_len, texts])
        rows = (row for row in self.folder.rows_of(WINDOWS, identity) if row["text"] == asked)
        found = token_perplexity(
            self.engine,
            texts,
            context_len=context_len,
            batch_size=self.experiment.eval_batch_size,
            known={row["window"]: row["nll"] for row in rows},
            on_window=lambda window, nll: self.folder.append(
                WINDOWS, {"task": task.task, "text": asked, "window": window, "nll": nll}, identity
            ),
        )
        head = {"metric": "token_perplexity", "unit": scores.UNITS["token_perplexity"], "n": len(texts)}
        return {**head, **asdict(found)}

    def _finish(self) -> None:
        table, documents, specs = load_scores(self.folder), document_rows(self.folder), groups_of(self.tasks.values())
        groups = [row for group in specs for row in scores.group_rows(group, table)]
        rows = [*table.to_dict("records"), *groups]
        flags = judge.flags(self.experiment, self.engine, list(self.tasks.values()), rows, documents)
        if self.stop is not None and self.stop.found:
            flags.append(say("evaluation.stopped", "caution", **self.stop.found))
        self.export.write(self.tasks, groups, {group.group: list(group.tasks) for group in specs})
        self._write_summary(
            groups=groups,
            flags=[flag.to_row() for flag in flags],
            published=judge.published(self.experiment, self.engine, rows),
        )
        for flag in flags:
            if flag.level == "alarm":
                self.folder.alarm(f"{flag.key} {flag.values.get('set', '')}".strip(), flag.text("en"), **flag.values)

    def _write_summary(self, **found: Any) -> None:
        identities = {task: identity.id for task, identity in self.identities.items()}
        identities[ALL_TASKS] = self.identity.id
        stopped = self.stop.found if self.stop else None
        summary = {"identities": identities, "drawn": self.drawn, "stopped": stopped}
        self.folder.write_json("evaluation", {**summary, **found})
