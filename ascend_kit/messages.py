"""What is said to people: a finding is a key and values, its text stands in one gettext catalogue per language.

Texts of findings, report and panel have keys (locale/<language>.po). What is written in English where it is used, the
notebooks' prose, charts, names of columns, the meaning of parameters and what the doctor says, is its own key
(locale/phrases.<language>.po).
"""

from __future__ import annotations

import contextlib
import difflib
import gettext
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import resources
from typing import Any, Literal

Level = Literal["note", "caution", "alarm", "failed"]
LANGUAGES = ("en", "zh")  # a language is a file locale/<language>.po with the same keys
GAP, GAPS, FILLED = "{}", re.compile(r"(\{#?\})"), re.compile(r"\{(\d?)\}")
# Values of findings that are words of ours; what comes from data, as names and answers do, is never looked up.
SPOKEN = frozenset(("text", "at", "check", "evidence", "remedy", "outcome", "changed", "unit"))
FIELD = re.compile(r"\{(\w+)(?:!\w)?(?::[^}]*)?\}")  # a value in a finding's text
STORED = "evaluation."
_in_use = "en"


@dataclass(frozen=True)
class Finding:
    """One statement: `key` names its text in the catalogue, `values` are filled in, `level` says how serious it is."""

    key: str
    values: dict[str, Any] = field(default_factory=dict)
    level: Level = "note"

    def text(self, language: str | None = None) -> str:
        """The sentence in `language`, by default the one in use; `count` chooses between singular and plural."""
        spoken = {name: phrase(text, language) for name, text in self.values.items() if name in SPOKEN and text}
        return translate(self.key, language, **{**self.values, **spoken})

    def __str__(self) -> str:
        return self.text()

    def to_row(self) -> dict[str, Any]:
        """Plain values for a JSON file; the English text is kept for readers that have no catalogue."""
        return {"key": self.key, "level": self.level, "values": self.values, "text": self.text("en")}

    @classmethod
    def from_row(cls, row: dict[str, Any] | str) -> Finding:
        """What `to_row` wrote, or a plain sentence; another version's key, or values, keep their stored text."""
        if isinstance(row, str):
            return cls("text", {"text": row})
        found = cls(row["key"], row["values"], row["level"])
        with contextlib.suppress(KeyError):
            if row["key"] in keys() and found.text("en"):
                return found
        return cls("text", {"text": row["text"]}, row["level"])


def say(key: str, level: Level = "note", /, **values: Any) -> Finding:
    """A finding; KeyError for a key that the catalogue does not have."""
    if key not in keys():
        raise KeyError(f"locale/en.po has no text for {key!r}")
    return Finding(key, values, level)


def use_language(language: str) -> None:
    """From now on texts are in `language`, one of LANGUAGES."""
    global _in_use
    if language not in LANGUAGES:
        raise ValueError(f"language is {language!r}, allowed: {', '.join(LANGUAGES)}")
    _in_use = language


@contextlib.contextmanager
def in_language(language: str) -> Iterator[None]:
    """Texts are in `language` inside, and in the one before afterwards."""
    before = _in_use
    use_language(language)
    try:
        yield
    finally:
        use_language(before)


def language_in_use() -> str:
    """The language that texts are in."""
    return _in_use


def phrase(text: str, language: str | None = None) -> str:
    """An English text in `language`, by default the one in use; as it is where the catalogue lacks it.

    The catalogue has {} where a text varies, {#} where a number stands; what stands there, and each part between
    semicolons, is looked up itself.
    """
    language = language or _in_use
    return text if language == "en" else _phrase(text, language)


@lru_cache(maxsize=4096)
def _phrase(text: str, language: str) -> str:
    found = _translations(f"phrases.{language}").gettext(text) if text else ""
    if found != text or not text:
        return found
    for pattern, template in _patterns(language):
        if match := pattern.fullmatch(text):
            return _filled(template, [_phrase(part, language) for part in match.groups()])
    return "; ".join(_phrase(part, language) for part in text.split("; ")) if "; " in text else text


def _filled(template: str, parts: list[str]) -> str:
    """{} is the next part; {0} is the first, where a language has another order."""
    following = iter(parts)
    return FILLED.sub(lambda gap: parts[int(gap[1])] if gap[1] else next(following), template)


@cache
def _patterns(language: str) -> list[tuple[re.Pattern[str], str]]:
    """The catalogue's texts with gaps, as patterns: those that begin with words first, then those with most of them."""
    own = ((m.id, m.string) for m in _catalogue(f"phrases.{language}") if isinstance(m.id, str) and m.string)
    texts = [(text, there) for text, there in (*own, *_stored_alarms(language)) if GAPS.search(text)]
    texts.sort(key=lambda pair: (pair[0].startswith(GAP), -len(GAPS.sub("", pair[0]))))
    return [(_pattern(text), there) for text, there in texts]


def _stored_alarms(language: str) -> Iterator[tuple[str, str]]:
    """Findings that a run record keeps as their English text, as texts with gaps."""
    english, there = ({m.id: m.string for m in _catalogue(name)} for name in ("en", language))
    for key in (key for key in english if isinstance(key, str) and key.startswith(STORED)):
        names = [found[1] for found in FIELD.finditer(english[key])]
        yield FIELD.sub(GAP, english[key]), FIELD.sub(lambda found, n=names: f"{{{n.index(found[1])}}}", there[key])


def _pattern(text: str) -> re.Pattern[str]:
    """What varies may hold a semicolon only inside a text that has one, or that has words of its own at both ends."""
    is_closed = ";" in text or not (text.startswith(GAP) or text.endswith(GAP))
    gaps = {GAP: "(.+?)" if is_closed else "([^;]+?)", "{#}": r"([-+\d][-+\d.,e]*)"}
    return re.compile("".join(gaps.get(part) or re.escape(part) for part in GAPS.split(text)))


def translate(key: str, language: str | None = None, /, **values: Any) -> str:
    """The text of a key with its values filled in, by default in the language in use."""
    count = values.get("count")
    texts = _translations(language or _in_use)
    text = texts.gettext(key) if count is None else texts.ngettext(key, key, count)
    return text.format(**values)


@cache
def keys(language: str = "en") -> frozenset[str]:
    """Every key that the catalogue of `language` has a text for."""
    known = (message.id for message in _catalogue(language) if message.id and message.string)
    return frozenset(text if isinstance(text, str) else text[0] for text in known)  # else singular and plural


@cache
def _catalogue(name: str) -> Any:
    from babel.messages.pofile import read_po

    data = (resources.files("ascend_kit") / "locale" / f"{name}.po").read_bytes()
    return read_po(io.BytesIO(data), locale=name.rpartition(".")[2])


@cache
def _translations(name: str) -> gettext.GNUTranslations:
    from babel.messages.mofile import write_mo

    compiled = io.BytesIO()
    write_mo(compiled, _catalogue(name))
    compiled.seek(0)
    return gettext.GNUTranslations(compiled)


# --- errors in a notebook ---------------------------------------------------------------------------------------------


def notebook_shell() -> Any:
    """IPython's shell in a notebook's kernel or at its prompt; None elsewhere."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython else None


def show_errors_in_one_line() -> None:
    """In a notebook, this package's own errors, which a user can mend, are one line without frames; others as ever."""
    shell = notebook_shell()
    if shell is not None:
        shell.set_custom_exc((Exception,), _show_error)


def _show_error(shell: Any, kind: type, error: Exception, trace: Any, tb_offset: int | None = None) -> None:
    if kind.__module__.startswith("ascend_kit."):
        shell._showtraceback(kind, error, [f"\x1b[31m{kind.__name__}\x1b[0m: {error}"])
    else:
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6, shown: Callable[[str], str] = repr) -> str:
    """`; did you mean 'x'?` for the closest known word, else nothing."""
    near = difflib.get_close_matches(word[:80], list(known), n=1, cutoff=cutoff)
    return f"; did you mean {shown(near[0])}?" if near else ""
