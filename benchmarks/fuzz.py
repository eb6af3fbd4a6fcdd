"""Damaged files of every kind that is read: each is refused in one line that names the file, or read rightly.

Run: python benchmarks/fuzz.py [--cases 1000] [--targets config,bin] [--seed 0]. Cases are per kind of file; each takes
at most 2 s of processor time and 500 MB of memory, or counts as a fault. Exit code 1 when there is a fault.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from fuzz_targets import TARGETS, memory, run_case  # noqa: E402

HANGS_S = 60
SPARE_BYTES = 4 << 30  # of address space: a case that asks for more fails by itself, not the machine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first case's number")
    parser.add_argument("--targets", help="names separated by commas; default all")
    arguments = parser.parse_args()
    chosen = [target for target in TARGETS if not arguments.targets or target.name in arguments.targets.split(",")]
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ASCEND_KIT_CACHE"] = f"{folder}/cache"
        for target in chosen:
            pristine = Path(folder, target.name)
            pristine.mkdir()
            target.build(pristine)
            target.read(pristine)
            limit = memory("VmSize") + SPARE_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
            outcomes: Counter[str] = Counter()
            started = time.monotonic()
            for seed in range(arguments.seed, arguments.seed + arguments.cases):
                faulthandler.dump_traceback_later(HANGS_S, exit=True)
                case = run_case(target, pristine, Path(folder, "work"), seed)
                outcomes[case.outcome] += 1
                if case.fault:
                    faults += 1
                    print(f"FAULT {case.target} {case.seed} {case.file}: {case.fault}", flush=True)
            faulthandler.cancel_dump_traceback_later()
            print(f"{target.name}: {dict(outcomes)} in {time.monotonic() - started:.0f} s", flush=True)
    print(f"{faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
