"""Documents answered once: lm-eval's requests of all tasks together, known answers given again, each new one handed out
at once.

Requests stay batched across tasks. A failure is narrowed down to the task that causes it, and the others go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.instance import Instance

from ascend_kit.evaluation.adapter import EngineLM, Facts
from ascend_kit.evaluation.interface import EvaluatedEngine
from ascend_kit.evaluation.stopping import EnoughEvidence

Key = tuple[str, int]  # task, number of the document in the data
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
        documents = self._by_document(requests)
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

    def _by_document(self, requests: Iterable[Instance]) -> dict[Key, Answered]:
        found: dict[Key, Answered] = {}
        for request in requests:
            key = self.key(request)
            found.setdefault(key, Answered(key, [])).requests.append(request)
        return found

    def key(self, request: Instance) -> Key:
        """The task and the number in the data of a request's document."""
        assert request.task_name is not None and request.doc_id is not None
        drawn = self.indices.get(request.task_name)
        return request.task_name, drawn[request.doc_id] if drawn else request.doc_id


@contextmanager
def quiet() -> Iterator[None]:
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
