"""24 points, two engines, two precisions, six loads: killed in the middle, a server that dies, a server that answers
500 for a while; the sweep ends complete, and no point is measured twice.

    python benchmarks/sweep_survives.py [--model demo]

Our engine varies `quantize`; the servers are ours as well, started by the sweep, one for each precision. Three runs of
the command line: the first is killed with SIGKILL, the second meets both bad servers and must end with a status that
says so, the third measures what failed. Status 1 where a point is missing, failed or measured twice, or where an
undamaged row changed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ascend_kit import convert, demo
from ascend_kit.params import build_experiment

PRECISIONS = {"none": "served_bf16", "w8a8": "served_int8"}
LIMIT_S = 900


def serve(model: str, port: int, faults: Path) -> None:
    """Our server; it answers 500 while `faults`/fail exists and ends at once when `faults`/die does."""
    from aiohttp import web

    from ascend_kit import AscendInferEngine
    from ascend_kit.serve import Server

    @web.middleware
    async def trouble(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        if request.method == "POST" and (faults / "die").exists():
            (faults / "die").unlink()
            os._exit(1)
        if request.method == "POST" and (faults / "fail").exists():
            raise web.HTTPInternalServerError(text="no luck")
        return await handler(request)

    with AscendInferEngine(model, device="cpu", max_seq_length=256, batch_size=8) as engine:
        app = Server(engine, "m").application()
        app.middlewares.append(trouble)
        web.run_app(app, host="127.0.0.1", port=port, print=None)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def parameters(model: str, root: Path) -> dict[str, Any]:
    """The sweep of 2 x 2 x 6 points."""
    prompts = root / "prompts.txt"
    prompts.write_text("The sea is blue.\nOne and one is two.\n")
    values: dict[str, Any] = {
        "experiment": "survives", "run": "sweep", "output_root": str(root / "out"), "input_model": model,
        "model_name": Path(model).name, "prompts_file": str(prompts), "device": "cpu", "max_seq_length": 256,
        "batch_size": 8, "kv_cache_gib": 0.05, "sweep_requests_per_point": 8, "speculate": 0,
        "sweep": {"concurrency": [1, 2, 4], "prompt_len": [16, 48], "output_len": [8], "quantize": list(PRECISIONS),
                  "engine": ["ascend_kit", *PRECISIONS.values()]},
    }  # fmt: skip
    entries: list[dict[str, Any]] = [{"kind": "ascend_kit"}]
    for scheme, name in PRECISIONS.items():
        port, faults = free_port(), root / name
        faults.mkdir()
        folder = root / "out" / "survives" / "models" / f"{Path(model).name}-{'bf16' if scheme == 'none' else scheme}"
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(folder), str(port), str(faults)]
        entries.append({"name": name, "base_url": f"http://127.0.0.1:{port}/v1", "model": "m", "quantize": scheme,
                        "engine_command": " ".join(command), "runs_on": "this machine"})  # fmt: skip
    return {**values, "engines": entries}


class Sweep:
    """The run folder and the runs of its command line."""

    def __init__(self, root: Path, values: dict[str, Any]) -> None:
        self.root, self.file = root, root / "survives.yaml"
        self.file.write_text(yaml.safe_dump(values))
        self.table = root / "out" / "survives" / "sweep" / "rows.jsonl"

    def rows(self, **wanted: str) -> list[dict[str, Any]]:
        """The whole lines on disk whose columns are as wanted."""
        text = self.table.read_text() if self.table.exists() else ""
        rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]

    def run(self, watch: Callable[[subprocess.Popen], None]) -> int:
        """The exit status of one run; `watch` is called again and again meanwhile."""
        command = [sys.executable, "-m", "ascend_kit", "run", str(self.file), "--only", "04_throughput"]
        with open(self.root / "log.txt", "ab") as log:
            process = subprocess.Popen([*command, "--resume"], stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + LIMIT_S
        while process.poll() is None:
            watch(process)
            time.sleep(0.02)
            if time.monotonic() > end:
                os.killpg(process.pid, signal.SIGKILL)
                raise TimeoutError(f"a run took more than {LIMIT_S} s; see {self.root / 'log.txt'}")
        return process.wait()

    def kill_in_the_middle(self, process: subprocess.Popen) -> None:
        if len(self.rows(status="ok")) >= 8:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def make_trouble(self, _: subprocess.Popen) -> None:
        """The first server dies at its third point, once; the second answers 500 from its second until two failed."""
        died = self.root / "died"
        if len(self.rows(backend="served_bf16", status="ok")) >= 2 and not died.exists():
            (self.root / "served_bf16" / "die").touch()
            died.touch()
        fail = self.root / "served_int8" / "fail"
        if len(self.rows(backend="served_int8", status="failed")) >= 2:
            fail.unlink(missing_ok=True)
        elif self.rows(backend="served_int8", status="ok"):
            fail.touch()


def survive(model: str, root: Path) -> dict[str, bool]:
    """What must hold after the three runs -> whether it does."""
    values = parameters(model, root)
    experiment = demo.resolve(build_experiment(values))
    for scheme in PRECISIONS:
        convert(experiment.input_model, experiment.alone(quantize=scheme).converted_folder, quantize=scheme)
    sweep, began = Sweep(root, values), time.monotonic()

    def tell(name: str, status: int) -> None:
        counts = dict(collections.Counter((row["backend"], row["status"]) for row in sweep.rows()))
        print(f"{name}: exit {status} after {time.monotonic() - began:.0f} s; {counts}", flush=True)

    killed = sweep.run(sweep.kill_in_the_middle)
    kept = sweep.rows()
    tell("killed", killed)
    time.sleep(3)  # its kernel notices within a second that nobody is there any more
    troubled = sweep.run(sweep.make_trouble)
    bad = sweep.rows(status="failed")
    tell("bad servers", troubled)
    status = sweep.run(lambda _: None)
    tell("what failed", status)
    good, loads = sweep.rows(status="ok"), ("backend", "quantize", "concurrency", "prompt_len", "repeat")
    times = collections.Counter(tuple(row[name] for name in loads) for row in good)
    errors = " ".join(row["error"] for row in bad)
    if status:
        print((root / "log.txt").read_text()[-3000:])
    return {
        "the first run was killed in the middle": killed == -signal.SIGKILL and 0 < len(kept) < 24,
        "a server died and one answered 500, and the status says so": (
            troubled == 1 and len(bad) >= 3 and "HTTP 500" in errors and {r["backend"] for r in bad} == {
                "served_bf16", "served_int8"}),
        "the sweep is complete": status == 0 and len(times) == 24,
        "no point was measured twice": set(times.values()) == {1},
        "what was on disk is untouched": sweep.rows()[: len(kept)] == kept,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--serve", nargs=3, metavar=("MODEL", "PORT", "FAULTS"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve[0], int(asked.serve[1]), Path(asked.serve[2]))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        checks = survive(asked.model, Path(scratch))
    for name, holds in checks.items():
        print(f"{name}: {'yes' if holds else 'NO'}")
    return int(not all(checks.values()))


if __name__ == "__main__":
    sys.exit(main())
