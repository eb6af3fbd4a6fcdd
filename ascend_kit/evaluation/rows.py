"""The rows of a data file as lm-eval's tasks want them, each checked: a fault names file and row.

Four kinds of files (parquet, arrow, csv, jsonl) and the shapes in which the sets are handed on: that of the hub, MMLU's
and C-Eval's csv, AGIEval's jsonl. Only the columns a task reads are kept, so that copies in different layouts agree.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_kit.evaluation.files import DataError, subject_key
from ascend_kit.files import HALF_CHARACTER, hash_value, one_line, require_regular, strict_json

Row = dict[str, Any]
LETTERS = "ABCDEFG"
MAX_CHARACTERS = 1 << 24  # of a line or a cell
csv.field_size_limit(MAX_CHARACTERS)
FOUR = LETTERS[:4]
CHINESE, ENGLISH = "问题：", "Q: "
SHARED_TEXT = "This question refers to the following information"  # MMLU's history subjects


@dataclass(frozen=True)
class Shape:
    """What a set's rows hold: column -> kind, how another layout becomes that, and what is wrong with a row."""

    columns: dict[str, str]
    convert: Callable[[Row, str], Row]
    fault: Callable[[Row], str | None]
    header: tuple[str, ...] | None = None  # names of a csv file without a header line


class Reader:
    """Reads splits of one set with these subjects; a file that holds several subjects is read once."""

    def __init__(self, subjects: set[str]) -> None:
        self.subjects = subjects
        self._files: dict[Path, list[Row]] = {}

    def split(self, paths: Iterable[Path], shape: Shape, subject: str, *, mixed: bool = False) -> list[Row]:
        """All rows of a split in their order. `mixed` files tell their subjects apart by a column `subject`."""
        rows = []
        for path in paths:
            found = self._files[path] if path in self._files else read_file(path, shape)
            if mixed:
                self._files[path] = found
            for number, row in enumerate(found, 1):
                where, about = f"{path} row {number}", subject_key(str(row.get("subject")))
                if not mixed and about in self.subjects and about != subject:
                    raise DataError(f"{where} is about {about}; the name of the file says {subject}")
                if about == subject or not mixed:
                    rows.append(_checked(shape.convert(row, subject), shape, where))
        return rows


def _checked(row: Row, shape: Shape, where: str) -> Row:
    lacking = {name: kind for name, kind in shape.columns.items() if name not in row}
    if lacking:
        raise DataError(
            f"{where} lacks {_describe(lacking)}; expected columns {_describe(shape.columns)}; found "
            f"{', '.join(map(str, row))}"
        )
    fault = shape.fault(row)
    kept = {name: row[name] for name in shape.columns}
    bad = next((name for name, value in kept.items() if any(map(_is_no_text, _texts(value)))), None)
    if fault or bad:
        told = one_line(fault) if fault else f"{bad} holds a NUL, half a character or more than a prompt can"
        raise DataError(f"{where}: {told}")
    return kept


def _texts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_no_text(value: Any) -> bool:
    bad = isinstance(value, str) and ("\0" in value or len(value) > MAX_CHARACTERS or HALF_CHARACTER.search(value))
    return bool(bad)


def read_file(path: Path, shape: Shape) -> list[Row]:
    """The rows of one file as they are; DataError when it cannot be read, lacks a column or has no rows."""
    import pyarrow

    readers = {".parquet": _read_arrow, ".arrow": _read_arrow, ".csv": _read_csv, ".jsonl": _read_jsonl}
    try:
        require_regular(path)
        rows = readers[path.suffix](path, shape)
    except DataError:
        raise
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as {path.suffix[1:]} ({reason})") from None
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def _read_arrow(path: Path, shape: Shape) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".parquet":
        table = pyarrow.parquet.ParquetFile(path).read()
    else:
        with pyarrow.memory_map(str(path)) as source:
            try:
                table = pyarrow.ipc.open_stream(source).read_all()
            except pyarrow.ArrowInvalid:
                table = pyarrow.ipc.open_file(source).read_all()
    _refuse_twice(table.schema.names, path)
    found = {field.name: _kind(field.type) for field in table.schema}
    foreign = shape.convert is not _as_it_is and not shape.columns.keys() & found.keys() - {"question", "answer"}
    wrong = {} if foreign else {name: kind for name, kind in shape.columns.items() if found.get(name) != kind}
    if wrong:
        raise DataError(
            f"{path} lacks {_describe(wrong)}; expected columns {_describe(shape.columns)}; found {_describe(found)}"
        )
    return table.to_pylist()


def _kind(arrow_type: Any) -> str:
    from pyarrow import types

    if types.is_dictionary(arrow_type):
        return _kind(arrow_type.value_type)
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    if any(test(arrow_type) for test in lists):
        return f"list of {_kind(arrow_type.value_type)}"
    if any(test(arrow_type) for test in (types.is_string, types.is_large_string, types.is_string_view)):
        return "string"
    return "integer" if types.is_integer(arrow_type) else str(arrow_type)


def _read_csv(path: Path, shape: Shape) -> list[Row]:
    """Every cell is a text: "None" and "NA" are answers, not gaps."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = [line for line in csv.reader(file, strict=True) if "".join(line).strip()]
    if not rows:
        return []
    names = rows[0]
    if shape.header is not None and not set(shape.header) <= set(names):
        rows = rows[names[1:5] == list(FOUR) :]  # a header line may call the columns otherwise
        names = list(shape.header)
    else:
        rows = rows[1:]
    _refuse_twice(names, path)
    for number, line in enumerate(rows, 1):
        if len(line) != len(names):
            raise DataError(f"{path} row {number} has {len(line)} columns, expected {', '.join(names)}")
    return [dict(zip(names, line, strict=True)) for line in rows]


def csv_columns(paths: Iterable[str], *, as_texts: bool = False) -> dict[str, list[Any]]:
    """The columns of csv files: of numbers or booleans where each is written as Python writes it, else of texts.

    "1.10", "007", "None" and "NA" stay as they are, as does a number in a column with words; an empty cell is None.
    """
    plain = Shape({}, lambda row, subject: row, lambda row: None)
    rows = [row for path in paths for row in read_file(Path(path), plain)]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) or None for row in rows] for name in names}
    return columns if as_texts else {name: _typed(cells) for name, cells in columns.items()}


def _typed(cells: list[str | None]) -> list[Any]:
    for kind in ({"True": True, "False": False}.__getitem__, int, float):
        try:
            values = [kind(str(cell)) for cell in cells]
        except (KeyError, ValueError):
            continue
        if all(str(value) == cell and abs(value) < 1 << 63 for value, cell in zip(values, cells, strict=True)):
            return values
    return list(cells)


def _refuse_twice(names: list[str], path: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path} has the column {', '.join(twice)} twice")


def _read_jsonl(path: Path, shape: Shape) -> list[Row]:
    rows = []
    with open(path, encoding="utf-8-sig", newline="\n") as file:  # U+2028 and the like are part of a text
        for number, line in enumerate(file, 1):
            if len(line) > MAX_CHARACTERS:
                raise DataError(f"{path} line {number} has {len(line)} characters; {MAX_CHARACTERS} are allowed")
            if line.strip():
                row = strict_json(line)
                if not isinstance(row, dict):
                    raise DataError(f"{path} line {number} is no JSON object")
                rows.append(row)
    return rows


def _describe(columns: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "none"


# --- shapes of the sets -----------------------------------------------------------------------------------------------


def _as_it_is(row: Row, subject: str) -> Row:
    return row


def _mmlu(row: Row, subject: str) -> Row:
    """A csv row has its choices in columns and a letter as answer."""
    if "choices" in row or not set(FOUR) <= row.keys():
        return row
    answer = row.get("answer")
    place = FOUR.index(answer) if isinstance(answer, str) and answer in tuple(FOUR) else answer
    return {"question": row.get("question"), "choices": [row[letter] for letter in FOUR], "answer": place}


def _agieval(row: Row, subject: str) -> Row:
    """AGIEval's own rows (passage, question, options, label) as the query that its authors build for zero shots."""
    if "query" in row or "question" not in row:
        return row
    passage, question, options, label = row.get("passage") or "", row["question"], row.get("options"), row.get("label")
    is_chinese = subject != "gaokao-english" and (subject.startswith(("gaokao", "jec")) or subject == "logiqa-zh")
    as_it_is = {"query": question, "choices": options, "gold": label, "answer": row.get("answer")}  # for the refusal
    if not isinstance(passage, str):
        return {**as_it_is, "query": passage}
    if not isinstance(question, str) or not question.strip():
        return as_it_is
    if not options:
        end = f"{CHINESE}{question}\n答案：" if is_chinese else f"{ENGLISH}{question}\nA: The answer is"
        return {"query": passage + end, "answer": row.get("answer")}
    if not isinstance(options, list) or len(options) > len(LETTERS):
        return as_it_is
    last = LETTERS[len(options) - 1]
    choices = " ".join(map(str, options))
    if is_chinese:
        end = f"{CHINESE}{question} 选项：{choices}\n答案：从A到{last}, 我们应选择"
    else:
        end = f"{ENGLISH}{question} Answer Choices: {choices}\nA: Among A through {last}, the answer is"
    return {"query": passage + end, "choices": options, "gold": _positions(label)}


def _positions(label: Any) -> Any:
    """Places of the accepted choices: a letter, a list of letters or letters run together; else the label itself."""
    letters = "".join(map(str, label)) if isinstance(label, list) else label
    if not isinstance(letters, str) or not letters or not set(letters) <= set(LETTERS):
        return label
    return [LETTERS.index(letter) for letter in letters]


def _text(row: Row, name: str, *, may_be_blank: bool = False) -> str | None:
    value = row[name]
    if not isinstance(value, str):
        return f"{name} is {value!r}, expected a text"
    return None if may_be_blank or value.strip() else f"{name} is empty"


def _mmlu_fault(row: Row) -> str | None:
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(choice, str) for choice in choices):
        return f"choices are {choices!r}, expected four texts"
    if not any(map(_is_text, choices)):
        return "all choices are empty"
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < 4:
        return f"answer is {answer!r}, expected 0 to 3 (in a csv file A to D)"
    return _text(row, "question")


def _ceval_fault(row: Row) -> str | None:
    if row["answer"] not in tuple(FOUR):
        return f"answer is {row['answer']!r}, expected one of the letters A, B, C, D"
    if fault := next(
        (fault for name in FOUR if (fault := _text(row, name, may_be_blank=True))), _text(row, "question")
    ):
        return fault
    return None if any(_is_text(row[name]) for name in FOUR) else "all choices are empty"


def _agieval_fault(row: Row) -> str | None:
    choices, gold = row["choices"], row["gold"]
    if fault := _text(row, "query"):
        return fault
    if not isinstance(choices, list) or len(choices) < 2 or not all(_is_text(choice) for choice in choices):
        return f"choices are {choices!r}, expected two to seven texts"
    right = isinstance(gold, list) and gold and all(type(n) is int and 0 <= n < len(choices) for n in gold)
    if not right or len(set(gold)) < len(gold) or len(choices) > len(LETTERS):
        return f"gold is {gold!r}, expected places 0 to {len(choices) - 1} (label: letters from A on)"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


MMLU = Shape(
    {"question": "string", "choices": "list of string", "answer": "integer"},
    _mmlu,
    _mmlu_fault,
    header=("question", *FOUR, "answer"),
)
CEVAL = Shape({name: "string" for name in ("question", *FOUR, "answer")}, _as_it_is, _ceval_fault)
AGIEVAL = Shape({"query": "string", "choices": "list of string", "gold": "list of integer"}, _agieval, _agieval_fault)
AGIEVAL_CLOZE = Shape(
    {"query": "string", "answer": "string"}, _agieval, lambda row: _text(row, "answer") or _text(row, "query")
)
WIKITEXT = Shape({"page": "string"}, _as_it_is, lambda row: _text(row, "page", may_be_blank=True))


def passage_of(document: Row) -> str | None:
    """What a document has in common with others on the same text, as a short hash; None for one of its own."""
    query, question = str(document.get("query", "")), str(document.get("question", ""))
    # Up to the first mark: what a passage says before it is the same for all of its questions, whatever these quote.
    marks = [query.index(mark) for mark in (CHINESE, ENGLISH) if mark in query]
    if marks:
        shared = query[: min(marks)].strip()
    else:
        shared = question.rpartition("\n")[0].strip() if question.startswith(SHARED_TEXT) else ""
    return hash_value(shared)[:12] if shared else None
