"""Encyclopaedia pages and short questions composed from the fact tables, several wordings a fact.

The same facts are worded differently on every call with a new random state, so that held-out pages share
their facts, but not their text, with the pages of the training corpus.
"""

import random
import re
from dataclasses import dataclass

from ascend_kit.demo.facts import ANIMALS, COUNTRIES, ELEMENTS, PLANETS, rows


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
    found = [_country(*row) for row in rows(COUNTRIES)]
    found += [_element(*row) for row in rows(ELEMENTS)]
    found += [_animal(*row) for row in rows(ANIMALS)]
    found += [_planet(*row) for row in rows(PLANETS)]
    return found


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


def _country(name, capital, continent, language, currency, known) -> Topic:
    return Topic(
        name,
        facts=(
            (f"{name} is a country in {continent}.", f"{name} lies in {continent}."),
            (f"The capital of {name} is {capital}.", f"Its capital city is {capital}."),
            (f"People there speak {language}.", f"The main language is {language}."),
        ),
        section="Economy",
        section_facts=(
            (f"The currency of {name} is the {currency}.", f"Prices are given in the {currency}."),
            (f"{name} is known for {known}.", f"The country is famous for {known}."),
        ),
        questions=(
            (f"What is the capital of {name}?", f"The capital of {name} is {capital}."),
            (f"Which language do people speak in {name}?", f"People in {name} speak {language}."),
            (f"What is the currency of {name}?", f"The currency of {name} is the {currency}."),
        ),
    )


def _element(name, symbol, number, state, use) -> Topic:
    return Topic(
        name,
        facts=(
            (
                f"{name} is a chemical element with the symbol {symbol}.",
                f"{name} is an element whose symbol is {symbol}.",
            ),
            (f"Its atomic number is {number}.", f"The atomic number of {name} is {number}."),
            (f"At room temperature it is a {state}.", f"It is a {state} at room temperature."),
        ),
        section="Use",
        section_facts=((f"{name} is used for {use}.", f"One use of {name} is {use}."),),
        questions=(
            (f"What is the symbol of {name.lower()}?", f"The symbol of {name.lower()} is {symbol}."),
            (f"What is the atomic number of {name.lower()}?", f"The atomic number of {name.lower()} is {number}."),
        ),
    )


def _animal(name, kind, food, home, young) -> Topic:
    return Topic(
        name.capitalize(),
        facts=(
            (f"The {name} is {_article(kind)}.", f"The {name} belongs to the {kind} class."),
            (f"It feeds on {food}.", f"Its food is {food}."),
            (f"The {name} lives in or near the {home}.", f"Its home is the {home}."),
        ),
        section="Young",
        section_facts=((f"A young {name} is called {_article(young)}.", f"Its young is called {_article(young)}."),),
        questions=(
            (f"What does a {name} eat?", f"A {name} feeds on {food}."),
            (f"What is a young {name} called?", f"A young {name} is called {_article(young)}."),
        ),
    )


def _planet(name, place, kind, moons, known) -> Topic:
    return Topic(
        f"{name} (planet)",
        facts=(
            (f"{name} is the {place} planet from the Sun.", f"{name} is planet number {place} from the Sun."),
            (f"It is {_article(kind)} planet.", f"{name} is one of the {kind} planets."),
            (f"{name} has {moons}.", f"Around it there are {moons}."),
        ),
        section="Features",
        section_facts=((f"{name} is known for {known}.", f"Astronomers know {name} for {known}."),),
        questions=(
            (f"Which place from the Sun has {name}?", f"{name} is the {place} planet from the Sun."),
            (f"How many moons has {name}?", f"{name} has {moons}."),
        ),
    )
