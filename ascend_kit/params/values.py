"""Rules for single values: one meaning whether a value came from YAML, a notebook, papermill or the command line."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ascend_kit.messages import did_you_mean

# YAML 1.1 takes 1e-3 for text, so does papermill: the model reads it as the number it looks like.
EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
WHOLE = re.compile(r"-?(0|[1-9]\d*)")
DATE = re.compile(r"\d{4}-\d\d-\d\d")
ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+):(\d{1,5})")
DEVICE_PATTERN = re.compile(r"auto|cpu|(cuda|npu)(:\d{1,4})?")
MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_SHOWN = 200, 4000, 80


class ParameterError(ValueError):
    """A parameter is unknown, of the wrong type or impossible; the text names it and what is allowed."""


def plain(value: Any, kind: str) -> Any:
    """The value as a plain Python one of the declared `kind` where it clearly stands for one, else unchanged.

    numpy scalars, Path, tuples and dates become what they stand for; `1e-3` a number where a number is declared;
    `[1, 2]` and `a, b` as text a list where a list is declared (papermill -p hands them on as text).
    """
    if isinstance(value, (Path, datetime.date)):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [plain(item, kind[5:] if kind.startswith("list[") else "") for item in value]
    if isinstance(value, str):
        if "float" in kind and EXPONENT.fullmatch(value):
            return float(value)
        return _list_of(value, numbers="int" in kind) if kind.startswith("list") else value
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "shape", None) == () else value


def _list_of(text: str, *, numbers: bool) -> list[Any]:
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    items = [item.strip().strip("'\"") for item in inner.split(",") if item.strip()]
    return [int(item) if numbers and WHOLE.fullmatch(item) else item for item in items]


def check_text(value: str) -> None:
    """Refuse text that no name or path can be made of."""
    if not value.strip():
        raise ValueError("must not be empty")
    if any(ord(letter) < 32 or 0x7F <= ord(letter) < 0xA0 or 0xD800 <= ord(letter) < 0xE000 for letter in value):
        raise ValueError("holds a line end or another control character")


def folder_name(value: str) -> str:
    """A name that becomes a folder: letters, digits and . _ - + in any script."""
    if not re.fullmatch(r"[\w.+-]+", value) or value.strip(".") == "":
        raise ValueError("use letters, digits, '.', '_', '-' and '+' only: it names a folder")
    if DATE.fullmatch(value):
        raise ValueError(f"YAML takes this for a date; put a word in front, for instance run-{value}")
    if len(value.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"names a folder and may have {MAX_NAME_BYTES} bytes")
    return value


def path_text(value: str | None) -> str | None:
    """A path with `~` expanded; the word demo stays."""
    if value is None:
        return None
    path = os.path.expanduser(value)
    if len(os.fsencode(path)) > MAX_PATH_BYTES or any(len(os.fsencode(part)) > 255 for part in Path(path).parts):
        raise ValueError(f"a path may have {MAX_PATH_BYTES} bytes, each of its names 255")
    return path


def device_name(value: str) -> str:
    """`auto`, or a kind of device with the number of a card; `ascend` means npu."""
    value = "npu" + value[6:] if value.startswith("ascend") else value
    if not DEVICE_PATTERN.fullmatch(value):
        raise ValueError("allowed: auto, cpu, cuda, cuda:N, npu, npu:N, ascend")
    return value


def ray_address(value: str | None) -> str | None:
    """`auto` or host:port."""
    match = ADDRESS.fullmatch(value or "")
    if value not in (None, "auto") and not (match and 0 < int(match.group(2)) < 65536):
        raise ValueError("allowed: auto, or host:port of the cluster's head, for instance 10.0.0.1:6379")
    return value


def one_of(value: str, allowed: dict[str, str]) -> str:
    """The canonical spelling of a word."""
    if value.lower() not in allowed:
        raise ValueError(f"allowed: {', '.join(allowed)}" + did_you_mean(value.lower(), allowed, shown=str))
    return allowed[value.lower()]


def without_repetition(values: list[Any]) -> list[Any]:
    """Refuse an entry that stands twice: it would be measured or compared twice."""
    again = next((item for number, item in enumerate(values) if item in values[:number]), None)
    if again is not None:
        raise ValueError(f"{again!r} stands twice")
    return values


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The sentence about a name that is no parameter."""
    return (
        f"unknown parameter {shown(key)}{did_you_mean(key, known, 0.5)} (all names: python -m ascend_kit check --list)"
    )


def shown(value: Any) -> str:
    """The value's repr, bounded, for an error of one line."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def choices(model: type[BaseModel], key: str) -> list[str]:
    """The allowed words of a field that is a choice, else nothing."""
    return [word for word in get_args(model.model_fields[key].annotation) if isinstance(word, str)]


def explained(error: ValidationError, model: type[BaseModel], source: str, places: Mapping[str, str]) -> str:
    """Every fault of `model`'s values in one line; `places` says where a value stands, if not just in `source`."""
    return "; ".join(_explain(item, model, source, places) for item in error.errors())


def _explain(item: Any, model: type[BaseModel], source: str, places: Mapping[str, str]) -> str:
    """One fault as `file, line N: name: what is allowed, got value`."""
    key, value = str(item["loc"][0]) if item["loc"] else "", item["input"]
    text = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        text = unknown_key(key, model.model_fields)
    elif key:
        if item["type"] == "literal_error":
            text += did_you_mean(str(value), choices(model, key))
        if item["type"] == "string_type" and isinstance(value, (bool, int, float)):
            text += " (YAML takes it for another type: put it in quotes)"
        if item["type"].endswith("_type") and value is None:
            text = "must not be empty"
        text = f"{'.'.join(str(part) for part in item['loc'])}: {text}, got {shown(value)}"
    named = [key] if key else re.findall(r"\w+", text)
    place = next((places[name] for name in named if name in places), source)
    return f"{place}: {text}"
