"""Tokens of some requests as they are made, by a thread that does not wait for whoever reads them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import NamedTuple

from ascend_kit.engine.sequence import Sequence


class StreamEvent(NamedTuple):
    """One new token of one request; `finish_reason` is set on its last event, which may carry no token."""

    index: int
    token_id: int | None
    text: str
    finish_reason: str | None


class TokenStream:
    """Collects the events of requests, numbered by their place. `text_of` gives a request's text so far."""

    def __init__(self, text_of: Callable[[Sequence], str]) -> None:
        self._text_of = text_of
        self._events: SimpleQueue[StreamEvent | BaseException] = SimpleQueue()
        self._sent: dict[int, int] = {}  # characters, by place

    def follow(self, place: int, sequence: Sequence) -> None:
        """Add what the latest step brought for this request."""
        text, before = self._text_of(sequence), self._sent.get(place, 0)
        if not sequence.is_finished:
            # A stop string may still be completed by the next token: hold its longest possible start back.
            held = max((len(word) - 1 for word in sequence.sampling.stop), default=0)
            text = text[: max(0, len(text) - held)]
        self._sent[place] = max(len(text), before)
        token = None if sequence.error is not None else sequence.token_ids[-1]
        self._events.put(StreamEvent(place, token, text[before:], sequence.finish_reason))

    def read(self, sequences: list[Sequence], advance: Callable[[], None]) -> Iterator[StreamEvent]:
        """Yield events until all `sequences` have ended, while a thread calls `advance`; its errors are raised here."""
        left = threading.Event()

        def pump() -> None:
            try:
                while not left.is_set() and not all(sequence.is_finished for sequence in sequences):
                    advance()
            except BaseException as error:
                self._events.put(error)

        thread = threading.Thread(target=pump, name="ascend-kit-stream", daemon=True)
        thread.start()
        try:
            unfinished = len(sequences)
            while unfinished:
                event = self._events.get()
                if isinstance(event, BaseException):
                    raise event
                unfinished -= event.finish_reason is not None
                yield event
        finally:
            left.set()
            thread.join()
