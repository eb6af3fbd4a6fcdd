"""Runs this engine and others on the same requests, in turns, and says how they compare.

    python benchmarks/compare.py --setup vllm              make an engine's environment, not in the repository
    python benchmarks/compare.py --estimate                how long a round takes, from the turns of earlier runs
    python benchmarks/compare.py --out outputs/benchmark   all that are installed, three rounds
    python benchmarks/compare.py --out outputs/check --shape tiny --rounds 1 --no-warmup

In every round each engine gets one turn: a process of its own that loads the model, goes through the
workloads and ends, with the machine's ceilings measured before and after. Rounds start with another engine
each, so that drift of a shared machine hits all alike. An engine that fails or runs out of time is reported
with what it said, and the rest goes on. README.md in this folder says more about workloads and engines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE / "peers")]

import ceilings  # noqa: E402
import report  # noqa: E402
from make_model import SHAPES, make_model  # noqa: E402
from protocol import Job  # noqa: E402

from ascend_kit.files import write_atomic  # noqa: E402

WORKLOADS = ("W1", "W3", "W2", "W4", "W4U", "W5")
CACHE = Path(os.environ.get("ASCEND_KIT_CACHE", Path.home() / ".cache" / "ascend-kit"))
PEERS_ROOT = CACHE / "peers"
SECONDS = CACHE / "bench-seconds.json"  # how long turns took, for estimates
OUT_OF_TIME = -1000


@dataclass(frozen=True)
class Contestant:
    """One engine in one setting. `environment`: folder below the peers' root, None for the running Python."""

    script: str
    environment: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    workloads: tuple[str, ...] = WORKLOADS
    is_slow: bool = False  # needs many minutes a turn; `--slow-rounds` limits how often it runs


CONTESTANTS = {
    "ascend_kit": Contestant("run_ascend_kit.py"),
    "vllm": Contestant("run_vllm.py", "vllm"),
    "openvino_bf16": Contestant("run_openvino.py", "openvino", {"weights": "bf16"}),
    "ascend_kit_w8a8": Contestant("run_ascend_kit.py", None, {"quantize": "w8a8"}),
    "ascend_kit_w8a16": Contestant("run_ascend_kit.py", None, {"quantize": "w8a16"}),
    "openvino_int8": Contestant("run_openvino.py", "openvino", {"weights": "int8"}),
    "llamacpp_bf16": Contestant("run_llamacpp.py", "llamacpp", {"weights": "bf16"}, is_slow=True),
    "llamacpp_q8_0": Contestant("run_llamacpp.py", "llamacpp", {"weights": "q8_0"}, is_slow=True),
    "transformers_generate": Contestant("run_transformers.py", "transformers", {"mode": "generate"}, is_slow=True),
    "transformers_generate_batch": Contestant(
        "run_transformers.py", "transformers", {"mode": "generate_batch"}, is_slow=True
    ),
    "transformers_padded_1024": Contestant(
        "run_transformers.py", "transformers", {"mode": "generate", "pad_to": 1024}, ("W2",), is_slow=True
    ),
    "lm_eval_hflm": Contestant("run_transformers.py", "transformers", {"mode": "hflm"}, ("W4",), is_slow=True),
}


@dataclass(frozen=True)
class Settings:
    """What makes two runs comparable; kept beside the results."""

    shape: str
    workloads: tuple[str, ...]
    repeats: int
    warmup: bool
    threads: int
    slots: int
    kv_cache_gib: float
    max_seq_length: int


def main() -> int:
    arguments = parse_arguments()
    if arguments.setup:
        return subprocess.call([str(HERE / "peers" / "setup.sh"), arguments.setup, str(arguments.peers_root)])
    if arguments.estimate:
        print(estimate_text(arguments))
        return 0
    if arguments.out is None:
        raise SystemExit("--out FOLDER is needed (or --setup ENGINE, or --estimate)")
    settings = Settings(
        arguments.shape,
        arguments.workloads,
        arguments.repeats,
        not arguments.no_warmup,
        arguments.threads,
        arguments.slots,
        arguments.kv_cache_gib,
        arguments.max_seq_length,
    )
    if not arguments.report_only:
        turns = run_rounds(arguments, settings)
        if not turns:
            return 1
    results = report.write(arguments.out, SHAPES[load_settings(arguments.out)["settings"]["shape"]])
    return 1 if results["failed"] else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--setup", metavar="ENGINE", help="make the environment of transformers, vllm, openvino or llamacpp"
    )
    parser.add_argument(
        "--peers-root", type=Path, default=PEERS_ROOT, help="where those environments lie (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--engines", type=comma_list(CONTESTANTS), default=tuple(CONTESTANTS), help="default: all")
    parser.add_argument("--workloads", type=comma_list(WORKLOADS), default=WORKLOADS, help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow-rounds", type=int, default=1, help="rounds in which the slow engines take part")
    parser.add_argument("--estimate", action="store_true", help="only say how long a round takes")
    parser.add_argument("--minutes", type=float, help="begin no round that would end later than this, as estimated")
    parser.add_argument("--repeats", type=int, default=1, help="timed passes per workload in one turn")
    parser.add_argument("--no-warmup", action="store_true", help="time the first pass of each workload")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--slots", type=int, default=32, help="requests computed together")
    parser.add_argument("--kv-cache-gib", type=float, default=2.0)
    parser.add_argument("--max-seq-length", type=int, default=8192)
    parser.add_argument("--timeout-s", type=float, default=1800, help="per turn; workloads done by then are kept")
    parser.add_argument("--resume", action="store_true", help="keep the turns in the folder that went well")
    parser.add_argument("--report-only", action="store_true", help="tables and figure from the turns in the folder")
    return parser.parse_args()


def comma_list(known: Any) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return names

    return parse


def run_rounds(arguments: argparse.Namespace, settings: Settings) -> list[Path]:
    """Run all turns; their files. Engines that are not installed are listed with the reason."""
    out = arguments.out
    absent = {name: why for name in arguments.engines if (why := why_absent(name, arguments.peers_root))}
    names = [name for name in arguments.engines if name not in absent]
    for name, why in absent.items():
        print(f"left out: {name}: {why}", flush=True)
    open_folder(out, settings, absent, arguments.resume)
    job = new_job(settings, str(make_model(settings.shape)))
    for name in list(names):
        problem = prepare(name, job, out, arguments)
        if problem:
            print(f"left out: {name}: {problem}", flush=True)
            absent[name] = problem
            names.remove(name)
    write_json(out / "settings.json", {**load_settings(out), "absent": absent})
    print(estimate_text(arguments), flush=True)
    turns, begin = [], time.perf_counter()
    for number in range(arguments.rounds):
        due = [name for name in in_order(names, number, arguments.rounds) if takes_part(name, number, arguments)]
        needed, _ = estimate(due, arguments)
        if arguments.minutes and (time.perf_counter() - begin + needed) / 60 > arguments.minutes:
            print(f"round {number + 1} would take {needed / 60:.0f} minutes: left out (--minutes)", flush=True)
            break
        turns += [take_turn(name, replace(job, round=number), out, arguments) for name in due]
    return turns


def in_order(names: list[str], number: int, rounds: int) -> list[str]:
    """The engines as round `number` takes them: over all rounds each third, half ... of the list comes first once."""
    first = number * len(names) // max(1, rounds)
    return names[first:] + names[:first]


def takes_part(name: str, number: int, arguments: argparse.Namespace) -> bool:
    return number < arguments.slow_rounds or not CONTESTANTS[name].is_slow


def estimate(names: list[str], arguments: argparse.Namespace) -> tuple[float, list[str]]:
    """Seconds of one turn each, from those seen last at this shape, and the engines never seen."""
    seen = seconds_seen().get(arguments.shape, {})
    parts = [seen.get(name, {}).get(workload) for name in names for workload in chosen(name, arguments.workloads)]
    starts = [seen[name]["start"] for name in names if name in seen]
    return sum(part for part in parts if part) + sum(starts), [name for name in names if name not in seen]


def estimate_text(arguments: argparse.Namespace) -> str:
    names = [name for name in arguments.engines if why_absent(name, arguments.peers_root) is None]
    lines = []
    for name in names:
        seconds, unknown = estimate([name], arguments)
        lines.append(f"  {name}: {'not known yet' if unknown else f'{seconds:.0f} s'}")
    rounds = [[n for n in names if takes_part(n, number, arguments)] for number in range(arguments.rounds)]
    total = sum(estimate(due, arguments)[0] for due in rounds) / 60
    fast = estimate([name for name in names if not CONTESTANTS[name].is_slow], arguments)[0] / 60
    _, unknown = estimate(names, arguments)
    lines.append(
        f"A round of all engines takes about {estimate(names, arguments)[0] / 60:.0f} minutes, one without the slow "
        f"ones {fast:.0f}; {arguments.rounds} rounds, slow engines in {arguments.slow_rounds}: {total:.0f} minutes."
        + (" Not counting the unknown." if unknown else "")
    )
    return "Turns, by the last ones seen:\n" + "\n".join(lines)


def chosen(name: str, workloads: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(workload for workload in workloads if workload in CONTESTANTS[name].workloads)


def seconds_seen() -> dict[str, dict[str, dict[str, float]]]:
    """shape -> engine -> workload (or `start`) -> seconds of the last turn seen on this machine."""
    return json.loads(SECONDS.read_text()) if SECONDS.is_file() else {}


def remember_seconds(shape: str, values: dict[str, Any]) -> None:
    spent = {name: row["spent_s"] for name, row in values["workloads"].items() if "spent_s" in row}
    seen = seconds_seen()
    mine = seen.setdefault(shape, {}).setdefault(values["engine"], {})
    mine.update(spent, start=max(0.0, values["turn_s"] - sum(spent.values())))
    write_json(SECONDS, seen)


def why_absent(name: str, root: Path) -> str | None:
    environment = CONTESTANTS[name].environment
    if environment is None or (root / environment / "installed").is_file():
        return None
    return f"not installed; python benchmarks/compare.py --setup {environment}"


def open_folder(out: Path, settings: Settings, absent: dict[str, str], resume: bool) -> None:
    """Make the folder of the results; refuses to mix turns of different settings."""
    turns = out / "turns"
    if turns.is_dir() and any(turns.iterdir()):
        if not resume:
            raise SystemExit(f"{turns} holds results already; use --resume, --report-only or another --out")
        earlier = load_settings(out)["settings"]
        if earlier != json.loads(json.dumps(asdict(settings))):
            raise SystemExit(f"{out} was run with {earlier}; give the same settings to resume")
    turns.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "settings.json",
        {
            "settings": asdict(settings),
            "absent": absent,
            "machine": machine(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        },
    )


def load_settings(out: Path) -> dict[str, Any]:
    return json.loads((out / "settings.json").read_text())


def new_job(settings: Settings, model: str) -> Job:
    shape = SHAPES[settings.shape]
    return Job(
        engine="",
        model=model,
        workloads_file=str(HERE / "workloads.json"),
        workloads=settings.workloads,
        result="",
        vocab_size=shape.vocab_size,
        repeats=settings.repeats,
        warmup=settings.warmup,
        threads=settings.threads,
        slots=settings.slots,
        max_seq_length=settings.max_seq_length,
        kv_cache_bytes=int(settings.kv_cache_gib * 2**30),
        kv_bytes_per_token=shape.kv_bytes_per_token,
    )


def prepare(name: str, job: Job, out: Path, arguments: argparse.Namespace) -> str | None:
    """Let an engine make its own model files, untimed; what went wrong, or None."""
    code, log = run_script(name, job, out, arguments, ["--prepare"], "prepare")
    return None if code == 0 else f"preparing failed: {last_words(log, code, arguments)}"


def take_turn(name: str, job: Job, out: Path, arguments: argparse.Namespace) -> Path:
    """One engine's turn; its result file. A turn that ended early keeps the workloads it had finished."""
    result = out / "turns" / f"{job.round:02d}-{name}.json"
    if result.exists() and went_well(json.loads(result.read_text())):
        return result
    print(f"round {job.round + 1}: {name}", flush=True)
    before, load = ceilings.measure(job.threads), os.getloadavg()
    raw = result.with_suffix(".raw")
    start = time.perf_counter()
    code, log = run_script(name, replace(job, result=str(raw)), out, arguments, [], f"{job.round:02d}")
    turn_s = time.perf_counter() - start
    values = json.loads(raw.read_text()) if raw.exists() else {"engine": name, "round": job.round, "workloads": {}}
    raw.unlink(missing_ok=True)
    if code != 0 or not values.get("is_complete"):
        values["error"] = last_words(log, code, arguments)
        print(f"  {name} failed: {values['error']}", flush=True)
    after = ceilings.measure(job.threads)
    values |= {"turn_s": turn_s, "ceilings": [before, after], "load_average_before": load}
    write_json(result, values)
    if "error" not in values:
        remember_seconds(arguments.shape, values)
    return result


def went_well(values: dict[str, Any]) -> bool:
    return "error" not in values and all(row["status"] == "ok" for row in values["workloads"].values())


def last_words(log: Path, code: int, arguments: argparse.Namespace) -> str:
    reason = f"out of time after {arguments.timeout_s:g} s" if code == OUT_OF_TIME else f"exit code {code}"
    tail = " ".join(log.read_text(errors="replace").split()[-40:])
    return f"{reason}: {tail[-400:]}"


def run_script(
    name: str, job: Job, out: Path, arguments: argparse.Namespace, flags: list[str], label: str
) -> tuple[int, Path]:
    """Exit code and log of an engine's script in its environment; OUT_OF_TIME when it was ended for that."""
    contestant = CONTESTANTS[name]
    folder = arguments.peers_root / contestant.environment if contestant.environment else None
    python = str(folder / "bin" / "python") if folder else sys.executable
    job = replace(
        job,
        engine=name,
        options=contestant.options,
        workloads=chosen(name, job.workloads),
        brief_warmup=contestant.is_slow,
    )
    job_file, log = out / "turns" / f"{label}-{name}.job", out / f"{label}-{name}.log"
    write_json(job_file, asdict(job))
    command = [python, str(HERE / "peers" / contestant.script), *flags, str(job_file)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment(job.threads), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(arguments.timeout_s)
        except subprocess.TimeoutExpired:
            code = OUT_OF_TIME
        finally:
            end_group(process)
    job_file.unlink()
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith(f"  {name} "):
            print(line, flush=True)
    return code, log


def end_group(process: subprocess.Popen) -> None:
    """End what the script left running, itself included: an engine may have started processes of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment(threads: int) -> dict[str, str]:
    """The same number of threads for all, and no look at the network."""
    off = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK"), "1")
    return {**os.environ, **off, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "instructions": [flag for flag in wanted if flag in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1))


if __name__ == "__main__":
    sys.exit(main())
