"""What a table says, in sentences: the end of every notebook and the top of the report.

Each function reads a table as it was loaded from disk and returns short statements with
units; `conclude` keeps them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.results import RunFolder
from ascend_kit.show.drawing import config_labels

if TYPE_CHECKING:
    import pandas

    from ascend_kit.checkpoint.convert import ConversionResult
    from ascend_kit.evaluation.scores import EvaluationResult

HIT_RATE_WORTH_A_WORD = 0.02


def conclude(folder: RunFolder, findings: Iterable[str], files: Iterable[str | Path] = ()) -> Path:
    """Print findings and files and write <stage>.json, the sign that the notebook is done; its path."""
    findings = list(findings)
    names = [str(folder.path / f"{folder.stage}.json"), *sorted({str(path) for path in files})]
    for text in findings:
        print(f"- {text}")
    print("written: " + ", ".join(names))
    value = {"stage": folder.stage, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "findings": findings,
             "files": names}  # fmt: skip
    return folder.write_json(str(folder.stage), value)


def environment_findings(checks: pandas.DataFrame, ceilings: dict[str, Any]) -> list[str]:
    """What the doctor found wrong, and the measured ceilings in words."""
    bad = checks[checks["status"].isin(["fail", "warn"])]
    lines = [f"{row.status}: {row.check}: {row.evidence}. {row.remedy}".rstrip(". ") + "." for row in bad.itertuples()]
    lines = lines or [f"{len(checks)} checks, nothing to mend."]
    if ceilings.get("read_bytes_per_s"):
        lines.append(f"Memory is read at {ceilings['read_bytes_per_s'] / 1e9:.1f} GB/s (measured).")
    rates = {key.removesuffix("_per_s").replace("_", " "): value for key, value in ceilings.items()
             if key.endswith(("flops_per_s", "int8_ops_per_s")) and value}  # fmt: skip
    if rates:
        text = ", ".join(f"{name.split()[0]} {value / 1e9:,.0f}" for name, value in rates.items())
        lines.append(f"Matrix products reach, in 10^9 operations/s (measured): {text}.")
    return lines


def conversion_findings(manifest: dict[str, Any], result: ConversionResult) -> list[str]:
    """What was written, how fast, and whether it was there before."""
    size = sum(entry["size"] for entry in manifest["files"])
    done = f"{manifest['num_tensors']} tensors, {size / 1e6:,.1f} MB, scheme {result.scheme}"
    if result.reused:
        return [f"{done}: the folder was made before from the same source in the same way and is reused."]
    return [f"{done}, written in {result.seconds:.1f} s ({result.mb_per_s or 0.0:.1f} MB/s)."]


def sweep_findings(rows: pandas.DataFrame) -> list[str]:
    """Best point of each engine and layout, distance from the ceiling, gain over the baseline, points measured while
    others ran, and what failed."""
    from ascend_kit.measure.sweep import failed_points

    if rows.empty:
        return ["Nothing was measured."]
    done = rows[rows["status"] == "ok"]
    done = done.assign(engine=config_labels(done))
    lines = [_best_point(name, group) for name, group in done.groupby("engine", sort=False)]
    lines += _gain(done) + _shared(done)
    if "prefix_hit_rate" in done and (done["prefix_hit_rate"].fillna(0) > HIT_RATE_WORTH_A_WORD).any():
        lines.append(f"Prefix cache hits up to {done['prefix_hit_rate'].max():.0%} of a prompt: those points "
                     "are faster than distinct prompts would be.")  # fmt: skip
    if "num_preemptions" in done and done["num_preemptions"].fillna(0).sum() > 0:
        count = int(done["num_preemptions"].sum())
        lines.append(f"{count} preemptions: the KV pool was too small for the load; "
                     "raise kv_cache_gib or lower concurrency.")  # fmt: skip
    failed = failed_points(rows)
    lines += [f"FAILED: concurrency {row.concurrency}, prompt {row.prompt_len}, output {row.output_len} "
              f"({row.backend}): {row.error}" for row in failed.itertuples()]  # fmt: skip
    return lines


def _best_point(name: str, group: pandas.DataFrame) -> str:
    best = group.loc[group["output_tokens_per_s"].idxmax()]
    point = f"concurrency {best['concurrency']}, prompt {best['prompt_len']}, output {best['output_len']} tokens"
    times = f"TTFT p50 {best['ttft_p50_ms']:.0f} ms, TPOT p50 {best['tpot_p50_ms']:.1f} ms"
    text = f"{name}: at most {best['output_tokens_per_s']:.1f} output tokens/s, at {point} ({times})"
    share = best.get("ceiling_share")
    return text + (f"; that is {share:.0%} of the measured ceiling." if share == share and share else ".")


def _gain(done: pandas.DataFrame) -> list[str]:
    """Our throughput over the baseline's at equal points, worst and best."""
    point = ["concurrency", "prompt_len", "output_len"]
    table = done.pivot_table(index=point, columns="engine", values="output_tokens_per_s", aggfunc="median")
    if "transformers" not in table or len(table.columns) < 2:
        return []
    ratios = table.drop(columns="transformers").div(table["transformers"], axis=0)
    lines = []
    for name, column in ratios.items():
        values = column.dropna()
        if len(values):
            times = f"{values.min():.1f} to {values.max():.1f} times"
            lines.append(f"{name} writes {times} as many tokens/s as transformers' generate ({len(values)} points).")
    return lines


def _shared(done: pandas.DataFrame) -> list[str]:
    """A caution where points were measured while others ran on the same machine."""
    if "ran_with" not in done:
        return []
    shared = done[done["ran_with"].str.len() > 0]
    if shared.empty:
        return []
    text = (
        "they shared the processor's cores, so their rates are too low and do not compare"
        if (shared["device_kind"] == "cpu").any()
        else "each on cards of its own, but the host's processor and memory were shared; for small differences measure "
        "again with sweep_at_once: false"
    )
    return [f"{len(shared)} of {len(done)} points were measured while others ran (column ran_with): {text}."]


def batch_findings(answers: pandas.DataFrame) -> list[str]:
    """How many prompts were answered, how long it took per request, how the answers ended, what failed."""
    done = answers[answers["status"] == "ok"]
    tokens = int(done["num_output_tokens"].sum())
    lines = [f"{len(done)} of {len(answers)} prompts answered, {tokens} output tokens."]
    if len(done):
        ends = ", ".join(f"{count} {reason}" for reason, count in done["finish_reason"].value_counts().items())
        lines.append(f"How they ended: {ends} (length = cut off at max_new_tokens).")
        ttft, e2e = done["ttft_ms"].median(), done["e2e_ms"].median()
        lines.append(f"TTFT p50 {ttft:.0f} ms, end to end p50 {e2e:.0f} ms, "
                     f"slowest {done['e2e_ms'].max():.0f} ms.")  # fmt: skip
    failed = answers[answers["status"] != "ok"]
    return lines + [f"FAILED: prompt {row.index_}: {row.error}" for row in
                    failed.rename(columns={"index": "index_"}).itertuples()]  # fmt: skip


def evaluation_findings(result: EvaluationResult) -> list[str]:
    """Accuracy of each set with its standard error, perplexities, cautions and failed tasks."""
    lines = [_score_line(row) for row in _whole_sets(result)]
    lines += list(result.flags)
    return lines + [f"FAILED: {task}: {error}" for task, error in result.failed.items()]


def _whole_sets(result: EvaluationResult) -> list[Any]:
    """The widest finished group of each set, and the measures of running text; the table has the rest."""
    rows = []
    if len(result.groups):
        done = result.groups[(result.groups["status"] == "ok") & (result.groups["metric"] == "acc")]
        widest = done.sort_values("n", ascending=False).drop_duplicates("set")
        rows += list(widest.sort_index().itertuples())
    if len(result.tasks):
        done = result.tasks[(result.tasks["status"] == "ok") & (result.tasks["set"] == "wikitext")]
        rows += list(done.itertuples())
    return rows


def _score_line(row: Any) -> str:
    spread = "" if row.stderr is None or row.stderr != row.stderr else f" ± {_score(row.stderr, row.unit)}"
    value = f"{_score(row.value, row.unit)}{spread} {_unit(row.unit)}"
    return f"{row.task} {row.metric}: {value} (n = {int(row.n)})."


def _score(value: float, unit: str) -> str:
    return f"{value * 100:.1f}" if unit == "fraction" else f"{value:.4g}"


def _unit(unit: str) -> str:
    return "%" if unit == "fraction" else unit
