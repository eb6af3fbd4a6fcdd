"""Seeded damage to files: values of wrong kinds inside JSON, YAML and pickles, and broken bytes."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[random.Random, Path], None]

DEEP: Any = []
for _ in range(60):
    DEEP = [DEEP]
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2.5, 10**9, 2**31, 2**63, -(2**63), 10**40, 1e308, float("nan"), float("inf"),
    "", "x", "1", "\ud800", "a\0b", "../../etc/passwd", "/", "é" * 300, "x" * 70_000, [], {}, [[]], {"": None},
    [None], ["x", 1], {"a": {"b": []}}, DEEP, [10**9] * 4, list(range(5000)),
]  # fmt: skip


def odd_value(rng: random.Random) -> Any:
    """A value that hardly any field expects."""
    return rng.choice(ODD_VALUES)


def change_value(rng: random.Random, value: Any) -> Any:
    """The same JSON value with one place in it changed: replaced, left out, renamed, moved or added to."""
    places = list(_places(value, ()))
    if not places or rng.random() < 0.03:
        return odd_value(rng)
    path = rng.choice(places)
    target = value
    for key in path[:-1]:
        target = target[key]
    kind, key = rng.randrange(6), path[-1]
    if kind <= 2:
        target[key] = odd_value(rng)
    elif kind == 3:
        del target[key]
    elif kind == 4 and isinstance(target, dict):
        target[rng.choice(["", "x", str(key) + " ", str(key).upper(), "\ud800"])] = target.pop(key)
    else:
        other = rng.choice(places)
        source = value
        for step in other:
            source = source[step] if _has(source, step) else source
        target[key] = json.loads(json.dumps(source))
    return value


def _places(value: Any, path: tuple, limit: int = 400) -> Any:
    if len(path) > 100:  # no deeper than the mutations themselves are read
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:limit]:
        yield (*path, key)
        yield from _places(item, (*path, key), 20)


def _has(value: Any, step: Any) -> bool:
    return step in value if isinstance(value, dict) else isinstance(value, list) and step < len(value)


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """The same bytes cut, flipped, overwritten, doubled, or replaced by something that is no such file."""
    kind = rng.randrange(9)
    at = rng.randrange(len(data) + 1)
    if kind == 0:
        return data[:at]
    if kind == 1 and data:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 3, 20))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 2:
        return data[:at] + rng.randbytes(rng.choice((1, 4, 40))) + data[at:]
    if kind == 3:
        number = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
        return data[:at] + struct.pack("<Q", number) + data[at + 8 :]
    if kind == 4:
        end = min(len(data), at + rng.randrange(1, 200))
        return data[:end] + data[at:end] * rng.choice((1, 2, 50)) + data[end:]
    if kind == 5:
        return (
            data[:at]
            + rng.choice((b"\0", b"\xff", b"\xef\xbb\xbf", b'"', b"{", b"]", b"\n", b"\r", b"NaN"))
            + data[at:]
        )
    if kind == 6:
        end = min(len(data), at + rng.randrange(1, 200))
        return data[:at] + data[end:]
    if kind == 7:
        return rng.choice(
            (b"", b"null", b"[]", b"0", b'"x"', b"{}", b"\0" * 64, data.decode("latin-1").encode("utf-16"))
        )
    return rng.choice((b"[", b'{"a":', b"{", b"- ")) * rng.choice((100, 20_000)) + data


# --- whole files ------------------------------------------------------------------------------------------------------


def bytes_of_file(rng: random.Random, path: Path) -> None:
    path.write_bytes(change_bytes(rng, path.read_bytes()))


def json_of_file(rng: random.Random, path: Path) -> None:
    """One value of a JSON file, now and then several or its bytes."""
    if rng.random() < 0.25:
        return bytes_of_file(rng, path)
    value = json.loads(path.read_text())
    for _ in range(rng.choice((1, 1, 1, 3))):
        value = change_value(rng, value)
    path.write_text(json.dumps(value), encoding="utf-8")


def jsonl_of_file(rng: random.Random, path: Path) -> None:
    """One line of a JSON lines file."""
    if rng.random() < 0.25:
        return bytes_of_file(rng, path)
    lines = path.read_text().splitlines()
    number = rng.randrange(len(lines))
    lines[number] = json.dumps(change_value(rng, json.loads(lines[number])))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def yaml_of_file(rng: random.Random, path: Path) -> None:
    """One value of a YAML file; anchors, tags and merges where bytes are changed."""
    import yaml

    if rng.random() < 0.5:
        value = change_value(rng, yaml.safe_load(path.read_text()))
        text = yaml.safe_dump(json.loads(json.dumps(value)), allow_unicode=True)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return
    data = path.read_bytes()
    at = rng.choice([i for i, byte in enumerate(data) if byte in b" \n"])
    words = (b"&a ", b"*a ", b"!!python/object:os.system ", b"!!binary ", b"<<: ", b"? ", b"- ", b"| ", b"%TAG ", b"\t",
             b"...\n", b"---\n", b"!!set ", b"!!timestamp ", b"0o777 ", b"1_000 ", b".inf ", b"~ ", b"2026-13-45 ",
             )  # fmt: skip
    path.write_bytes(data[: at + 1] + rng.choice(words) + data[at + 1 :])
    if rng.random() < 0.3:
        bytes_of_file(rng, path)


def safetensors_of_file(rng: random.Random, path: Path) -> None:
    """The header of a safetensors file, with the right length before it; now and then its bytes."""
    if rng.random() < 0.3:
        return bytes_of_file(rng, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text, body = data[8 : 8 + length], data[8 + length :]
    is_value = rng.random() < 0.6
    text = json.dumps(change_value(rng, json.loads(text))).encode() if is_value else change_bytes(rng, text)
    text += b" " * rng.choice((0, 0, -len(text) % 8))
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def pickle_of_file(rng: random.Random, path: Path) -> None:
    """The pickle inside a file of torch.save, its zip directory right again; now and then bytes of the whole file."""
    kind = rng.random()
    if kind < 0.25 or not zipfile.is_zipfile(path):
        return bytes_of_file(rng, path)
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", rng.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, data in members:
            if name.endswith("data.pkl"):
                data = change_bytes(rng, data) if kind < 0.6 else _change_opcodes(rng, data)
            elif rng.random() < 0.02:
                continue
            archive.writestr(name, data)
    path.write_bytes(result.getvalue())


def _change_opcodes(rng: random.Random, data: bytes) -> bytes:
    """Numbers, names and operations of a pickle replaced by others, where they stand."""
    import pickletools

    operations = [(position, code) for code, _, position in pickletools.genops(data)]
    starts = [position for position, _ in operations] + [len(data)]
    number = rng.randrange(len(operations) - 1)
    here, after = starts[number], starts[number + 1]
    names = ("builtins bytearray", "collections Counter", "torch._utils _rebuild_tensor_v2", "torch Size",
             "torch._utils _rebuild_parameter", "_codecs encode", "torch FloatStorage", "os system")  # fmt: skip
    calls = [pickle.GLOBAL + b"%s\n%s\n" % tuple(name.encode().split()) for name in names]
    pieces = [
        pickle.BININT + struct.pack("<i", rng.choice((0, -1, 2**31 - 1, 7))),
        pickle.LONG1 + b"\x08" + rng.randbytes(8),
        pickle.LONG4 + struct.pack("<i", 2**31 - 1),
        pickle.BINUNICODE + struct.pack("<I", rng.choice((0, 1, 2**32 - 1))) + b"x",
        pickle.NONE, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.REDUCE,
        pickle.BUILD, pickle.MARK, pickle.BINPERSID, pickle.SETITEMS, pickle.STOP, rng.choice(calls),
        rng.choice(calls) + pickle.BININT + struct.pack("<i", 2**31 - 1) + pickle.TUPLE1 + pickle.REDUCE,
        data[here:after] * rng.choice((0, 2, 300)),
    ]  # fmt: skip
    return data[:here] + rng.choice(pieces) + data[after if rng.random() < 0.7 else here :]
