"""The parameters `sweep` and `slo`: what may be varied, what a limit is called, and their old names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ascend_kit.params import engines
from ascend_kit.params import values as rules
from ascend_kit.params.engines import OWN_SETTINGS
from ascend_kit.params.values import ParameterError

if TYPE_CHECKING:
    from ascend_kit.params.experiment import Experiment

DEFAULT: dict[str, list[Any]] = {"concurrency": [1, 4, 16], "prompt_len": [64], "output_len": [32]}
LENGTHS = tuple(DEFAULT)
LOAD_KEYS = (*LENGTHS, "load", "rate", "burstiness", "shared_prefix", "turns", "length_spread")
SWEEP_KEYS = (*LOAD_KEYS, *OWN_SETTINGS, "engine")
LIMIT = re.compile(r"(ttft|tpot|itl|e2e)(_(mean|p50|p90|p95|p99))?_ms")
# Old name -> the parameter and the key in it that took its place.
ALIASES = {
    "sweep_concurrency": ("sweep", "concurrency"),
    "sweep_prompt_len": ("sweep", "prompt_len"),
    "sweep_output_len": ("sweep", "output_len"),
    "sweep_cards": ("sweep", "cards"),
    "sweep_tensor_parallel": ("sweep", "tensor_parallel"),
    "ttft_limit_ms": ("slo", "ttft_ms"),
    "tpot_limit_ms": ("slo", "tpot_ms"),
    "sweep_baseline": ("engines", "transformers"),
}


def old_value(experiment: Experiment, name: str) -> Any:
    """What a parameter of an old name reads: the value that took its place, None where there is none."""
    parameter, key = ALIASES[name]
    value = getattr(experiment, parameter)
    return any(entry.get("kind") == key for entry in value) if parameter == "engines" else value.get(key)


def layered(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` wins over `below`, also where one of them uses an old name."""
    kept = {key: value for key, value in below.items() if ALIASES.get(key, ("",))[0] not in above}
    return {**kept, **above}


def resolve(data: dict[str, Any]) -> dict[str, Any]:
    """Old names moved to where they belong, and the keys of `sweep` that always have values filled in."""
    data, old = dict(data), {key: data[key] for key in ALIASES if key in data}
    for key in old:
        del data[key]
    if old.pop("sweep_baseline", True) is False:
        kept = data.get("engines", [{"kind": "ascend_kit"}])
        data["engines"] = [entry for entry in kept if entry != {"kind": "transformers"}]
    for name, value in old.items():
        parameter, key = ALIASES[name]
        rest = {item: kept for item, kept in (data.get(parameter) or {}).items() if item != key}
        data[parameter] = rest if value is None else {**rest, key: value}
    if isinstance(data.get("sweep"), dict):
        data["sweep"] = _with_lengths({key: _plain(value) for key, value in data["sweep"].items()}, data)
    elif data.get("load", "closed") != "closed" and "sweep" not in data:
        data["sweep"] = _with_lengths({}, data)
    return data


def _with_lengths(sweep: dict[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    defaults = dict(DEFAULT)
    is_timed = data.get("load", "closed") != "closed" or "load" in sweep or "rate" in sweep
    if is_timed:  # arrivals come by the clock: a bound would be another load
        defaults["concurrency"] = [4096]
    return {**defaults, **sweep}


def _plain(value: Any) -> Any:
    value = rules.plain(value, "list[int | float]")
    return value if isinstance(value, list) or value is None else [value]


def check_shape(sweep: Mapping[str, Any]) -> None:
    """ParameterError for a key that nothing is called, no values, one that stands twice, or a length out of bounds."""
    for key, values in sweep.items():
        if key not in SWEEP_KEYS:
            raise ParameterError(f"sweep: {rules.unknown_key(key, SWEEP_KEYS)}")
        name = told(key)
        if not values:
            raise ParameterError(f"{name}: at least one value is needed")
        try:
            rules.without_repetition(values)
        except ValueError as error:
            raise ParameterError(f"{name}: {error}, got {rules.shown(values)}") from None
        if key in (*LENGTHS, "cards", "tensor_parallel"):
            for value in values:
                if type(value) is not int or not 1 <= value <= 1 << 20:
                    raise ParameterError(
                        f"{name}: every entry must be a whole number, at least 1 and at most 1048576, "
                        f"got {rules.shown(value)}"
                    )


def check_limits(slo: Mapping[str, float]) -> None:
    """ParameterError for a limit that is no metric's or not above zero."""
    for key, value in slo.items():
        if not LIMIT.fullmatch(key):
            raise ParameterError(
                f"slo: {rules.shown(key)}: allowed ttft, tpot, itl or e2e, then _mean, _p50, _p90, _p95, _p99 or "
                "nothing (every request), then _ms"
            )
        if value <= 0:
            raise ParameterError(f"slo: {key}: must be above 0, got {value:g}")


def told(key: str) -> str:
    """A key of `sweep` with its old name, as errors name it."""
    old = next((name for name, (parameter, own) in ALIASES.items() if (parameter, own) == ("sweep", key)), None)
    return f"sweep: {key}" + (f" ({old})" if old else "")


def check(experiment: Experiment) -> None:
    """ParameterError unless every value of the sweep could be set alone, and is of use somewhere in it."""
    specs = engines.read_engines(engines.variant_entries(experiment.variants) or experiment.engines)
    names = [spec.name for spec in specs]
    for spec in specs:
        if spec.settings:
            _check_alone(experiment, f"engines: {spec.name}", spec.settings)
    check_shape(experiment.sweep)
    check_limits(experiment.slo)
    for key, values in experiment.sweep.items():
        for value in values:
            if key == "engine" and value not in names:
                raise ParameterError(f"sweep: engine: allowed {', '.join(names)}, got {rules.shown(value)}")
            if key not in (*LENGTHS, "engine", "cards", "tensor_parallel"):
                _check_alone(experiment, f"sweep: {key}", {key: value})
    for key, other in (("prompt_len", "output_len"), ("output_len", "prompt_len")):
        shortest = min(experiment.sweep[other])
        bad = [length for length in experiment.sweep[key] if length + shortest > experiment.max_seq_length]
        if bad:
            raise ParameterError(
                f"{told(key)}: {bad[0]} + {shortest} tokens are above max_seq_length={experiment.max_seq_length}"
            )
    if "trace" in (experiment.load, *experiment.sweep.get("load", [])) and experiment.trace_file is None:
        raise ParameterError("load: trace needs trace_file: Mooncake JSON lines, or Azure CSV")
    if experiment.search != "none" and not experiment.slo:
        raise ParameterError(f"search: {experiment.search} needs slo: the limits that are to be met")
    _check_layouts(experiment)


def _check_alone(experiment: Experiment, where: str, changes: dict[str, Any]) -> None:
    lengths = {key: experiment.sweep[key] for key in LENGTHS}
    try:
        experiment.with_changes(**{"sweep": lengths, "engines": engines.DEFAULT, "variants": [], **changes})
    except ParameterError as error:
        raise ParameterError(f"{where}: {str(error).removeprefix('parameters: ')}") from None


def _check_layouts(experiment: Experiment) -> None:
    """Every number of cards and of tensor parallel must be used, and no point may need more cards."""
    cards, sizes = experiment.swept("cards"), experiment.swept("tensor_parallel")
    above = [count for count in cards if count > experiment.cards]
    if above:
        raise ParameterError(f"sweep: cards {cards}: {above[0]} is above cards={experiment.cards}")
    alone = [count for count in cards if all(count % size for size in sizes)]
    if alone:
        raise ParameterError(f"sweep: cards: {alone[0]} cannot be divided by tensor parallel sizes {sizes}")
    unused = [size for size in sizes if all(count % size for count in cards)]
    if unused:
        raise ParameterError(f"sweep: tensor_parallel: {unused[0]} divides none of the card counts {cards}")
