"""Clocks: an hour of sweep points in simulated time, and a run whose time of day jumps back an hour in its midst.

Run: python benchmarks/clock.py hour, or python benchmarks/clock.py back (needs a C compiler).

hour: the sweep over an engine that computes nothing but waits, by a clock that only its own waiting moves on. Memory,
descriptors, threads and the number of files must stay level after the first tenth of the points.
back: the notebooks 03 and 04 of the demo with a wall clock set back by 3600 s as soon as the first point is measured.
Every state must be ok, no duration anywhere negative, and --resume must find everything done.
Exit code 1 when anything is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests")]

# libfaketime 0.9.10 lets every time.sleep of Python 3.11 fail (EINVAL), so the time of day is shifted by this instead.
SHIFT = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long shift(void) { const char *mark = getenv("CLOCK_SET_BACK"); return mark && !access(mark, F_OK) ? 3600 : 0; }
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec -= shift();
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    int failed = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec, now->tv_usec = exact.tv_nsec / 1000;
    return failed;
}
time_t time(time_t *result) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (result) *result = exact.tv_sec;
    return exact.tv_sec;
}
"""
STEP_S = 0.1
SIMULATED_S = 3600.0
GROWTH_BYTES = 16 << 20


class SimulatedClock:
    """Takes the place of time's functions; waiting moves it on and takes no time."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        time.perf_counter = time.monotonic = self.read  # type: ignore[assignment]
        time.sleep = self.wait  # type: ignore[assignment]

    def read(self) -> float:
        self.now_s += 1e-6  # nothing happens at the same moment
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


def hour() -> int:
    """A sweep that takes an hour of simulated time."""
    import stand_in_engine
    from replica_kills import held

    from ascend_kit.measure import engines, sweep
    from ascend_kit.params import build_experiment
    from ascend_kit.results import RunFolder

    engines.quantize_scheme = lambda folder: "none"  # the stand-in has no checkpoint
    clock, samples = SimulatedClock(), []
    with tempfile.TemporaryDirectory() as folder:
        experiment = build_experiment(
            dict(experiment="hour", output_root=folder, max_seq_length=512, max_new_tokens=64, batch_size=4,
                 sweep_concurrency=[1, 2, 4, 8], sweep_prompt_len=[8, 16, 64], sweep_output_len=[16, 64],
                 sweep_repeats=30)
        )  # fmt: skip
        started_s = clock.now_s

        def look(done: float, total: int, text: str) -> None:
            if done == int(done) and int(done) % 12 == 0:
                samples.append({**held(), "files": sum(path.is_file() for path in Path(folder).rglob("*"))})

        with RunFolder.open(experiment, stage="04_throughput") as run_folder:
            engine = stand_in_engine.StandInEngine(step_s=STEP_S)
            rows = sweep.run_sweep(engine, experiment, run_folder, ceilings=stand_in_engine.CEILINGS, on_progress=look)
    simulated_s = clock.now_s - started_s
    before, after = samples[len(samples) // 10], samples[-1]
    found = {"points": len(rows), "simulated_s": round(simulated_s), "states": sorted(set(rows["status"]))}
    print(json.dumps({**found, "before": before, "after": after}, indent=1))
    grown = {name: after[name] - before[name] for name in before}
    is_level = grown.pop("rss_bytes") < GROWTH_BYTES and not any(value > 0 for value in grown.values())
    return 0 if is_level and found["states"] == ["ok"] and simulated_s >= SIMULATED_S else 1


def back() -> int:
    """The demo's sweep and answers under a clock that is set back."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mark, library = folder / "set_back", folder / "shift.so"
        compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(compiler, input=SHIFT, text=True, check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), "CLOCK_SET_BACK": str(mark)}
        command = [
            sys.executable, "-m", "ascend_kit", "run", str(HERE.parent / "params" / "demo.yaml"), "--only", "03,04",
            "--set", f"output_root={folder / 'outputs'}", "--set", "use_model=source", "--set", "sweep_repeats=1",
        ]  # fmt: skip
        run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        rows = folder / "outputs" / "demo" / "default" / "rows.jsonl"
        while run.poll() is None and not (rows.exists() and rows.stat().st_size):
            time.sleep(0.2)
        was_running = run.poll() is None
        mark.touch()
        output, _ = run.communicate()
        again = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
        negative = sorted(set(negatives(rows.parent)))
        record = json.loads((rows.parent / "run.json").read_text())
    print(json.dumps({"exit": run.returncode, "set back while it ran": was_running, "created": record["created"],
                      "updated": record["updated"], "negative": negative,
                      "done before": again.stdout.count("done before")}, indent=1))  # fmt: skip
    is_good = run.returncode == again.returncode == 0 and again.stdout.count("done before") == 2
    if not is_good:
        print(output, again.stdout, again.stderr)
    return 0 if is_good and was_running and not negative else 1


def negatives(folder: Path) -> Iterator[str]:
    """Where a number of seconds below zero stands in the files of a run."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".ipynb"):
            yield from _below_zero(json.loads(path.read_text()), path.name)
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                yield from _below_zero(json.loads(line), path.name)


def _below_zero(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _below_zero(item, f"{place} {key}")
    elif isinstance(value, list):
        for item in value:
            yield from _below_zero(item, place)
    elif isinstance(value, (int, float)) and value < 0 and place.endswith(("_s", "_ms", "duration")):
        yield place


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("hour", "back"))
    return {"hour": hour, "back": back}[parser.parse_args().what]()


if __name__ == "__main__":
    sys.exit(main())
