"""Regular expressions that a checkpoint's files bring along: foreign, so they may be wrong or never end."""

from __future__ import annotations

from pathlib import Path

import regex

from ascend_kit.checkpoint.tensor_file import CheckpointError

LIMIT_S = 0.2  # a name has some fifty characters: what takes longer tries the same thing again and again


def pattern_fits(where: Path | str, pattern: str, name: str) -> bool:
    """Whether `name` begins with what `pattern` describes. CheckpointError naming `where` if it is none or hangs."""
    try:
        return regex.match(pattern, name, timeout=LIMIT_S) is not None
    except regex.error as error:
        raise CheckpointError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    except TimeoutError:
        raise CheckpointError(f"{where}: {pattern!r} did not end within {LIMIT_S} s on {name!r}") from None
