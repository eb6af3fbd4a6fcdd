"""The one reader of prompt files: a JSON list, JSON lines, or text with one prompt a line.

What a file is follows from its content; a suffix .json, .jsonl or .ndjson in any spelling only says that it must be
JSON. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ascend_kit.files import FileError, require_regular, strict_json
from ascend_kit.params.values import shown

FIELDS = ("prompt", "text", "content", "messages")
ROLES = ("system", "user", "assistant", "tool")  # a template leaves out or mislabels messages of any other
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx")
MAX_CHARACTERS = 1 << 24  # of one prompt: sixteen for each of the most tokens that an engine takes
# What changes the meaning of a conversation and has no place in a prompt here.
UNREAD = ("system", "system_prompt", "tools", "functions", "tool_calls", "function_call", "images", "audio", "videos")
EXPECTED = (
    "expected a JSON list, JSON lines with one of the fields prompt, text, content or messages, or text with one "
    "prompt a line"
)


class PromptsError(FileError):
    """A prompt file cannot be used; the text names the file, the line and what is expected."""


class Prompt(str):
    """One prompt. A conversation reads as its transcript and has its `messages`; they are None otherwise."""

    messages: list[dict[str, str]] | None = None

    @classmethod
    def of_messages(cls, messages: list[dict[str, str]]) -> Prompt:
        """The prompt of a conversation of {"role", "content"} messages."""
        prompt = cls("\n".join(f"{message['role']}: {message['content']}" for message in messages))
        prompt.messages = messages
        return prompt


def read_prompts(path: str | Path, parameter: str = "prompts_file") -> list[Prompt]:
    """Every prompt of a file in its order. PromptsError names `parameter`, the file and the line of a fault."""
    return [_prompt(entry, where) for where, entry in read_entries(path, parameter)]


def read_entries(path: str | Path, parameter: str) -> list[tuple[str, Any]]:
    """(where it stands, entry) of every text or JSON value of a file, whatever is in them; PromptsError as above."""
    path = Path(path).expanduser()
    where = f"{parameter} {path}"
    if path.suffix.lower() in TABLES:
        raise PromptsError(f"{where} is a table by its name; {EXPECTED}")
    try:
        require_regular(path)
        text = path.read_bytes().decode("utf-8-sig").lstrip("\ufeff")
    except OSError as error:
        raise PromptsError(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PromptsError(
            f"{where} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}"
        ) from None
    except ValueError as error:
        raise PromptsError(f"{parameter} {str(path)!r} is no path: {error}") from None
    if "\0" in text:
        raise PromptsError(f"{where} is no text: a NUL stands at character {text.index(chr(0))} (UTF-16?)")
    # str.splitlines would also split at U+2028, U+0085 and form feeds, which are part of a prompt.
    split = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    lines = [(f"line {number}", line) for number, line in enumerate(split, 1) if line and not line.isspace()]
    if not lines:
        raise PromptsError(f"{where} holds no prompt; {EXPECTED}")
    entries = _json_entries(text, lines, where, is_json=path.suffix.lower() in JSON_SUFFIXES)
    return [(f"{where}, {place}", entry) for place, entry in entries]


def _json_entries(text: str, lines: list[tuple[str, str]], where: str, *, is_json: bool) -> list[tuple[str, Any]]:
    """(place, entry) of every prompt: the items of a JSON list, the values of JSON lines, else the lines themselves."""
    # Nobody's first prompt is a bracket alone: JSON over several lines, whatever the file is called.
    is_json = is_json or lines[0][1].strip() in ("{", "[", "[{")
    whole = _loads(text)
    if isinstance(whole, list):
        if not whole:
            raise PromptsError(f"{where} holds an empty JSON list")
        return [(f"entry {number}", entry) for number, entry in enumerate(whole, 1)]
    if isinstance(whole, dict) and len(lines) > 1:
        raise PromptsError(f"{where} holds one JSON object with the fields {sorted(whole)}; {EXPECTED}")
    values = [(place, line, _loads(line)) for place, line in lines]
    objects = [place for place, _, value in values if isinstance(value, dict)]
    if not is_json and not objects:
        return [(place, line) for place, line in lines]
    broken = next(((place, line, value) for place, line, value in values if isinstance(value, ValueError)), None)
    if broken is not None:
        place, line, fault = broken
        why = "not JSON" if is_json else f"not JSON, but {objects[0]} is: text and JSON lines do not mix"
        raise PromptsError(f"{where}, {place}: {why} ({fault}): {shown(line)}")
    return [(place, value) for place, _, value in values]


def _loads(text: str) -> Any:
    """The JSON value of a text, or the ValueError that says why it is none."""
    try:
        return strict_json(text)
    except ValueError as error:
        return error


def _prompt(entry: Any, where: str) -> Prompt:
    value = entry
    if isinstance(entry, dict):
        if "role" in entry:
            raise PromptsError(f"{where}: a message by itself; a conversation is a list of messages under `messages`")
        _refuse_unread(entry, where)
        filled = [name for name in FIELDS if entry.get(name)]
        if len(filled) > 1:
            raise PromptsError(f"{where}: has {' and '.join(filled)}; which one is the prompt? Leave only that")
        value = entry[filled[0]] if filled else None
    if isinstance(value, str) and value.strip():
        if len(value) > MAX_CHARACTERS:
            raise PromptsError(f"{where}: a prompt of {len(value)} characters; {MAX_CHARACTERS} are allowed")
        return Prompt(value)
    if isinstance(value, list) and value and isinstance(value[0], dict) and isinstance(entry, dict):
        for number, item in enumerate(value, 1):
            text = item.get("content") if isinstance(item, dict) and item.get("role") in ROLES else None
            if not isinstance(text, str):
                raise PromptsError(
                    f"{where}, message {number}: expected a content, a text, and a role, one of {', '.join(ROLES)}; "
                    f"found {shown(item)}"
                )
            _refuse_unread(item, f"{where}, message {number}")
        return Prompt.of_messages([{"role": item["role"], "content": item["content"]} for item in value])
    found = f"an object with the fields {sorted(entry)}" if isinstance(entry, dict) else shown(entry)
    raise PromptsError(
        f"{where}: expected a text, or an object with one of the fields {', '.join(FIELDS)} (a text, or a list of "
        f'{{"role", "content"}}), found {found}'
    )


def _refuse_unread(entry: dict[str, Any], where: str) -> None:
    named = [name for name in UNREAD if entry.get(name)]
    if named:
        raise PromptsError(f"{where}: {', '.join(named)} cannot be handed on to the model; leave them out")
