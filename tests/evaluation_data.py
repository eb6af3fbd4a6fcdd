"""Small seeded data sets in the schema of the real ones, for the evaluation tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ascend_kit.evaluation.datasets import find_tasks
from ascend_kit.evaluation.files import DataError
from ascend_kit.evaluation.tasks import LocalTask

WORDS = ["river", "stone", "lamp", "cloud", "seven", "green", "paper", "north", "wheel", "salt", "glass"]
HANZI = "天地人水火木金土日月山石田禾"
MMLU_SUBJECTS = ("abstract_algebra", "business_ethics")  # one of the group stem, one of other
CEVAL_SUBJECTS = ("law", "physician")
AGIEVAL_SUBJECTS = ("aqua-rat", "jec-qa-kd", "gaokao-mathcloze")
WIKITEXT_CONFIG = "wikitext-2-raw-v1"

MMLU_ROW = {"question": "q", "choices": ["w", "x", "y", "z"], "answer": 1}
CEVAL_ROW = {"id": 0, "question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_sets(root: Path, *, documents: int = 6, shots: int = 5, seed: int = 0) -> Path:
    """All four sets below `root` as <set>/<subject>/<split>.parquet; `documents` per subject."""
    rnd = random.Random(seed)
    for subject in MMLU_SUBJECTS:
        write_table(root / "mmlu" / subject / "test.parquet", [mmlu_row(rnd, subject) for _ in range(documents)])
        write_table(root / "mmlu" / subject / "dev.parquet", [mmlu_row(rnd, subject) for _ in range(shots)])
    for subject in CEVAL_SUBJECTS:
        write_table(root / "ceval" / subject / "val.parquet", [ceval_row(rnd, n) for n in range(documents)])
        write_table(root / "ceval" / subject / "dev.parquet", [ceval_row(rnd, n) for n in range(shots)])
    for subject in AGIEVAL_SUBJECTS:
        write_table(root / "agieval" / subject / "test.parquet", [agieval_row(rnd, subject) for _ in range(documents)])
    write_table(root / "wikitext" / WIKITEXT_CONFIG / "test.parquet", [{"page": page(rnd)} for _ in range(documents)])
    return root


def mmlu_row(rnd: random.Random, subject: str) -> dict[str, Any]:
    return {
        "question": sentence(rnd, 6),
        "subject": subject,
        "choices": [sentence(rnd, 2) for _ in range(4)],
        "answer": rnd.randrange(4),
    }


def ceval_row(rnd: random.Random, number: int) -> dict[str, Any]:
    row = {"id": number, "question": "".join(rnd.choices(HANZI, k=8)) + "____。"}
    row |= {letter: "".join(rnd.choices(HANZI, k=2)) for letter in "ABCD"}
    return {**row, "answer": rnd.choice("ABCD"), "explanation": ""}


def agieval_row(rnd: random.Random, subject: str) -> dict[str, Any]:
    if subject == "gaokao-mathcloze":
        return {"query": f"Q: {sentence(rnd, 5)}\nA: The answer is", "answer": str(rnd.randrange(10))}
    choices = [f"({letter}){sentence(rnd, rnd.randrange(1, 4))}" for letter in "ABCDE"[: rnd.choice((4, 5))]]
    gold = sorted(rnd.sample(range(len(choices)), 2 if subject == "jec-qa-kd" else 1))
    return {"query": f"Q: {sentence(rnd, 6)} Answer Choices: {' '.join(choices)}\nA:", "choices": choices, "gold": gold}


def page(rnd: random.Random) -> str:
    title = sentence(rnd, 1).strip(".")
    paragraphs = [f" {sentence(rnd, rnd.randrange(5, 25))[:-1]} , {sentence(rnd, 4)[:-1]} . \n" for _ in range(3)]
    return f" = {title} = \n \n" + " \n".join(paragraphs)


def sentence(rnd: random.Random, words: int) -> str:
    return " ".join(rnd.choices(WORDS, k=words)).capitalize() + "."


def put(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def only(root: Path, name: str, **options: Any) -> LocalTask:
    (task,) = find_tasks(root, [name], num_fewshot=0, **options)
    return task


def refusal(root: Path, name: str) -> str:
    with pytest.raises(DataError) as caught:
        find_tasks(root, [name], num_fewshot=0)
    return str(caught.value)
