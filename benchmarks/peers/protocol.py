"""What every engine is asked to do, and how it is timed: one job file in, one result file out.

Each engine has a script here that defines a class with the methods of `Engine` and calls `main`. The script
runs in the environment of its engine, so this file needs the standard library only.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

GENERATING = ("W1", "W2", "W3", "W5")


class Request(NamedTuple):
    """A prompt and the exact number of tokens that must come back."""

    prompt: list[int]
    num_output_tokens: int


class Scoring(NamedTuple):
    """Prompts that begin with the same `shared` tokens, and the token to be scored after each of them."""

    shared: list[int]
    own: list[list[int]]
    targets: list[int]

    @property
    def prompts(self) -> list[list[int]]:
        return [self.shared + own for own in self.own]


@dataclass
class Answer:
    """One finished request: its new tokens, and when each was known (time.perf_counter seconds)."""

    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)

    def add(self, token: int, now: float) -> None:
        self.token_ids.append(int(token))
        self.token_times_s.append(now)


@dataclass(frozen=True)
class Job:
    """One turn of one engine."""

    engine: str
    model: str  # Hugging Face folder
    workloads_file: str
    workloads: tuple[str, ...]
    result: str
    vocab_size: int
    options: dict[str, Any] = field(default_factory=dict)
    round: int = 0
    repeats: int = 1
    warmup: bool = True
    brief_warmup: bool = False  # for slow engines; nothing of theirs is compiled for a size
    threads: int = 1
    slots: int = 32
    max_seq_length: int = 8192
    kv_cache_bytes: int = 2 << 30
    kv_bytes_per_token: int = 0  # bf16

    @classmethod
    def from_file(cls, path: str | Path) -> Job:
        values = json.loads(Path(path).read_text())
        return cls(**{**values, "workloads": tuple(values["workloads"])})

    @property
    def derived(self) -> Path:
        """Where an engine keeps the model in its own format, beside the original."""
        folder = Path(self.model)
        return folder.with_name(f"{folder.name}.{self.engine}")


class Engine(Protocol):
    """What a script provides. `prepare` may rebuild the engine; its time is not counted."""

    def versions(self) -> dict[str, str]: ...

    def prepare(self, workload: str) -> None: ...

    def close(self) -> None:
        """End what would keep the process alive."""

    def generate(self, requests: list[Request]) -> list[Answer]:
        """Greedy answers in order, all requests arriving at once; never shorter or longer than asked."""

    def score(self, scoring: Scoring) -> list[float] | None:
        """Natural log-probabilities of the targets; None where the engine can only report its own choice.

        An engine that answers with a new token checks here that there is exactly one for each prompt.
        """


class Workloads:
    """The requests of the workloads; their tokens depend on seed, name, round and repeat alone."""

    def __init__(self, path: str | Path, vocab_size: int):
        self.values = json.loads(Path(path).read_text())
        self.vocab_size = vocab_size

    def requests(self, name: str, pass_name: str, longest: int | None = None) -> list[Request]:
        """The requests of W1, W2, W3 or W5 in one pass; with `longest` only four of at most so many tokens."""
        sizes, rng = self.values[name], self._rng(name, pass_name)
        pairs = list(zip(sizes["prompt_lens"], sizes["output_lens"], strict=True))
        if longest:
            pairs = [(min(prompt, longest), min(output, 4)) for prompt, output in pairs[:4]]
        return [Request(self._tokens(rng, prompt), output) for prompt, output in pairs]

    def scoring(self, name: str, pass_name: str, longest: int | None = None) -> Scoring:
        """What W4 or W4U asks in one pass; in W4U nothing is shared. With `longest` only four requests."""
        sizes, rng = self.values[name], self._rng(name, pass_name)
        shared, count = self._tokens(rng, sizes["shared_len"]), 4 if longest else sizes["num_requests"]
        return Scoring(shared, [self._tokens(rng, sizes["own_len"]) for _ in range(count)], self._tokens(rng, count))

    def _rng(self, name: str, pass_name: str) -> random.Random:
        return random.Random(f"{self.values['seed']}/{name}/{pass_name}")

    def _tokens(self, rng: random.Random, count: int) -> list[int]:
        low = self.values["first_token_id"]
        return [low + int(rng.random() * (self.vocab_size - low)) for _ in range(count)]


def main(build: Callable[[Job], Engine], make_derived: Callable[[Job], None] | None = None) -> None:
    """The command line of every script: `JOB.json`, or `--prepare JOB.json` to make its own model files."""
    arguments = sys.argv[1:]
    job = Job.from_file(arguments[-1])
    if arguments[0] == "--prepare":
        if make_derived is not None:
            make_derived(job)
        return
    run(job, build)


def run(job: Job, build: Callable[[Job], Engine]) -> None:
    """Load the engine and go through the workloads; one that fails leaves its error and the others go on.

    The result file is written after each workload, so a crash or a time limit loses only what came after it.
    """
    start = time.perf_counter()
    engine = build(job)
    result: dict[str, Any] = {
        "engine": job.engine,
        "round": job.round,
        "load_s": time.perf_counter() - start,
        "versions": engine.versions(),
        "options": job.options,
        "load_peak_bytes": peak_bytes(),
        "workloads": {},
        "is_complete": False,
    }
    workloads = Workloads(job.workloads_file, job.vocab_size)
    for number, name in enumerate(job.workloads, 1):
        begin = time.perf_counter()
        try:
            engine.prepare(name)
            result["workloads"][name] = _measure(job, engine, workloads, name)
        except Exception as error:
            traceback.print_exc()
            result["workloads"][name] = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
        row = result["workloads"][name]
        row["spent_s"] = time.perf_counter() - begin  # with untimed passes
        result["is_complete"] = number == len(job.workloads)
        _write(Path(job.result), result)
        print(f"  {job.engine} {name}: {_short(row)}; {row['spent_s']:.0f} s in all", flush=True)
    if hasattr(engine, "close"):
        engine.close()


def _write(path: Path, result: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    os.replace(temporary, path)


def _measure(job: Job, engine: Engine, workloads: Workloads, name: str) -> dict[str, Any]:
    """One untimed pass over other tokens of the same lengths, then the timed ones.

    The untimed pass is brief for slow engines, and for W4U and W5, which are like what ran before them.
    """
    one_pass = _generate if name in GENERATING else _score
    if job.warmup:
        longest = 256 if job.brief_warmup else 2304 if name in ("W4U", "W5") else None
        one_pass(engine, workloads, name, f"{job.round}/warmup", longest)
    reset_peak()
    samples = []
    for repeat in range(job.repeats):
        gc.collect()
        samples.append(one_pass(engine, workloads, name, f"{job.round}/{repeat}"))
    return {"status": "ok", "error": None, "samples": samples, "peak_bytes": peak_bytes()}


def _generate(
    engine: Engine, workloads: Workloads, name: str, pass_name: str, longest: int | None = None
) -> dict[str, Any]:
    requests = workloads.requests(name, pass_name, longest)
    start, cpu_start = time.perf_counter(), time.process_time()
    answers = engine.generate(requests)
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    check_answers(requests, answers, workloads.vocab_size)
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "output_tokens": sum(len(answer.token_ids) for answer in answers),
        "token_times_s": [[round(t - start, 6) for t in answer.token_times_s] for answer in answers],
        "first_tokens": [answer.token_ids[:16] for answer in answers[:4]],
    }


def _score(
    engine: Engine, workloads: Workloads, name: str, pass_name: str, longest: int | None = None
) -> dict[str, Any]:
    scoring = workloads.scoring(name, pass_name, longest)
    start, cpu_start = time.perf_counter(), time.process_time()
    scores = engine.score(scoring)
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    if scores is not None and len(scores) != len(scoring.targets):
        raise RuntimeError(f"{len(scores)} scores came back for {len(scoring.targets)} requests")
    return {"wall_s": wall_s, "cpu_s": cpu_s, "num_requests": len(scoring.targets), "scores": scores}


def check_answers(requests: list[Request], answers: list[Answer], vocab_size: int) -> None:
    """RuntimeError unless each answer has the tokens asked for, from the vocabulary, each with a time."""
    if len(answers) != len(requests):
        raise RuntimeError(f"{len(answers)} answers came back for {len(requests)} requests")
    check_counts(requests, [len(answer.token_ids) for answer in answers])
    for number, answer in enumerate(answers):
        if len(answer.token_times_s) != len(answer.token_ids):
            raise RuntimeError(
                f"request {number}: {len(answer.token_times_s)} times for {len(answer.token_ids)} tokens"
            )
        bad = next((token for token in answer.token_ids if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise RuntimeError(f"request {number}: token {bad} is outside 0 to {vocab_size - 1}")


def check_counts(requests: list[Request], counts: list[int]) -> None:
    """RuntimeError unless each request got as many tokens as it asked for."""
    for number, (request, count) in enumerate(zip(requests, counts, strict=True)):
        if count != request.num_output_tokens:
            raise RuntimeError(
                f"request {number}: {count} tokens came back, {request.num_output_tokens} were asked for"
            )


def reset_peak() -> None:
    """Begin a new high-water mark of resident memory; where this is not allowed the old mark stays."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """Most resident memory of this process since `reset_peak`; file pages that are mapped count."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def _short(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return row["error"]
    return ", ".join(f"{sample['wall_s']:.2f} s ({sample['cpu_s']:.2f} s of CPU)" for sample in row["samples"])
