"""Text of a growing answer, without ever showing half a character."""

from __future__ import annotations

from typing import Any


class Detokenizer:
    """Turns the token ids of one answer into text piece by piece.

    Byte-level tokens may end inside a UTF-8 character, and some tokenizers join neighbours, so each piece is the
    difference of two decodings that start at the same earlier token.
    """

    CONTEXT = 6  # tokens before the new ones that are decoded again, enough for any character's bytes

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.shown = 0  # tokens whose text is in self.text
        self.text = ""
        self.is_cut = False  # at a stop string

    def add(self, token_id: int) -> str:
        """The text that became complete with this token; empty while a character is unfinished."""
        self.ids.append(token_id)
        start = max(0, self.shown - self.CONTEXT)
        before = self._decode(self.ids[start : self.shown])
        now = self._decode(self.ids[start:])
        if now.endswith("\ufffd"):
            return ""
        return self._show(now[len(before) :])

    def finish(self) -> str:
        """The rest of the text, replacement characters included when the answer ends inside a character."""
        start = max(0, self.shown - self.CONTEXT)
        before = self._decode(self.ids[start : self.shown])
        return self._show(self._decode(self.ids[start:])[len(before) :])

    def find_stop(self, piece: str) -> bool:
        """Cut the text at the first stop string that the latest piece completed; True when there was one."""
        window = max(0, len(self.text) - len(piece) - max(map(len, self.stop), default=0))
        found = [at for at in (self.text.find(word, window) for word in self.stop) if at >= 0]
        if found:
            self.text, self.is_cut = self.text[: min(found)], True
        return bool(found)

    def _show(self, piece: str) -> str:
        self.shown = len(self.ids)
        self.text += piece
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
