"""The demo's questions and pages, and the sample data sets on disk, in exactly the schema that lm-eval reads.

`<folder>/mmlu/<subject>/<split>.parquet` and the same for `ceval` and `wikitext`; AGIEval is one data set a
subset, as on the hub: `<folder>/agieval/<subset>/test.parquet`. Every data set folder has a README.md whose
front matter lists its configurations, so that `datasets.load_dataset(folder, name)` works offline.

Pages and short questions are composed from the fact tables, several wordings a fact. The same facts are worded
differently on every call with a new random state, so that held-out pages share their facts, but not their text, with
the pages of the training corpus.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

SCORED_SPLIT = {"mmlu": "test", "ceval": "val", "agieval": "test"}
EXTRA_SPLIT = {"mmlu": "validation", "ceval": "test"}
NUM_DEV, NUM_EXTRA = 5, 2
WIKITEXT_CONFIG = "wikitext-2-raw-v1"
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Question:
    """One question. `gold` holds the positions of the accepted choices; `number` counts within its split.

    `note` is the subject's Chinese name in C-Eval, and english, chinese or cloze (generated answers) in AGIEval.
    """

    suite: str
    subject: str
    split: str
    number: int
    question: str
    choices: tuple[str, ...]
    gold: tuple[int, ...]
    note: str = ""

    @property
    def scored_split(self) -> str:
        return SCORED_SPLIT[self.suite]


def load_questions() -> list[Question]:
    """All questions of the three suites, options in their final order."""
    return [question for suite in SCORED_SPLIT for question in _suite(suite)]


def _suite(suite: str) -> Iterator[Question]:
    """The questions of data/<suite>.txt: sections `[subject | note]` of `question | right answer | wrong answers`.

    ` & ` joins several right answers. Of an exam's subject the first five lines are its dev split, the next two its
    validation (C-Eval: test) split; AGIEval has a test split only.
    """
    for section in read_data(f"{suite}.txt").removeprefix("[").split("\n["):
        head, _, table = section.partition("]\n")
        subject, note = [*rows(head)[0], ""][:2]
        lines = rows(table)
        if note == "cloze":
            for number, (question, answer) in enumerate(lines):
                yield Question(suite, subject, "test", number, question, (answer,), (0,), note)
            continue
        extra = EXTRA_SPLIT.get(suite)
        cuts = [("dev", 0, NUM_DEV), (extra, NUM_DEV, NUM_DEV + NUM_EXTRA)] if extra else []
        for split, start, end in [*cuts, (SCORED_SPLIT[suite], cuts[-1][2] if cuts else 0, len(lines))]:
            for question in _arrange(suite, subject, str(split), lines[start:end]):
                yield replace(question, note=note)


def agieval_query(question: Question) -> str:
    """The prompt column of AGIEval: question, lettered options and the cue for the answer."""
    if question.note == "cloze":
        return f"Q: {question.question}\nA: The answer is"
    options = " ".join(question.choices)
    last = "ABCDE"[len(question.choices) - 1]
    if question.note == "chinese":
        return f"问题：{question.question} 选项：{options}\n答案：从A到{last}, 我们应选择"
    return f"Q: {question.question} Answer Choices: {options}\nA: Among A through {last}, the answer is"


def write_datasets(folder: Path) -> None:
    """Write the four data sets below `folder` (created, must not hold them yet)."""
    questions = load_questions()
    _write_exam(folder / "mmlu", "mmlu", questions, _mmlu_row)
    _write_exam(folder / "ceval", "ceval", questions, _ceval_row)
    for subset in sorted({q.subject for q in questions if q.suite == "agieval"}):
        chosen = [q for q in questions if (q.suite, q.subject) == ("agieval", subset)]
        _write_set(folder / "agieval" / subset, {"default": {"test": [_agieval_row(q) for q in chosen]}})
    _write_set(folder / "wikitext", {WIKITEXT_CONFIG: _wikitext_splits()})


def _arrange(suite: str, subject: str, split: str, lines: list[list[str]]) -> list[Question]:
    """Put each line's choices in a seeded order in which every position is right about equally often."""
    rng = random.Random(f"{suite}/{subject}/{split}")
    count = len(lines[0]) - 1
    positions = [place % count for place in range(len(lines))]
    rng.shuffle(positions)
    found = []
    for number, (line, position) in enumerate(zip(lines, positions, strict=True)):
        question, right, *wrong = line
        first, *more = right.split(" & ")
        others = more + wrong
        rng.shuffle(others)
        choices = [*others[:position], first, *others[position:]]
        gold = tuple(place for place, choice in enumerate(choices) if choice in (first, *more))
        if suite == "agieval":
            choices = [f"({letter}){choice}" for letter, choice in zip("ABCDE", choices, strict=False)]
        found.append(Question(suite, subject, split, number, question, tuple(choices), gold))
    return found


def _mmlu_row(question: Question) -> dict:
    return {
        "question": question.question,
        "subject": question.subject,
        "choices": list(question.choices),
        "answer": question.gold[0],
    }


def _ceval_row(question: Question) -> dict:
    answer = "ABCD"[question.gold[0]]
    row: dict = {"id": question.number, "question": question.question}
    row |= dict(zip("ABCD", question.choices, strict=True))
    row["answer"] = "" if question.split == "test" else answer
    right = question.choices[question.gold[0]]
    row["explanation"] = f"正确的选项是{answer}，即{right}。" if question.split == "dev" else ""
    return row


def _agieval_row(question: Question) -> dict:
    query = agieval_query(question)
    if question.note == "cloze":
        return {"query": query, "answer": question.choices[0]}
    return {"query": query, "choices": list(question.choices), "gold": list(question.gold)}


def _wikitext_splits() -> dict[str, list[dict]]:
    """Every topic in `train`; other wordings of a third in `test` and of an eighth in `validation`."""
    chosen = topics()
    strides = {"train": (0, 1), "validation": (1, 8), "test": (0, 3)}
    return {
        split: [
            {"page": to_wikitext(page_text(topic, random.Random(f"{split}/{topic.title}")))}
            for topic in chosen[start::stride]
        ]
        for split, (start, stride) in strides.items()
    }


def _write_exam(folder: Path, suite: str, questions: list[Question], to_row) -> None:
    configs: dict[str, dict[str, list[dict]]] = {}
    for question in questions:
        if question.suite == suite:
            splits = configs.setdefault(question.subject, {})
            splits.setdefault(question.split, []).append(to_row(question))
    _write_set(folder, configs)


def _write_set(folder: Path, configs: dict[str, dict[str, list[dict]]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for config, splits in configs.items():
        for split, rows_ in splits.items():
            path = folder / _parquet_name(config, split)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows_), path)
    (folder / "README.md").write_text(_readme(configs), encoding="utf-8")


def _readme(configs: dict[str, dict[str, list[dict]]]) -> str:
    listed = [
        {"config_name": config,
         "data_files": [{"split": split, "path": _parquet_name(config, split)} for split in splits]}
        for config, splits in configs.items()
    ]  # fmt: skip
    return f"---\n{yaml.safe_dump({'configs': listed}, sort_keys=False)}---\n\nSample data written for this project.\n"


def _parquet_name(config: str, split: str) -> str:
    return f"{split}.parquet" if config == "default" else f"{config}/{split}.parquet"


# --- pages ------------------------------------------------------------------------------------------------------------


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


def _paragraph(facts: tuple[tuple[str, ...], ...], rng: random.Random) -> str:
    first, *rest = [rng.choice(wordings) for wordings in facts]
    rng.shuffle(rest)
    return " ".join([first, *rest])


def _topic(kind: dict[str, Any], row: list[str]) -> Topic:
    """A topic from the wordings of its kind and one row of facts."""
    values = dict(zip(rows(kind["columns"])[0], row, strict=True))
    values |= {f"a_{key}": f"{'an' if value[0].lower() in 'aeiou' else 'a'} {value}" for key, value in values.items()}
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
