"""The first screen of a report: a verdict in one sentence, what was run on what, four numbers, cautions and alarms."""

from __future__ import annotations

from typing import Any

from ascend_kit.measure.rows import asked_rows, load_of
from ascend_kit.measure.verdict import fastest, measured_points
from ascend_kit.messages import Finding, phrase, translate
from ascend_kit.params.engines import ENGINE_SWITCHES
from ascend_kit.results import RunFolder
from ascend_kit.show.tables import cell_text
from ascend_kit.stages import RunRecord

VERDICTS = (
    "compare.verdict",
    "compare.use",
    "compare.use_by_rate",
    "compare.use_baseline",
    "compare.use_baseline_by_rate",
)
NUMBERS = ("rate", "ttft", "tpot", "accuracy")
POINT = ("concurrency", "prompt_len", "output_len")
SERIOUS_FIRST = ("failed", "alarm", "caution")
LAST_SAYS_IT = "sweep.disturbed"  # 04 says it of its own points, 06 of all that it compares


def about(run: RunRecord, parameters: dict[str, Any]) -> dict[str, str]:
    """Model, precision, switches that are on, engine, device and CANN, as far as the run knows them."""
    device = device_facts(run)
    versions = device.get("versions") or {}
    cards = parameters.get("cards", 1)
    precision = [parameters.get("precision"), parameters.get("quantize")]
    switches = [name for name in ENGINE_SWITCHES if parameters.get(name) is True]
    values = {
        "model": parameters.get("model_name"),
        "precision": ", ".join(str(word) for word in precision if word and word != "none"),
        "switches": ", ".join(switches) or (translate("about.all_off") if parameters else ""),
        "engine": f"ascend_kit, torch {versions['torch']}" if versions.get("torch") else "",
        "device": device.get("name", "") and (f"{cards} x " if cards not in (1, None) else "") + str(device["name"]),
        "CANN": versions.get("cann") or versions.get("CANN"),
    }
    return {translate(f"about.{name}"): str(text) for name, text in values.items() if text}


def device_facts(run: RunRecord) -> dict[str, Any]:
    """What the stages said of their device, the last one's where they differ, as in a run that was moved."""
    told: dict[str, Any] = {}
    for stage in run.stages.values():
        told |= stage.facts.get("device") or {}
    return told


def serious(findings: list[Finding]) -> list[Finding]:
    """What stands on the first screen: cautions and worse, each said once."""
    told_again = [finding for finding in findings if finding.key == LAST_SAYS_IT][:-1]
    return [finding for finding in findings if finding.level != "note" and finding not in told_again]


def first_screen(folder: RunFolder, run: RunRecord, findings: list[Finding]) -> dict[str, Any]:
    """`verdict` and its `level`, `numbers` (key, name, text, note; `listed` in the index) and `warnings` (level, text),
    the serious ones first."""
    compared = next((finding for finding in findings if finding.key in VERDICTS), None)
    accuracy, note, percent = _accuracy(folder, compared, findings)
    numbers = [*_speed(folder, compared), (accuracy, note)]
    warnings = {str(finding): finding.level for finding in serious(findings)}
    warnings |= {phrase(alarm["text"]): "alarm" for stage in run.stages.values() for alarm in stage.alarms}
    warnings |= {f"{stage.name}: {stage.error}": "failed" for stage in run.stages.values() if stage.error}
    ordered = sorted(warnings.items(), key=lambda item: SERIOUS_FIRST.index(item[1]))
    level, verdict = _verdict(run, compared, numbers)
    told = [f"{stage.name}: {stage.error}" for stage in run.stages.values() if stage.state == "failed"][:1]
    shown = [{"level": kind, "text": text} for text, kind in ordered if text not in told and text not in verdict]
    named = [
        {"key": name, "name": translate(f"number.{name}"), "text": text, "note": note,
         "listed": percent if name == "accuracy" else text}
        for name, (text, note) in zip(NUMBERS, numbers, strict=True)
        if text
    ]  # fmt: skip
    return {"verdict": verdict, "level": level, "numbers": named, "warnings": shown}


def _verdict(run: RunRecord, compared: Finding | None, numbers: list[tuple[str, str]]) -> tuple[str, str]:
    """(level, sentence): what failed, else what is not to be trusted, else the comparison, else what was measured."""
    failed = [stage for stage in run.stages.values() if stage.state == "failed"]
    alarms = [phrase(alarm["text"]) for stage in run.stages.values() for alarm in stage.alarms]
    if failed:
        return "failed", translate("verdict.failed", stage=failed[0].name, error=failed[0].error or "")
    if alarms:
        return "alarm", translate("verdict.alarm", text=alarms[0])
    if compared is not None:
        return "caution" if compared.values["best"] == "none" else compared.level, str(compared)
    (rate, _), *_, (accuracy, _) = numbers
    key = "both" if rate and accuracy else "rate" if rate else "accuracy" if accuracy else "none"
    return "caution", translate(f"verdict.only_{key}", rate=rate, accuracy=accuracy)


def _speed(folder: RunFolder, compared: Finding | None) -> list[tuple[str, str]]:
    """(text, note) of output tokens/s, TTFT and TPOT, by the mean of the repeats: at the point that the verdict tells,
    else at the engine's best.
    """
    points = measured_points([row for row in asked_rows(folder) if row.get("backend") != "transformers"])
    own = [point for point in points if point.get("backend") == "ascend_kit"]  # another's only where ours has none
    told = compared.values if compared else {}
    load = load_of(told.get("load") or {name: told.get(name) for name in POINT})
    best = fastest([point for point in own if load_of(point) == load]) or fastest(own or points)
    if best is None:
        return [("", "")] * 3
    rates, arrivals = best["rates"], best.get("rate")
    at = "number.at" if arrivals is None else "number.at_rate"
    place = translate(at, arrivals=arrivals, **{name: best[name] for name in POINT})
    spread = translate("number.range", low=min(rates), high=max(rates), count=len(rates))
    times = [best.get(f"{name}_p50_ms") for name in ("ttft", "tpot")]
    return [(f"{best['output_tokens_per_s']:,.0f}", f"{spread}, {place}")] + [
        ("" if value is None else f"{cell_text(value)} ms", translate("number.median")) for value in times
    ]


def _accuracy(folder: RunFolder, compared: Finding | None, findings: list[Finding]) -> tuple[str, str, str]:
    """(text, note, percent): the difference to the baseline where this run was compared with one, else the percent."""
    name = f"{folder.path.parent.name}/{folder.path.name}"
    values = compared.values if compared else {}
    for row in values.get("runs", []):
        if row["run"] == name and row.get("accuracy_percent") is not None:
            percent = f"{row['accuracy_percent']:.1f} %"
            if row.get("low_points") is None:
                return percent, translate("number.is_baseline"), percent
            note = translate("number.against", **row, baseline=values["baseline"])
            return translate("number.points", points=row["difference_points"]), note, percent
    sets = [f for f in findings if f.key.startswith("scores.percent")]
    if not sets:
        return "", "", ""
    total = sum(f.values["count"] for f in sets)
    mean = sum(f.values["value"] * f.values["count"] for f in sets) / total
    parts = ", ".join(f"{f.values['task']} {f.values['value']:.1f}" for f in sets)
    return f"{mean:.1f} %", translate("number.sets", sets=parts, count=total), f"{mean:.1f} %"
