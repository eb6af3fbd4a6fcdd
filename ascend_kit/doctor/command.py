"""The command `python -m ascend_kit doctor`: findings, the self-test, explanations of error texts.

`run_checks()` returns findings for a notebook (`as_table`), `explain(text)` recognises known error texts,
and `--self-test` compares every operator with its reference on the device: the first thing to run on real
hardware.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ascend_kit.device.advice import explain, render_explanations
from ascend_kit.doctor.checks import name_of, plain_ops_line, probe_device, run_checks, run_stage
from ascend_kit.doctor.findings import OpCheck, render_sections, totals
from ascend_kit.doctor.first_run import first_run
from ascend_kit.doctor.host import Host


def run_self_test(
    host: Host | None = None, device: str = "auto", on_check: Callable[[OpCheck], None] = lambda _: None
) -> list[OpCheck]:
    """Every operator, graph and collective of a device against the reference, each stage in a process.

    A stage that hangs or dies ends in one more result with status fail that carries the explanation.
    """
    host = host or Host()
    seen, (evidence, remedy) = probe_device(host, device)
    if seen is None:
        check = OpCheck("import", "import", device, "fail", detail=evidence, remedy=remedy)
        on_check(check)
        return [check]
    stages = ["ops", "graph"] + (["collective"] if seen["count"] > 1 or seen["kind"] == "cpu" else [])
    return [check for stage in stages for check in run_stage(host, stage, name_of(seen), on_check)]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 0 when nothing failed, 1 otherwise."""
    arguments = _parser().parse_args(argv)
    if arguments.explain:
        return _explain(arguments.explain, arguments.json)
    if arguments.first_run:
        show = (lambda _: None) if arguments.json else print
        code = first_run(
            Host(), arguments.device, arguments.output, seconds=arguments.seconds, small=arguments.small, show=show
        )
        if arguments.json:
            print(arguments.output.read_text(encoding="utf-8"))
        return code
    if arguments.self_test:
        return _self_test(arguments.device, arguments.json)
    show = None if arguments.json else (lambda section: print(render_sections(section), flush=True))
    findings = run_checks(
        device=arguments.device,
        peers=arguments.peers,
        use_device=not arguments.no_device,
        graph_mode=not arguments.no_graphs,
        on_section=show,
    )
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1, ensure_ascii=False))
    else:
        print("\n" + totals(findings))
    return int(any(finding.status == "fail" for finding in findings))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ascend_kit doctor",
        description="is this machine ready, what is wrong with it, and what to do about it",
    )
    option = parser.add_argument
    option("--device", default="auto", help="auto, cpu, cuda[:N], npu[:N]; npu makes a missing card a failure")
    option("--self-test", action="store_true", help="compare every operator with its reference on the device")
    option("--first-run", action="store_true", help="all of it, and a random model for a minute; one report")
    option("--output", type=Path, default=Path("first_run.json"), help="where --first-run reports to")
    option("--seconds", type=float, default=60.0, help="how long --first-run measures its model")
    option("--small", action="store_true", help="--first-run with a model of toy size")
    option("--explain", metavar="FILE", help="explain the errors in a log file, or in the standard input (-)")
    option("--peers", nargs="*", default=(), metavar="ADDRESS", help="card addresses on other machines to ping")
    option("--no-device", action="store_true", help="only read: start nothing on the device")
    option("--no-graphs", action="store_true", help="judge for runs with graph_mode: false")
    option("--json", action="store_true", help="machine-readable output")
    return parser


def _explain(source: str, as_json: bool) -> int:
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(errors="replace")
    except OSError as error:
        remedy = "give a log file, or - and the text on the standard input"
        print(f"cannot read {source}: {error.strerror}; {remedy}", file=sys.stderr)
        return 1
    found = explain(text)
    print(json.dumps([asdict(item) for item in found], indent=1) if as_json else render_explanations(found))
    return 0


def _self_test(device: str, as_json: bool) -> int:
    checks = run_self_test(device=device, on_check=lambda one: None if as_json else print(one.describe(), flush=True))
    counts = Counter(check.status for check in checks)
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        print(f"\n{counts['ok']} ok, {counts['fail']} fail, {counts['skip']} skipped")
        if line := plain_ops_line(checks):
            print(f"To go on without the fused operators that failed, add to the parameter file:\n{line}")
    return int(bool(counts["fail"]))
