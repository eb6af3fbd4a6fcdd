"""Files written whole or not at all, strict JSON, the folder for what is made once per machine, and content hashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import xxhash
from pydantic import ValidationError

GIB = 2**30
MAX_ERROR_CHARACTERS = 2000
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # surrogates that stand alone: no file can hold them as they are
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
Progress = Callable[[int, int], None]  # done, total
CAUSES = {  # where the system's own words leave open what to do
    errno.ENOSPC: "no space is left on the device; free some and go on with --resume",
    errno.EDQUOT: "the quota is used up; free some space and go on with --resume",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EEXIST: "a file stands where a folder is needed",
}
Table = Any  # a pandas.DataFrame: pandas' own annotations make every selected column a Series, a frame or unknown


class FileError(ValueError):
    """What is wrong with a file, in one line of bounded length, whatever of the file it quotes."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def one_line(value: object) -> str:
    """A text that any terminal and file takes, without its middle where it is long."""
    if isinstance(value, ValidationError):
        found = value.errors(include_url=False, include_input=False)
        value = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in found[:3])
    words = " ".join(str(value).encode("utf-8", "backslashreplace").decode().split())
    half = MAX_ERROR_CHARACTERS // 2
    return words if len(words) <= 2 * half else f"{words[:half]} ... {words[-half:]}"


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
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise named(error, path) from None
        raise


def append_lines(path: Path, data: bytes) -> None:
    """Add whole lines to a file and push them to the disk; without space for all of them it stays as it was."""
    with open(path, "ab+", buffering=0) as file:
        size = file.tell()
        if size:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                data = b"\n" + data  # a killed writer left half a line; keep it apart from this one
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) or 0 :]
            os.fsync(file.fileno())
        except OSError as error:
            os.truncate(path, size)
            raise named(error, path) from None


def named(error: OSError, path: Path) -> OSError:
    """The same error with the file it is about, which the system does not tell of a write."""
    return type(error)(error.errno, error.strerror, str(path))


def os_error_text(error: OSError) -> str:
    """One line: which path, and why."""
    cause = CAUSES.get(error.errno or 0) or error.strerror or str(error)
    return f"{error.filename}: {cause}" if error.filename else cause


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: numpy scalars and paths as plain values, NaN and infinity as null, half characters written out.

    Half an emoji is read back as the six signs of its escape: pandas refuses a table that holds it as it is.
    """
    text = json.dumps(_clean(value), ensure_ascii=False, indent=indent, allow_nan=False)
    return HALF_CHARACTER.sub(lambda found: f"\\\\u{ord(found[0]):04x}", text)  # they are inside strings


def strict_json(text: str) -> Any:
    """The value of a JSON text; ValueError also for a field that stands twice and for nesting without end."""
    try:
        return json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, why: str = "", error: type[FileError] = FileError) -> dict[str, Any]:
    """A JSON object from a file; `error` naming the file, and `why` it is needed where it is missing."""
    if not path.is_file():
        raise error(f"{path} is missing: {why}")
    try:
        require_regular(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as fault:
        raise error(f"{path} is not valid JSON: {getattr(fault, 'strerror', fault)}") from None
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a field stands twice among {[key for key, _ in pairs]}")
    return found


def require_regular(path: Path) -> None:
    """OSError unless `path` is a file with an end and its own content.

    Reading a pipe or a device may never return; git without its LFS extension leaves a note in the place of a file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        kind = "a folder" if path.is_dir() else "a pipe or a device, not a file"
        raise OSError(errno.EINVAL, f"it is {kind}", str(path))
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise OSError(errno.EINVAL, "it is a Git LFS pointer, the file itself was not downloaded", str(path))


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
    tolist = getattr(value, "tolist", None)  # of arrays, and of numpy's scalars
    return _clean(tolist()) if callable(tolist) else str(value)


def plain_json(value: Any) -> Any:
    """What is read back of a value that is written as JSON."""
    return json.loads(to_json(value))


# --- content hashes ---------------------------------------------------------------------------------------------------
# XXH3-128, remembered by stat in the user's cache, because a model folder may be read-only.


def hash_value(value: Any) -> str:
    """XXH3-128 of a value's JSON with sorted keys, 32 hexadecimal digits."""
    text = json.dumps(plain_json(value), sort_keys=True, ensure_ascii=False)
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
    state = _state(path)
    value = hash_file(path)
    if _state(path) == state:  # a file that changed while it was read is not remembered
        remember_hash(path, value)
    return value


def known_hash(path: str | Path) -> str | None:
    """The remembered content hash of an unchanged file, without reading it; None when it is not known."""
    try:
        entry = json.loads(_entry(path).read_text(encoding="utf-8"))
        return entry["hash"] if entry["stat"] == _state(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember_hash(path: str | Path, value: str) -> None:
    """Remember a content hash that was computed while the file was read anyway. A cache that cannot be written is
    no fault: the file is read again next time."""
    try:
        write_atomic(_entry(path), to_json({"path": str(Path(path).absolute()), "stat": _state(path), "hash": value}))
    except OSError:
        return


def hash_files(paths: Iterable[str | Path], root: str | Path) -> str:
    """One hash over the contents and the names, relative to `root`, of several files; their order is irrelevant."""
    named = sorted((os.path.relpath(path, root), file_hash(path)) for path in paths)
    return hash_value(named)


def _state(path: str | Path) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _entry(path: str | Path) -> Path:
    name = xxhash.xxh3_128_hexdigest(os.path.abspath(path).encode("utf-8", "surrogateescape"))
    return cache_root() / "hashes" / name[:2] / f"{name}.json"
