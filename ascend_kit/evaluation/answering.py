"""Documents answered once: lm-eval's requests of all tasks together, known answers given again, each new one handed out
at once, as a row with what was asked, what was answered and how.

Requests stay batched across tasks. A failure is narrowed down to the task that causes it, and the others go on.
"""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.utils import handle_non_serializable, hash_string

from ascend_kit.evaluation.adapter import EngineLM, Facts
from ascend_kit.evaluation.interface import EvaluatedEngine
from ascend_kit.evaluation.rows import passage_of
from ascend_kit.evaluation.scores import is_number
from ascend_kit.evaluation.sequential import EnoughEvidence
from ascend_kit.evaluation.tasks import without_warnings

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

Row = dict[str, Any]
Key = tuple[str, int]  # task, number of the document in the data
NO_FILTER = "none"
NO_ANSWER = {"loglikelihood": (float("nan"), False), "loglikelihood_rolling": float("nan"), "generate_until": ""}


@dataclass
class Answered:
    """One document with lm-eval's requests, an answer and facts for each, in the order of the requests."""

    key: Key
    requests: list[Instance]
    answers: dict[int, Any] = field(default_factory=dict)
    facts: dict[int, Facts] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return len(self.answers) == len(self.requests)


class DocumentLM(EngineLM):
    """Answers document by document; `known` answers are given again, new ones reported by `on_documents`.

    `known(document)` returns the answers to a document's requests where they are there already. `together` documents
    are handed to the engine at once. `indices` maps a task to the numbers of its drawn documents; `order` gives the
    place of each document where it is not that of the tasks.
    """

    def __init__(
        self,
        engine: EvaluatedEngine,
        *,
        known: Callable[[Answered], list[Any] | None],
        on_documents: Callable[[list[Answered]], None],
        together: int,
        indices: dict[str, list[int]] | None = None,
        order: Mapping[Key, int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(engine, **options)
        self.known, self.on_documents, self.together = known, on_documents, together
        self.indices, self.order = indices or {}, order
        self.failed: dict[str, Exception] = {}
        self._finished: list[Answered] = []

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._answer_all(requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        return self._answer_all(requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        return self._answer_all(requests, super().generate_until)

    def on_step(self, *_: Any) -> None:
        """Hand out the documents that the step has completed."""
        if self._finished:
            finished, self._finished = self._finished, []
            self.on_documents(finished)

    def _answer_all(self, requests: list[Instance], ask: Callable[..., list[Any]]) -> list[Any]:
        documents: dict[Key, Answered] = {}
        for request in requests:
            key = self.key(request)
            documents.setdefault(key, Answered(key, [])).requests.append(request)
        missing = []
        for document in documents.values():
            known = self.known(document)
            if known is None:
                missing.append(document)
            else:
                document.answers = dict(enumerate(known))
        if self.order is not None:
            places = self.order
            missing.sort(key=lambda document: places.get(document.key, len(places)))
        for start in range(0, len(missing), self.together):
            self._answer(missing[start : start + self.together], ask)
        counts = dict.fromkeys(documents, 0)
        answers = []
        for request in requests:
            key = self.key(request)
            answers.append(documents[key].answers.get(counts[key], NO_ANSWER[request.request_type]))
            counts[key] += 1
        return answers

    def _answer(self, documents: list[Answered], ask: Callable[..., list[Any]]) -> None:
        """Ask the engine; where that fails, task by task, so that only one that fails alone is left out."""
        documents = [item for item in documents if not item.is_complete and item.key[0] not in self.failed]
        if not documents:
            return
        owners = [(document, place) for document in documents for place in range(len(document.requests))]

        def keep(index: int, answer: Any, facts: Facts) -> None:
            document, place = owners[index]
            document.answers[place], document.facts[place] = answer, facts
            if document.is_complete:
                self._finished.append(document)

        self.on_answer = keep
        try:
            ask([document.requests[place] for document, place in owners])
        except EnoughEvidence:
            raise
        except Exception as error:
            self.on_step()
            tasks = dict.fromkeys(document.key[0] for document in documents)
            if len(tasks) == 1:
                self.failed[documents[0].key[0]] = error
                return
            for document in documents:  # a document is asked as a whole
                if not document.is_complete:
                    document.answers, document.facts = {}, {}
            for task in tasks:
                self._answer([document for document in documents if document.key[0] == task], ask)
        self.on_step()

    def key(self, request: Instance) -> Key:
        """The task and the number in the data of a request's document."""
        assert request.task_name is not None and request.doc_id is not None
        drawn = self.indices.get(request.task_name)
        return request.task_name, drawn[request.doc_id] if drawn else request.doc_id


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval 0.4.13 draws a bar per task while building prompts, without a switch, and warns.

    Our progress counts all documents, and truncated inputs are counted by the adapter. Delete the bar's part
    when `build_all_requests` can be told to draw none.
    """
    import lm_eval.api.task as module

    bar, module.tqdm = module.tqdm, lambda items, **_: items
    try:
        with without_warnings():
            yield
    finally:
        module.tqdm = bar


# --- rows -------------------------------------------------------------------------------------------------------------


def hashes(document: Answered) -> Row:
    """What a document is recognised by, as lm-eval computes it: two runs are paired on these."""
    request = document.requests[0]
    text = json.dumps(request.doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return {"doc_id": document.key[1], "doc_hash": hash_string(text), "prompt_hash": hash_string(request.arguments[0])}


def document_row(task: ConfigurableTask, document: Answered) -> Row:
    """Question, choices, expected and given answer, log-probabilities or text, tokens and time of one document."""
    doc, kind = document.requests[0].doc, document.requests[0].request_type
    answers = [document.answers[place] for place in range(len(document.requests))]
    row = {**hashes(document), **_evidence(document), "target": task.doc_to_target(doc)}
    metrics, _ = _metrics(task, document, answers)
    if kind == "loglikelihood_rolling":
        logprob, words = metrics["word_perplexity"]
        return {**row, "target": None, "logprob": logprob, "words": words, "bytes": metrics["byte_perplexity"][1]}
    question = task.doc_to_text(doc)
    question = question if isinstance(question, (str, int, list)) else str(question)
    row |= {"question": question, "passage": passage_of(doc)}
    if kind == "loglikelihood":
        choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else answers[:1]
        row |= {
            "choices": choices if task.OUTPUT_TYPE == "multiple_choice" else None,
            "choice_logprobs": [logprob for logprob, _ in answers[: len(choices)]],
            "choice_is_greedy": [greedy for _, greedy in answers[: len(choices)]],
            "other_logprobs": answers[len(choices) :] or None,
        }
        row["prediction"] = max(range(len(choices)), key=row["choice_logprobs"].__getitem__)
    else:
        row |= {"answer": answers[0], "answers": answers if len(answers) > 1 else None}
    values = {name: value for name, value in metrics.items() if is_number(value) or _is_parts(value)}
    row |= values
    if kind == "generate_until":
        row |= _right(values)
    return row | (_samples(task, document, answers) if len(answers) > 1 and kind == "generate_until" else {})


def _right(values: Row) -> Row:
    """Whether a written answer counts as right when runs are paired, and by which metric: the most lenient filter of
    shares, else the first; a share counts where it is whole.
    """
    shares = [name for name, value in values.items() if not _is_parts(value) and 0 <= value <= 1]
    name = next((name for name in shares if "flexible" in name), next(iter(shares), None))
    return {} if name is None else {"right": float(values[name] == 1), "right_by": name}


def answers_of(row: Row, document: Answered) -> list[Any] | None:
    """The answers to a document's requests that a row holds; None where the row is about another prompt."""
    if any(row.get(name) != value for name, value in hashes(document).items()):
        return None
    if row.get("choice_logprobs"):
        pairs = zip(row["choice_logprobs"], row["choice_is_greedy"], strict=True)
        answers = [*pairs, *map(tuple, row.get("other_logprobs") or [])]
    elif row.get("logprob") is not None:
        answers = [row["logprob"]]
    else:
        answers = row.get("answers") or [row.get("answer")]
    return answers if len(answers) == len(document.requests) and None not in answers else None


def _evidence(document: Answered) -> Row:
    """How the answers came about: numbers of one answer, lists of several samples."""
    facts = [document.facts[place] for place in sorted(document.facts)]
    names = dict.fromkeys(name for item in facts for name in item)
    found = {name: [item.get(name) for item in facts] for name in names}
    is_text = "finish_reason" in found
    row = {name: values if is_text and len(values) > 1 else values[0] for name, values in found.items()}
    row["cut_tokens"] = max((item["cut_tokens"] for item in facts), default=0)
    if is_text:  # one that was cut off makes the document one that was cut off
        row["finish_reason"] = "length" if "length" in found["finish_reason"] else found["finish_reason"][0]
    return {**row, "answered_at_s": time.time()}


def _metrics(task: ConfigurableTask, document: Answered, answers: Iterable[Any]) -> tuple[Row, Row]:
    """Metric -> value of one document, `metric,filter` where the task has named filters; and the filtered answer that
    each value is of.
    """
    found: Row = {}
    judged: Row = {}
    copies: dict[int, Instance] = {}  # several samples of one request share it
    for request, answer in zip(document.requests, answers, strict=False):
        one = copies.setdefault(id(request), copy.copy(request))
        if one.resps is request.resps:
            one.resps, one.filtered_resps = [], {}
        one.resps.append(answer)
    instances = sorted(copies.values(), key=lambda one: one.idx)
    for ensemble in task._filters:
        ensemble.apply(instances)
        filtered = [one.filtered_resps[ensemble.name] for one in instances]
        for name, value in task.process_results(instances[0].doc, filtered).items():
            key = name if ensemble.name == NO_FILTER else f"{name},{ensemble.name}"
            found[key], judged[key] = value, filtered[0]
    return found, judged


def _samples(task: ConfigurableTask, document: Answered, answers: list[str]) -> Row:
    """Each sample by itself: metric -> values, and the value of the most frequent filtered answer (`maj@k`)."""
    single = [_metrics(task, document, [answer]) for answer in answers]
    names = [name for name, value in single[0][0].items() if is_number(value)]
    values = {name: [float(found[name]) for found, _ in single] for name in names}
    majority: Row = {}
    for name in names:
        votes = [str(judged[name]) for _, judged in single]
        majority[name] = values[name][votes.index(Counter(votes).most_common(1)[0][0])]
    return {"sample_metrics": values, "majority_metrics": majority}


def _is_parts(value: Any) -> bool:
    """Whether a metric's value is right or wrong for each part of a document: IFEval's instructions."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, bool) for part in value)
