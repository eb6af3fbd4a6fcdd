"""Encyclopaedia pages and short questions composed from the fact tables, several wordings a fact.

The same facts are worded differently on every call with a new random state, so that held-out pages share
their facts, but not their text, with the pages of the training corpus.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Topic:
    """One subject of a page: its wordings (one tuple a fact) and its questions with their answers."""

    title: str
    facts: tuple[tuple[str, ...], ...]
    section: str
    section_facts: tuple[tuple[str, ...], ...]
    questions: tuple[tuple[str, str], ...]


def topics() -> list[Topic]:
    """Every topic of the demo: countries, chemical elements, animals and planets."""
    kinds = yaml.safe_load(read_data("topics.yaml")).values()
    return [_topic(kind, row) for kind in kinds for row in rows(kind["rows"])]


def read_data(name: str) -> str:
    """The text of a data file of the demo."""
    return (DATA / name).read_text(encoding="utf-8")


def rows(table: str) -> list[list[str]]:
    """The lines of a table, split at the bars."""
    return [[entry.strip() for entry in line.split("|")] for line in table.strip().splitlines()]


def page_text(topic: Topic, rng: random.Random) -> str:
    """One page about the topic, as lm-eval's WikiText detokeniser leaves it (the text a model reads)."""
    body = _paragraph(topic.facts, rng)
    section = _paragraph(topic.section_facts, rng)
    return f" = {topic.title} =\n\n{body}\n\n== {topic.section} ==\n\n{section}\n"


def to_wikitext(text: str) -> str:
    """The page in WikiText's raw form: punctuation stands apart, every line begins and ends with a space."""
    spaced = re.sub(r"([.,;])(?=\s)", r" \1", text)
    spaced = spaced.replace("==", "= =")
    return re.sub(r"\n", " \n ", spaced).replace("\n  ", "\n ")


def summary(topic: Topic) -> str:
    """A fixed short answer to "Tell me about ...": the first wording of each fact."""
    return " ".join(wordings[0] for wordings in topic.facts)


def _paragraph(facts: tuple[tuple[str, ...], ...], rng: random.Random) -> str:
    first, *rest = [rng.choice(wordings) for wordings in facts]
    rng.shuffle(rest)
    return " ".join([first, *rest])


def _article(noun: str) -> str:
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def _topic(kind: dict[str, Any], row: list[str]) -> Topic:
    """A topic from the wordings of its kind and one row of facts."""
    values = dict(zip(rows(kind["columns"])[0], row, strict=True))
    values |= {f"a_{key}": _article(value) for key, value in values.items()}
    values |= {"lower": values["name"].lower(), "capitalised": values["name"].capitalize()}

    def fill(texts: list[str]) -> tuple[str, ...]:
        return tuple(text.format(**values) for text in texts)

    return Topic(
        kind["title"].format(**values),
        tuple(map(fill, kind["facts"])),
        kind["section"],
        tuple(map(fill, kind["section_facts"])),
        tuple((ask, reply) for ask, reply in map(fill, kind["questions"])),
    )
