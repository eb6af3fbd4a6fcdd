"""When a request is finished, and the text of those whose text matters while they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ascend_kit.engine.detokenizer import Detokenizer
from ascend_kit.engine.sequence import Sequence


class StopRules:
    """Called after each new token: "stop", "length" or None.

    `tokenizer` is called when the first request needs text, so that a process which never does loads none.
    """

    def __init__(self, tokenizer: Callable[[], Any], eos_token_ids: tuple[int, ...], max_seq_length: int):
        self._tokenizer, self.eos_token_ids, self.max_seq_length = tokenizer, eos_token_ids, max_seq_length
        self._texts: dict[int, Detokenizer] = {}

    def __call__(self, sequence: Sequence, token: int) -> str | None:
        sampling = sequence.sampling
        if sampling.stop and sequence.id not in self._texts:
            self.follow(sequence, sequence.output_ids[:-1])
        is_end = token in sampling.stop_token_ids or (not sampling.ignore_eos and token in self.eos_token_ids)
        text = self._texts.get(sequence.id)
        if text is not None and not is_end:
            piece = text.add(token)
            if sequence.num_output_tokens >= sampling.min_new_tokens and text.find_stop(piece):
                return "stop"
        if is_end:
            return "stop"
        full = sequence.num_tokens >= self.max_seq_length
        return "length" if full or sequence.num_output_tokens >= sampling.max_new_tokens else None

    def follow(self, sequence: Sequence, earlier: list[int] | None = None) -> Detokenizer:
        """Keep the text of a request from now on; `earlier` are the tokens it has written before."""
        text = self._texts[sequence.id] = Detokenizer(self._tokenizer(), sequence.sampling.stop)
        for token in earlier or ():
            text.add(token)
        return text

    def text_so_far(self, sequence: Sequence) -> str:
        """Text of a followed request."""
        return self._texts[sequence.id].text

    def forget(self, sequence_id: int) -> Detokenizer | None:
        """Stop keeping a request's text; its detokenizer, or None when the text was not kept."""
        return self._texts.pop(sequence_id, None)

    def clear(self) -> None:
        """Forget all requests."""
        self._texts.clear()
