"""What is said to people: a finding is a key and values, its text stands in one gettext catalogue per language."""

from __future__ import annotations

import gettext
import io
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

Level = Literal["note", "caution", "alarm", "failed"]
LANGUAGES = ("en",)  # a language is a file locale/<language>.po with the same keys


@dataclass(frozen=True)
class Finding:
    """One statement: `key` names its text in the catalogue, `values` are filled in, `level` says how serious it is."""

    key: str
    values: dict[str, Any] = field(default_factory=dict)
    level: Level = "note"

    def text(self, language: str = "en") -> str:
        """The sentence in `language`; a value `count` chooses between singular and plural."""
        return translate(self.key, language, **self.values)

    def __str__(self) -> str:
        return self.text()

    def to_row(self) -> dict[str, Any]:
        """Plain values for a JSON file; the English text is kept for readers that have no catalogue."""
        return {"key": self.key, "level": self.level, "values": self.values, "text": str(self)}

    @classmethod
    def from_row(cls, row: dict[str, Any] | str) -> Finding:
        """What `to_row` wrote, or a plain sentence; a key that this version does not know keeps its stored text."""
        if isinstance(row, str):
            return cls("text", {"text": row})
        if row["key"] not in keys():
            return cls("text", {"text": row["text"]}, row["level"])
        return cls(row["key"], row["values"], row["level"])


def say(key: str, level: Level = "note", /, **values: Any) -> Finding:
    """A finding; KeyError for a key that the catalogue does not have."""
    if key not in keys():
        raise KeyError(f"locale/en.po has no text for {key!r}")
    return Finding(key, values, level)


def translate(key: str, language: str = "en", /, **values: Any) -> str:
    """The text of a key with its values filled in."""
    count = values.get("count")
    texts = _translations(language)
    text = texts.gettext(key) if count is None else texts.ngettext(key, key, count)
    return text.format(**values)


@cache
def keys(language: str = "en") -> frozenset[str]:
    """Every key that the catalogue of `language` has a text for."""
    return frozenset(str(_plain(message.id)) for message in _catalogue(language) if message.id and message.string)


def _plain(text: Any) -> Any:
    return text[0] if isinstance(text, (list, tuple)) else text


@cache
def _catalogue(language: str) -> Any:
    from babel.messages.pofile import read_po

    data = (resources.files("ascend_kit") / "locale" / f"{language}.po").read_bytes()
    return read_po(io.BytesIO(data), locale=language)


@cache
def _translations(language: str) -> gettext.GNUTranslations:
    from babel.messages.mofile import write_mo

    compiled = io.BytesIO()
    write_mo(compiled, _catalogue(language))
    compiled.seek(0)
    return gettext.GNUTranslations(compiled)
