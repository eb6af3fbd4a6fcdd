"""Recognises known error texts of an Ascend stack: one table (advice.yaml) behind every hint of this package."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class KnownError:
    """`kind`: a "cause", a "wrapper" that only says that something failed, or a "symptom" in words."""

    key: str
    patterns: list[str]
    meaning: str
    actions: list[str]
    source: str
    kind: str = "cause"


@dataclass(frozen=True)
class Explanation:
    """A known error found in a text: `line_number` counts from 1, `matched` is that line."""

    key: str
    line_number: int
    matched: str
    meaning: str
    actions: list[str]
    source: str


@functools.cache
def known_errors() -> tuple[KnownError, ...]:
    """The table, read once."""
    rows = yaml.safe_load(Path(__file__).with_name("advice.yaml").read_text(encoding="utf-8"))
    return tuple(KnownError(**row) for row in rows)


def explain(text: str) -> list[Explanation]:
    """Known errors in a text, earliest first, wrappers after causes; [] when nothing is recognised.

    Symptoms in words are looked for only where no error was found: logs are full of ordinary words.
    """
    for kinds in (("cause", "wrapper"), ("symptom",)):
        found = []
        for known in (known for known in known_errors() if known.kind in kinds):
            hits = [re.search(pattern, text, re.IGNORECASE) for pattern in known.patterns]
            if starts := [hit.start() for hit in hits if hit]:
                found.append((kinds.index(known.kind), min(starts), known))
        if found:
            return [_explanation(known, text, start) for _, start, known in sorted(found, key=lambda hit: hit[:2])]
    return []


def advice(text: str, otherwise: str = "") -> str:
    """What to do about the first known error in a text, in one line; `otherwise` when nothing is recognised."""
    found = explain(text)
    return "; ".join(found[0].actions) if found else otherwise


def _explanation(known: KnownError, text: str, start: int) -> Explanation:
    line = text[text.rfind("\n", 0, start) + 1 :].partition("\n")[0].strip()
    return Explanation(
        known.key, text.count("\n", 0, start) + 1, line[:200], known.meaning, known.actions, known.source
    )


def render_explanations(explanations: list[Explanation]) -> str:
    """Terminal text, or what to collect when nothing was recognised."""
    if not explanations:
        return (
            "No known error in this text. To get more of it: read ~/ascend/log (ASCEND_PROCESS_LOG_PATH moves it) of "
            "the rank that failed first, or run again with ASCEND_GLOBAL_LOG_LEVEL=1 ASCEND_SLOG_PRINT_TO_STDOUT=1."
        )
    return "\n\n".join(
        f"{item.key} (line {item.line_number}: {item.matched})\n  {item.meaning}\n"
        + "".join(f"  - {action}\n" for action in item.actions)
        + f"  seen in: {item.source}"
        for item in explanations
    )
