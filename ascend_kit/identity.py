"""What a result belongs to: a record of named parts, and a table of which parts must agree for which use.

A number is shown, reused or compared only together with the identity of what produced it. Files are identified by
their content (XXH3-128), remembered by stat in the user's cache, because a model folder may be read-only.
Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import xxhash

from ascend_kit.files import cache_root, to_json, write_atomic

Use = Literal["resume", "pair", "line", "history"]
PARTS = ("weights", "tokenizer", "chat_template", "data", "prompts", "task", "engine", "versions", "device")
# Which parts must agree
MUST_AGREE: dict[Use, tuple[str, ...]] = {
    # for a row to count as done when the same thing is asked for again
    "resume": PARTS,
    # for two answers to one document to be compared
    "pair": ("data", "prompts", "task"),
    # for two points to lie on one line of a figure
    "line": ("weights", "tokenizer", "engine", "versions", "device"),
    # for two runs to be one experiment under different versions
    "history": ("weights", "tokenizer", "chat_template", "data", "prompts", "task", "engine"),
}


@dataclass(frozen=True)
class Identity:
    """The named parts that a row depends on; a part that does not apply is None.

    `weights`, `tokenizer`, `chat_template`, `data` and `prompts` are content hashes. `task` holds version, shots,
    whether a template is applied and the metric; `engine` the kind of engine and its configuration; `versions` the
    packages; `device` its name, driver and CANN. `declared` names the parts that could not be hashed, for instance
    the weights behind an endpoint: they hold what the server said of itself.
    """

    weights: Any = None
    tokenizer: Any = None
    chat_template: Any = None
    data: Any = None
    prompts: Any = None
    task: Any = None
    engine: Any = None
    versions: Any = None
    device: Any = None
    declared: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits that stand for all parts together."""
        return hash_value(self.to_row())[:16]

    def with_parts(self, **parts: Any) -> Identity:
        """The same identity with some parts set."""
        return replace(self, **parts)

    def differences(self, other: Identity, use: Use) -> list[str]:
        """What stands between the two for this use, as `part: ours -> theirs`; empty when they agree."""
        pairs = ((part, getattr(self, part), getattr(other, part)) for part in MUST_AGREE[use])
        return [text for pair in pairs for text in _differences(*pair)]

    def agrees(self, other: Identity, use: Use) -> bool:
        """Whether every part that `use` needs is equal."""
        return not self.differences(other, use)

    def to_row(self) -> dict[str, Any]:
        """The parts that are set, as plain JSON values."""
        return _plain({key: value for key, value in vars(self).items() if value not in (None, ())})

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Identity:
        """The identity that `to_row` wrote; parts of a later version are left out."""
        declared = row.get("declared")
        parts = {key: row[key] for key in PARTS if key in row}
        return cls(**parts, declared=tuple(declared) if isinstance(declared, (list, tuple)) else ())


def _differences(name: str, ours: Any, theirs: Any) -> list[str]:
    ours, theirs = _plain(ours), _plain(theirs)
    if ours == theirs:
        return []
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = dict.fromkeys([*ours, *theirs])
        return [text for key in keys for text in _differences(f"{name}.{key}", ours.get(key), theirs.get(key))]
    return [f"{name}: {_short(ours)} -> {_short(theirs)}"]


def _plain(value: Any) -> Any:
    return json.loads(to_json(value))


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 32 else repr(value)


# --- content hashes ---------------------------------------------------------------------------------------------------


def hash_value(value: Any) -> str:
    """XXH3-128 of a value's JSON with sorted keys, 32 hexadecimal digits."""
    text = json.dumps(_plain(value), sort_keys=True, ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def hash_file(path: str | Path) -> str:
    """XXH3-128 of a file's bytes, read in full."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def file_hash(path: str | Path) -> str:
    """The content hash of a file: remembered where size, times and inode are as they were, else read."""
    before = known_hash(path)
    if before is not None:
        return before
    stat = _stat(path)
    value = hash_file(path)
    if _stat(path) == stat:  # a file that changed while it was read is not remembered
        remember_hash(path, value)
    return value


def known_hash(path: str | Path) -> str | None:
    """The remembered content hash of an unchanged file, without reading it; None when it is not known."""
    try:
        entry = json.loads(_entry(path).read_text(encoding="utf-8"))
        return entry["hash"] if entry["stat"] == _stat(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember_hash(path: str | Path, value: str) -> None:
    """Remember a content hash that was computed while the file was read anyway. A cache that cannot be written is
    no fault: the file is read again next time."""
    try:
        write_atomic(_entry(path), to_json({"path": str(Path(path).absolute()), "stat": _stat(path), "hash": value}))
    except OSError:
        return


def hash_files(paths: Iterable[str | Path], root: str | Path) -> str:
    """One hash over the contents and the names, relative to `root`, of several files; their order is irrelevant."""
    named = sorted((os.path.relpath(path, root), file_hash(path)) for path in paths)
    return hash_value(named)


def _stat(path: str | Path) -> list[int]:
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _entry(path: str | Path) -> Path:
    name = xxhash.xxh3_128_hexdigest(os.path.abspath(path).encode("utf-8", "surrogateescape"))
    return cache_root() / "hashes" / name[:2] / f"{name}.json"
