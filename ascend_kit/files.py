"""Files written whole or not at all, strict JSON, and the folder for what is made once per machine."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 2**30
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # surrogates that stand alone: no file can hold them as they are
Progress = Callable[[int, int], None]  # done, total
Table = Any  # a pandas.DataFrame: pandas' own annotations make every selected column a Series, a frame or unknown


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` with `data` in one step: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private, but reports are to be shared
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: numpy scalars and paths as plain values, NaN and infinity as null, half characters escaped."""
    text = json.dumps(_clean(value), ensure_ascii=False, indent=indent, allow_nan=False)
    return HALF_CHARACTER.sub(lambda found: f"\\u{ord(found[0]):04x}", text)  # they are inside strings


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """What is made once per machine: the argument, else $ASCEND_KIT_CACHE, else `ascend-kit` in the user's cache."""
    chosen = cache_dir or os.environ.get("ASCEND_KIT_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "ascend-kit"


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "size", None) == 1:
        return _clean(item())
    tolist = getattr(value, "tolist", None)
    return _clean(tolist()) if callable(tolist) else str(value)
