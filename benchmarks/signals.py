"""Signals at 60 moments of a run, to the driver and to the kernel: everything in order afterwards?

Run: python benchmarks/signals.py [--moments 60] [--longest 4]. Each moment is a run of its own with one notebook;
SIGINT, SIGTERM and SIGHUP in turn, spread evenly over the first `longest` seconds after the notebook was announced, two
of three to the driver and one to the kernel. In order means: exit status 130 (SIGINT) or 143 (the others), or 0 where
the run was over; run.json says what happened; the notebook's copy and a report lie there; no process and no working
file is left. Exit code 1 when anything is not.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from test_signals import STATUS, send_at  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=60)
    parser.add_argument("--longest", type=float, default=4.0, help="seconds to the last moment")
    arguments = parser.parse_args()
    outcomes: Counter[tuple[str, str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.moments):
            sent = list(STATUS)[number % len(STATUS)]
            after_s = arguments.longest * number / arguments.moments
            to_kernel = number // len(STATUS) % 3 == 2
            wrong = send_at(Path(folder, str(number)), sent, after_s, to_kernel=to_kernel)
            target = "kernel" if to_kernel else "driver"
            outcomes[signal.Signals(sent).name, target, "wrong" if wrong else "in order"] += 1
            if wrong:
                print(f"{signal.Signals(sent).name} to the {target} after {after_s:.2f} s: {wrong}", flush=True)
    for (name, target, outcome), count in sorted(outcomes.items()):
        print(f"| {name} | {target} | {outcome} | {count} |")
    return 1 if any(outcome == "wrong" for _, _, outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
