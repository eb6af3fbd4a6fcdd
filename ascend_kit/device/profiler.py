"""What ran during some steps: torch.profiler on CPU and CUDA, torch_npu.profiler on an NPU, one table of operators.

The raw trace stays for the usual viewers: Perfetto or chrome://tracing for `<name>.json.gz`, MindStudio Insight for the
`<name>/..._ascend_pt` of an NPU.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ascend_kit.device.device import Device, import_torch_npu

# The first that fits an operator's name; what fits none is arithmetic on single elements, norms, sampling.
KINDS = {
    "communication": r"hcom|hccl|nccl|gloo|c10d|all_?reduce|all_?gather|broadcast_|reduce_?scatter",
    "attention": r"attention|attend|fmha|flash|paged",
    "product": r"matmul|linear|gemm|gemv|addmm|\bmm\b|bmm|cutlass|batchmatmul",
    "copy": r"copy|memcpy|memset|cast|transdata|tensormove|gather|scatter|index|slice|split|concat|\bcat\b|store|"
    r"aten::to\b|clone|fill_|zero_",
}
GPU_EVENTS = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of Kineto's trace
HOST_EVENTS = {"cpu_op", "user_annotation"}


class ProfileError(RuntimeError):
    """The profiler did not record what is needed; the message says what is missing."""


class Operator(NamedTuple):
    """All runs of one operator within a profile."""

    name: str
    kind: str  # communication, attention, product, copy, other
    calls: int
    total_ms: float


class Span(NamedTuple):
    """One run of an operator; times in microseconds."""

    name: str
    start_us: float
    end_us: float


class Profile(NamedTuple):
    """What ran: `busy_ms` is the time in which at least one operator did."""

    operators: list[Operator]
    busy_ms: float
    trace: str  # name of the raw trace in the folder

    @property
    def launches(self) -> int:
        """Operators started."""
        return sum(one.calls for one in self.operators)

    def time_of(self, kind: str) -> float:
        """Milliseconds of all operators of a kind."""
        return sum(one.total_ms for one in self.operators if one.kind == kind)


class Profiler:
    """Records what is computed between `start` and `stop`, in this thread's process."""

    def __init__(self, device: Device, folder: str | Path, name: str) -> None:
        self.device, self.folder, self.name = device, Path(folder), name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._session = self._npu_session() if device.kind == "npu" else self._torch_session()

    def start(self) -> None:
        self._session.start()

    def stop(self) -> Profile:
        """What was recorded; ProfileError when the raw trace lacks it."""
        self._session.stop()
        if self.device.kind == "npu":
            spans, trace = read_kernel_details(self.folder / self.name), self.name
        else:
            trace = f"{self.name}.json.gz"
            self._session.export_chrome_trace(str(self.folder / trace))
            spans = read_trace(self.folder / trace, on_host=self.device.kind == "cpu")
        if not spans:
            raise ProfileError(f"{self.folder / trace}: the profiler recorded no operator")
        return summarize(spans, trace, is_nested=self.device.kind == "cpu")

    def _torch_session(self) -> Any:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else Kineto writes a line to stderr at each start and stop
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.kind == "cuda" else [])
        return profile(activities=kinds)

    def _npu_session(self) -> Any:
        profiler = import_torch_npu().profiler
        config = profiler._ExperimentalConfig(
            profiler_level=profiler.ProfilerLevel.Level1, export_type=profiler.ExportType.Text
        )
        # The worker's name would be the host's. The export is a table for each kind of data, made by CANN at `stop`.
        handler = profiler.tensorboard_trace_handler(str(self.folder / self.name), worker_name="rank0")
        activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU]
        return profiler.profile(activities=activities, on_trace_ready=handler, experimental_config=config)


def read_trace(path: Path, *, on_host: bool) -> list[Span]:
    """Kernels and copies of a CUDA device, or the host's operators, one within the other, from Kineto's trace."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    wanted = HOST_EVENTS if on_host else GPU_EVENTS
    found = [event for event in events if event.get("ph") == "X" and event.get("cat") in wanted]
    spans = [Span(event["name"], event["ts"], event["ts"] + event.get("dur", 0)) for event in found]
    if not on_host:
        return spans
    threads: dict[Any, list[Span]] = {}
    for event, span in zip(found, spans, strict=True):
        threads.setdefault(event["tid"], []).append(span)
    # The thread that computes; others (the profiler's own, a pool's) run at the same time.
    return max(threads.values(), key=len, default=[])


def _own_time(spans: list[Span]) -> Iterator[Span]:
    """Each span shortened by the time of those inside it: their sum counts nothing twice."""
    open_spans: list[tuple[Span, float]] = []  # with the time of what is inside

    def closed(until_us: float) -> Iterator[Span]:
        while open_spans and open_spans[-1][0].end_us <= until_us:
            span, inside = open_spans.pop()
            length = span.end_us - span.start_us
            if open_spans:
                open_spans[-1] = (open_spans[-1][0], open_spans[-1][1] + length)
            yield Span(span.name, span.start_us, span.start_us + max(0.0, length - inside))

    for span in sorted(spans, key=lambda one: (one.start_us, -one.end_us)):
        yield from closed(span.start_us)
        open_spans.append((span, 0.0))
    yield from closed(float("inf"))


def read_kernel_details(folder: Path) -> list[Span]:
    """Kernels of an NPU from kernel_details.csv, the table that CANN's export writes below `folder`."""
    tables = sorted(folder.rglob("kernel_details.csv"))
    if not tables:
        raise ProfileError(
            f"{folder}: torch_npu.profiler wrote no kernel_details.csv. It needs msprof of the CANN toolkit (source "
            "its set_env.sh) and no other profiler on the card; the raw data stay there for torch_npu.profiler.analyse"
        )
    with open(tables[-1], newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    spans = []
    for row in rows:
        start = float(row["Start Time(us)"].strip())
        name = row["Type"].strip() if row["Type"].strip() not in ("", "N/A") else row["Name"].strip()
        spans.append(Span(name, start, start + float(row["Duration(us)"])))
    return spans


def summarize(spans: list[Span], trace: str, *, is_nested: bool = False) -> Profile:
    """One line per operator, the longest first. Of nested spans each counts without those inside it."""
    totals: dict[str, tuple[int, float]] = {}
    for name, start, end in _own_time(spans) if is_nested else spans:
        calls, total = totals.get(name, (0, 0.0))
        totals[name] = (calls + 1, total + (end - start) / 1e3)
    lines = [Operator(name, kind_of(name), calls, total) for name, (calls, total) in totals.items()]
    return Profile(sorted(lines, key=lambda one: -one.total_ms), _busy_us(spans) / 1e3, trace)


def _busy_us(spans: list[Span]) -> float:
    busy, until = 0.0, float("-inf")
    for _, start, end in sorted(spans, key=lambda one: one.start_us):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def kind_of(name: str) -> str:
    """What an operator does, by its name in any of the profilers."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")
