"""What a result belongs to: a record of named parts, and a table of which parts must agree for which use.

A number is shown, reused or compared only together with the identity of what produced it. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ascend_kit.files import hash_value, plain_json

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
        return plain_json({key: value for key, value in vars(self).items() if value not in (None, ())})

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Identity:
        """The identity that `to_row` wrote; parts of a later version are left out."""
        declared = row.get("declared")
        parts = {key: row[key] for key in PARTS if key in row}
        return cls(**parts, declared=tuple(declared) if isinstance(declared, (list, tuple)) else ())


def _differences(name: str, ours: Any, theirs: Any) -> list[str]:
    ours, theirs = plain_json(ours), plain_json(theirs)
    if ours == theirs:
        return []
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = dict.fromkeys([*ours, *theirs])
        return [text for key in keys for text in _differences(f"{name}.{key}", ours.get(key), theirs.get(key))]
    return [f"{name}: {_short(ours)} -> {_short(theirs)}"]


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 32 else repr(value)
