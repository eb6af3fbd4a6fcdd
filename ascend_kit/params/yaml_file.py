"""Parameter files: YAML read strictly, in bounded time and memory, every fault with its file and line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ascend_kit.files import require_regular
from ascend_kit.messages import did_you_mean
from ascend_kit.params.experiment import Experiment, build_experiment, expand_aliases
from ascend_kit.params.sweep import layered
from ascend_kit.params.values import ParameterError, shown

MAX_FILE_BYTES, MAX_NODES, MAX_DEPTH = 1 << 18, 5_000, 20
# YAML 1.1 reads 010 as eight and 1:30 as ninety.
OCTAL = re.compile(r"[-+]?0[0-7_]+")
SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


class YamlFault(yaml.MarkedYAMLError):
    """Something that YAML allows and a parameter file does not."""

    def __init__(self, problem: str, node: yaml.Node | yaml.Event):
        super().__init__(problem=problem, problem_mark=node.start_mark)


def read_with_places(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a YAML file, and `file, line N` of each of its keys."""
    path = Path(path).expanduser()
    text = _text(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = _value(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ParameterError(f"{path}{where}: not valid YAML for parameters: {_problem(error)}") from None
    if value is None:
        return {}, {}
    if not isinstance(value, dict) or not isinstance(node, yaml.MappingNode):
        raise ParameterError(f"{path} must hold `name: value` lines, found a {type(value).__name__}")
    return value, {key.value: f"{path}, line {key.start_mark.line + 1}" for key, _ in node.value}


def load_experiment(path: str | Path, overrides: dict[str, Any] | None = None) -> Experiment:
    """Read one parameter file, apply overrides, check everything; no file or device is touched beyond that."""
    # Overrides come last and in the flat spelling, so the article's nested block must not outlive one of them.
    values, places = read_with_places(path)
    try:
        changes = expand_aliases(overrides or {})
        flat = expand_aliases(values)
        merged = layered(flat, changes)
    except ParameterError as error:
        raise ParameterError(f"{path}: {error}") from None
    twice = next((key for key in flat if flat[key] != values.get(key, flat[key])), None)
    if twice is not None:
        raise ParameterError(
            f"{places[twice]}: {twice}={shown(values[twice])} stands beside {twice}={shown(flat[twice])} under another "
            "name (tensorrt, or the block optimization); keep one"
        )
    merged.setdefault("experiment", Path(path).stem)
    places = {key: place for key, place in places.items() if key not in changes}
    return build_over_params_file(merged, source=str(path), places=places)


def build_over_params_file(
    values: Mapping[str, Any], *, source: str, places: Mapping[str, str] | None = None, default_file: str | None = None
) -> Experiment:
    """A checked Experiment from values; their `params_file`, or else `default_file`, fills in what they leave out."""
    name = values.get("params_file") or default_file
    if name is None:
        return build_experiment(values, source=source, places=places)
    below, places_below = read_with_places(str(name))
    if "params_file" in below:
        raise ParameterError(f"{places_below['params_file']}: params_file may not name a file that names another one")
    merged = {"experiment": Path(str(name)).stem, **layered(expand_aliases(below), values)}
    places_below = {key: place for key, place in places_below.items() if key not in values}
    return build_experiment(merged, source=source, places={**places_below, **(places or {})})


@contextlib.contextmanager
def naming_lines(path: str | Path, overrides: Collection[str]) -> Iterator[None]:
    """Faults that show only when files are looked at say in which line of `path` their parameter stands."""
    try:
        yield
    except ValueError as error:
        places = read_with_places(path)[1]
        named = re.findall(r"\w+_\w+|\w+(?=[:=])", str(error))
        place = next((places[key] for key in named if key in places and key not in overrides), str(path))
        error.args = (f"{place}: {error}",)
        raise


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """`key=value` strings of the command line, each value read as YAML."""
    result: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ParameterError(f"--set takes key=value, got {shown(text)}")
        try:
            result[key.strip()] = _value(yaml.compose(value, Loader=yaml.SafeLoader))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ParameterError(f"--set {key}: {_problem(error)}") from None
    return result


def _text(path: Path) -> str:
    try:
        require_regular(path)
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        beside = [found.name for found in path.parent.glob("*.y*ml")]
        meant = did_you_mean(path.name, beside, shown=lambda name: str(path.parent / name))
        raise ParameterError(f"no parameter file at {path}{meant}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ParameterError(f"parameter file {shown(str(path))} cannot be read: {reason}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ParameterError(f"{path} is longer than {MAX_FILE_BYTES} bytes: no parameter file")
    try:
        # Text copied from a web page indents with no-break spaces, which YAML takes for part of a name.
        return data.decode("utf-8-sig").replace("\u00a0", " ")
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path} is not valid YAML: no UTF-8 text at byte {error.start}") from None


def _value(node: yaml.Node | None) -> Any:
    """The plain value of a composed document, after everything in it was found harmless."""
    if node is None:
        return None
    _check(node, 0, [0])
    return yaml.constructor.SafeConstructor().construct_document(node)


def _check(node: yaml.Node, depth: int, count: list[int]) -> None:
    """Refuse what is too deep or too much (aliases counted each time they stand), and what YAML reads in surprise."""
    count[0] += 1
    if depth > MAX_DEPTH or count[0] > MAX_NODES:
        raise YamlFault("nested too deeply, or an alias that refers to itself or to too much", node)
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check(item, depth + 1, count)
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, item in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                written = shown(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a block"
                what = "a merge key `<<`" if key.tag.endswith(":merge") else f"{written} as a name"
                raise YamlFault(f"{what} is not allowed: names are plain words, each with its value", key)
            if key.value in keys:
                raise YamlFault(f"key {key.value!r} stands twice", key)
            keys.add(key.value)
            _check(item, depth + 1, count)


def _check_scalar(node: yaml.ScalarNode) -> None:
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "int" and OCTAL.fullmatch(text) and text.strip("+-0_"):
        raise YamlFault(f"{text} is an octal number in YAML; write it without the leading 0", node)
    if kind in ("int", "float") and SEXAGESIMAL.fullmatch(text):
        raise YamlFault(
            f"{text} is a number to the base of 60 in YAML; write the number itself, or quote the text", node
        )
    try:
        yaml.constructor.SafeConstructor().construct_object(node)
    except yaml.MarkedYAMLError:
        raise YamlFault(f"a value of the kind {node.tag} is not allowed", node) from None
    except (ValueError, OverflowError, AttributeError, KeyError):  # the last two of `!!timestamp` and `!!bool`
        raise YamlFault(f"{shown(text)} cannot be read as {kind}", node) from None


def _problem(error: Exception) -> str:
    """What is wrong, in one line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    found = getattr(error, "problem", None) or error
    return " ".join(str(found).split())[:300] or type(error).__name__
