"""What a table says, as findings: the end of every notebook and the top of the report.

Each function reads a table as it was loaded from disk; `conclude` prints the findings and keeps them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.files import Table, to_json
from ascend_kit.measure.rows import LOAD, failed_points, load_profile
from ascend_kit.measure.verdict import fastest, measured_points
from ascend_kit.messages import Finding, Level, say, translate
from ascend_kit.results import RunFolder
from ascend_kit.show.drawing import LOADS, config_labels, known, with_labels

if TYPE_CHECKING:
    from ascend_kit.evaluation.scores import EvaluationResult
    from ascend_kit.evaluation.tradeoff import Verdict

HIT_RATE_WORTH_A_WORD = 0.02
POINT = ["concurrency", "prompt_len", "output_len"]
CAUTIOUS: dict[str, Level] = {"fail": "failed", "warn": "caution"}


def conclude(folder: RunFolder, findings: Iterable[Finding], files: Iterable[str | Path] = ()) -> None:
    """Print findings and those files that exist, and write <stage>.json, the sign that the notebook is done."""
    findings = list(findings)
    names = [str(folder.path / f"{folder.stage}.json"), *sorted({str(path) for path in files if Path(path).exists()})]
    for finding in findings:
        print(f"- {translate(f'level.{finding.level}') + ': ' if finding.level != 'note' else ''}{finding}")
    print(translate("conclude.written", names=", ".join(names)))
    value = {"stage": folder.stage, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
             "findings": [finding.to_row() for finding in findings], "files": names}  # fmt: skip
    folder.write_json(str(folder.stage), value)


def environment_findings(checks: Table, ceilings: dict[str, Any]) -> list[Finding]:
    """What the doctor found wrong, and the measured ceilings in words."""
    bad = checks[checks["status"].isin(list(CAUTIOUS))]
    found = [
        say("doctor.check", CAUTIOUS[row.status], check=row.check, evidence=row.evidence.rstrip("."),
            remedy=row.remedy.rstrip("."))
        for row in bad.itertuples()
    ]  # fmt: skip
    found = found or [say("doctor.fine", count=len(checks))]
    if ceilings.get("read_bytes_per_s"):
        found.append(say("ceilings.memory", gb_per_s=ceilings["read_bytes_per_s"] / 1e9))
    rates = {key.split("_")[0]: value for key, value in ceilings.items()
             if key.endswith(("flops_per_s", "int8_ops_per_s")) and value}  # fmt: skip
    if rates:
        shown = ", ".join(f"{name} {value / 1e12:,.3g}" for name, value in rates.items())
        found.append(say("ceilings.products", rates=shown))
    return found


def conversion_findings(manifest: dict[str, Any], conversion: dict[str, Any]) -> list[Finding]:
    """What was written, how fast, and whether it was there before; `conversion` as in conversion.json."""
    values = {"count": manifest["num_tensors"], "scheme": conversion["scheme"],
              "mb": sum(entry["size"] for entry in manifest["files"]) / 1e6}  # fmt: skip
    if conversion["reused"]:
        return [say("convert.reused", **values)]
    return [say("convert.written", **values, seconds=conversion["seconds"], mb_per_s=conversion["mb_per_s"] or 0.0)]


def sweep_findings(rows: Table) -> list[Finding]:
    """Best point of each engine and layout, distance from the ceiling, gain over the baseline, and what failed."""
    from ascend_kit.measure.disturbed import disturbance

    if rows.empty:
        return [say("sweep.nothing", "caution")]
    done = rows[rows["status"] == "ok"]
    done = done.assign(engine=config_labels(done))
    best = (_best_point(name, group) for name, group in done.groupby("engine", sort=False))
    found = [finding for finding in best if finding]
    found += _gain(done)
    found += disturbance((row["engine"], row) for row in done.to_dict("records"))
    if "prefix_hit_rate" in done and (done["prefix_hit_rate"].fillna(0) > HIT_RATE_WORTH_A_WORD).any():
        found.append(say("sweep.prefix_hits", "caution", share=float(done["prefix_hit_rate"].max())))
    if "num_preemptions" in done and done["num_preemptions"].fillna(0).sum() > 0:
        found.append(say("sweep.preemptions", "caution", count=int(done["num_preemptions"].sum())))
    return found + [
        say("sweep.failed", "failed", engine=row["backend"], error=str(row["error"]), **{k: int(row[k]) for k in POINT})
        for row in failed_points(rows).to_dict("records")
    ]


def _best_point(name: str, group: Table) -> Finding | None:
    """The best point by the mean of its repeats, as 06 counts it: a single lucky repeat is no headline."""
    best = fastest(measured_points(group.astype(object).where(group.notna(), None).to_dict("records")))
    if best is None:
        return None
    values = {column: float(best[column]) for column in _PER_POINT if best.get(column) is not None}
    values |= {"engine": name, "count": best["num_repeats"], **{column: int(best[column]) for column in POINT}}
    if best.get("rate") is not None:  # as fast as requests come: a share of the ceiling says nothing
        return say("sweep.best_timed", **values, load=str(best["load"]), rate=float(best["rate"]))
    if ceiling := best.get("ceiling_tokens_per_s"):
        share = values["output_tokens_per_s"] / ceiling
        return say("sweep.best_of_ceiling", **values, share=share, ceiling=float(ceiling))
    return say("sweep.best", **values)


_PER_POINT = ("output_tokens_per_s", "ttft_p50_ms", "tpot_p50_ms")
_SAME_LOAD = [*POINT, "_load", "_kind"]


def _gain(done: Table) -> list[Finding]:
    """Our throughput over the baseline's at equal points, worst and best."""
    named = with_labels(done).assign(engine=config_labels(done.drop(columns=[*LOADS], errors="ignore")))
    table = named.pivot_table(index=_SAME_LOAD, columns="engine", values="output_tokens_per_s", aggfunc="median")
    if "transformers" not in table or len(table.columns) < 2:
        return []
    ratios = table.drop(columns="transformers").div(table["transformers"], axis=0)
    return [
        say("sweep.gain", engine=name, low=float(values.min()), high=float(values.max()), count=len(values))
        for name, values in ((name, column.dropna()) for name, column in ratios.items())
        if len(values)
    ]


def profile_findings(folder: RunFolder) -> list[Finding]:
    """What bounds prefill and decode, with the evidence; nothing where nothing was profiled."""
    steps, _ = load_profile(folder)
    found = []
    for row in steps.to_dict("records"):
        values: dict[str, Any] = {k: v for k, v in row.items() if isinstance(v, (str, int, float)) and known(v)}
        for floor in ("memory_floor_ms", "arithmetic_floor_ms"):
            values[floor.replace("floor_ms", "share")] = values.get(floor, 0.0) / values["counted_step_ms"]
        found.append(say(f"profile.{row['bound']}", **values))
    return found


def batch_findings(answers: Table) -> list[Finding]:
    """How many prompts were answered, how long it took per request, how the answers ended, what failed."""
    done, failed = answers[answers["status"] == "ok"], answers[answers["status"] != "ok"]
    tokens = int(done["num_output_tokens"].sum())
    found = [say("batch.answered", done=len(done), total=len(answers), tokens=tokens)]
    if len(done):
        ends = ", ".join(f"{count} {reason}" for reason, count in done["finish_reason"].value_counts().items())
        medians = {name: float(done[name].median()) for name in ("ttft_ms", "e2e_ms")}
        found += [say("batch.ends", ends=ends), say("batch.times", slowest_ms=float(done["e2e_ms"].max()), **medians)]
    return found + [
        say("batch.failed", "failed", index=int(index), error=str(error))
        for index, error in zip(failed["index"], failed["error"], strict=True)
    ]


def evaluation_findings(result: EvaluationResult) -> list[Finding]:
    """Accuracy of each set with its standard error, perplexities, cautions and failed tasks."""
    found = [_score(row) for row in _whole_sets(result.groups, result.tasks)]
    found += result.flags
    return found + [
        say("scores.failed", "failed", task=task, error=str(error)) for task, error in result.failed.items()
    ]


def _whole_sets(groups: Table, tasks: Table) -> list[Any]:
    """The widest finished group of each set, and the measures of sets without groups; the table has the rest."""
    rows = []
    if len(groups):
        done = groups[groups["status"] == "ok"]
        done = done.assign(other=done["metric"] != "acc")  # a group may have other metrics: then its first
        widest = done.sort_values(["other", "n"], ascending=[True, False], kind="stable").drop_duplicates("set")
        rows += list(widest.sort_index().itertuples())
    if len(tasks):
        grouped = set(groups["set"]) if len(groups) else set()
        done = tasks[(tasks["status"] == "ok") & ~tasks["set"].isin(grouped)]
        rows += list(done.itertuples())
    return rows


def _score(row: Any) -> Finding:
    percent = row.unit == "fraction"
    values = {"task": row.task, "metric": row.metric, "count": int(row.n), "unit": row.unit,
              "value": float(row.value) * (100 if percent else 1)}  # fmt: skip
    kind = "percent" if percent else "measure"
    if row.stderr is None or row.stderr != row.stderr:
        return say(f"scores.{kind}", **values)
    return say(f"scores.{kind}_with_error", **values, stderr=float(row.stderr) * (100 if percent else 1))


def _verdict(decision: Verdict, text: str, values: dict[str, Any]) -> Finding:
    """The decision by its numbers; in the words of the comparison where no run is recommended."""
    rows = decision.table[decision.table["run"] == decision.best].to_dict("records") if len(decision.table) else []
    if not rows:
        return say("compare.verdict", text=text, **values)
    best = rows[0]
    load = {} if decision.point is None else dict(zip(LOAD, decision.point, strict=True))
    values |= {"rate": best["output_tokens_per_s"], "load": load, **{name: load[name] for name in POINT if load}}
    arrivals = load.get("rate")
    values |= {} if arrivals is None else {"arrivals": arrivals}
    if decision.best == decision.baseline:
        return say("compare.use_baseline" if arrivals is None else "compare.use_baseline_by_rate", **values)
    named = {"speedup": "speedup", "difference": "difference_points", "low": "low_points", "high": "high_points"}
    values |= {"n": int(best["n"]), **{name: float(best[key]) for name, key in named.items()}}
    return say("compare.use" if arrivals is None else "compare.use_by_rate", **values)


def comparison_findings(decision: Verdict, perplexity: Table) -> list[Finding]:
    """The verdict and its cautions, and how running text compares."""
    lines = [line for line in decision.text.splitlines() if line.strip()]
    columns = ["run", "accuracy_percent", "difference_points", "low_points", "high_points", "n"]
    runs = json.loads(to_json(decision.table.reindex(columns=columns).to_dict("records")))
    values = {"best": decision.best, "baseline": decision.baseline, "runs": runs}
    found = [_verdict(decision, line, values) for line in lines[:1]]
    found += [say("text", text=line) for line in lines[1:]]
    found += decision.cautions
    return found + [
        say("compare.bits_per_byte", candidate=row.candidate, baseline=row.baseline, outcome=row.outcome,
            candidate_bits=float(row.candidate_bits_per_byte), baseline_bits=float(row.baseline_bits_per_byte))
        for row in perplexity.itertuples()
    ]  # fmt: skip
