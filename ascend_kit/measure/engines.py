"""What a sweep drives, under one interface: the same requests go in, records with real timestamps come out.

`EngineBackend` is ours; `TransformersBackend` (baseline.py) is what users would pick without an engine, and
`EndpointBackend` (remote.py) any server that speaks OpenAI's protocol, started by us or not.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ascend_kit.checkpoint.huggingface import open_checkpoint
from ascend_kit.device.device import Device, resolve_device, select_device
from ascend_kit.device.meters import physical_cards
from ascend_kit.device.peaks import HardwarePeak
from ascend_kit.engine.elsewhere import Elsewhere
from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.engine.sequence import SamplingParams
from ascend_kit.engine.worker import own_address
from ascend_kit.identity import Identity
from ascend_kit.measure.metrics import RequestRecord, record_from_output
from ascend_kit.measure.over_time import Observed, Recorder, Sample, columns_of
from ascend_kit.measure.workload import Dispatcher, OnDone, Request
from ascend_kit.model.config import DTYPES, ModelConfig
from ascend_kit.model.tensors import uniform_schemes, weight_bytes

if TYPE_CHECKING:
    from ascend_kit.params import Experiment

SWITCHES = ("graph_mode", "operator_fusion", "memory_optimize")  # of every engine; further ones of ours:
PLAIN_LAUNCHES = 64  # operators that a layer's decode step queues without fusion, views apart: counted for Qwen3
OPTIONS = ("kv_cache_dtype", "head_dtype", "speculate", "graph_prompt_tokens")


@dataclass(frozen=True)
class DistantMachine:
    """The device of another process, which `call` reaches by the name of a method; without it what was only said of the
    machine behind an endpoint, on which nothing can be measured from here."""

    name: str
    kind: str = "endpoint"
    peak: HardwarePeak | None = None
    total_memory_bytes: int = 0
    call: Callable[[str], Any] = lambda path: None

    def synchronize(self) -> None:
        self.call("device.synchronize")

    def reset_peak_memory(self) -> None:
        self.call("device.reset_peak_memory")

    def peak_memory_bytes(self) -> int | None:
        return self.call("device.peak_memory_bytes")

    def task_queue_level(self) -> int | None:
        return self.call("device.task_queue_level")


Machine = Device | DistantMachine  # that an engine runs on


@runtime_checkable
class Backend(Protocol):
    """An engine as a sweep sees it. What it is made of is known before `open`; only then does it hold a model."""

    name: str
    config: ModelConfig  # of the weights in use
    max_seq_length: int
    is_exact: bool  # gives every request the number of tokens it asked for, or it is a failure
    slots: int | None  # requests computed together; None: as many as are in flight
    cards: int  # as the user counts them, processes on a CPU too
    num_devices: int  # whose ceilings add up; a CPU is one, however many processes share it
    replicas: int  # copies of the weights, each read by its own steps
    launches_per_layer: int | None  # operators a decode step queues per layer; None: those of our fused path

    @property
    def device(self) -> Machine:
        """Where it computes; with several cards the first, with the memory of all."""
        ...

    @property
    def identity(self) -> Identity:
        """What its rows depend on, engine and configuration included."""
        ...

    def open(self) -> None:
        """Load the model; nothing when it is loaded."""

    def close(self) -> None:
        """Give the device's memory back; it can be opened again."""

    def run(self, requests: Sequence[Request], concurrency: int, on_done: OnDone | None = None) -> list[RequestRecord]:
        """Serve all requests when they are due, at most `concurrency` at a time (see Dispatcher); one record each, in
        the order they ended. `on_done(count)` is called with the number that have ended, while others run. A failure
        leaves no request behind."""
        ...

    def observed(self) -> Observed:
        """What the engine, or who asked it, noticed during the last `run`."""
        ...

    def stats(self) -> dict[str, Any]:
        """Counters and, under `replicas`, a row for each, as the engine's `stats` gives them; {} without such."""
        ...

    def pids(self) -> Sequence[int] | None:
        """Processes of its own that this one has not started; None where they are not known or not on this machine."""
        ...

    def variant(self) -> dict[str, Any]:
        """Switches that tell this configuration from another, as plain values for a row."""
        ...

    def weight_bytes(self) -> int:
        """Bytes of the weights as stored, one replica (all its ranks together); the model is open."""
        ...


class Uncounted:
    """What a backend says whose engine takes any load, tells nothing while it serves and has no further processes."""

    is_exact = True
    slots: int | None = None
    cards = num_devices = replicas = 1

    def observed(self) -> Observed:
        return Observed({})

    def stats(self) -> dict[str, Any]:
        return {}

    def pids(self) -> Sequence[int] | None:
        return ()


class EngineBackend:
    """Our engine, driven through add_request and step."""

    is_exact = True

    def __init__(self, engine: AscendInferEngine, experiment: Experiment, name: str = "ascend_kit") -> None:
        self.name, self.engine, self._experiment = name, engine, experiment
        self.config, self.max_seq_length = engine.config, engine.max_seq_length
        self.cards, self.replicas = experiment.cards, experiment.replicas
        self.slots: int | None = experiment.batch_size * self.replicas
        self.num_devices = 1 if self.device.kind == "cpu" else self.cards
        self.launches_per_layer: int | None = None if experiment.operator_fusion else PLAIN_LAUNCHES
        self._scheme = quantize_scheme(engine.model_path)
        self._seen: list[tuple[float, Sample]] = []

    @property
    def device(self) -> Device:
        return self.engine.device or select_device(self._experiment.device, self._experiment.device_id)

    @property
    def identity(self) -> Identity:
        return self.engine.identity

    def open(self) -> None:
        self.engine.load_model()

    def close(self) -> None:
        self.engine.close()

    def run(self, requests: Sequence[Request], concurrency: int, on_done: OnDone | None = None) -> list[RequestRecord]:
        dispatcher = Dispatcher(requests, concurrency, time.perf_counter())
        in_flight: dict[int, Request] = {}
        records: list[RequestRecord] = []
        recorder = Recorder[Sample]()
        self._seen = recorder.taken
        try:
            while dispatcher.left:
                for request, arrival_s in dispatcher.due(time.perf_counter()):
                    sampling = SamplingParams(max_new_tokens=request.num_output_tokens, ignore_eos=True)
                    ids = list(request.prompt_token_ids)
                    in_flight[self.engine.add_request(ids, sampling, arrival_s=arrival_s)] = request
                if not in_flight:
                    time.sleep(dispatcher.wait_s(time.perf_counter()) or 0)
                    continue
                for output in self.engine.step():  # which numbers requests over its life
                    request = in_flight.pop(output.index)
                    record = record_from_output(output, num_asked_tokens=request.num_output_tokens)
                    records.append(replace(record, index=request.index))
                    dispatcher.ended(request.index, time.perf_counter())
                if recorder.is_due:
                    recorder.add(self._look(len(in_flight)))
                if on_done:
                    on_done(len(records))
                if in_flight and not self.engine.has_unfinished:
                    raise RuntimeError(
                        f"the engine lost {len(in_flight)} requests: it has none left but did not return them"
                    )
        except BaseException:
            for index in in_flight:  # whatever state the engine is in
                with contextlib.suppress(Exception):
                    self.engine.cancel(index)
            raise
        return records

    def observed(self) -> Observed:
        samples = [{"time_s": time_s, **seen} for time_s, seen in self._seen]
        return Observed(columns_of(samples), samples)

    def variant(self) -> dict[str, Any]:
        switches = {switch: getattr(self._experiment, switch) for switch in (*SWITCHES, *OPTIONS)}
        why = self.engine.settings.why_synchronous(self.device.kind)
        switches |= {"plain_ops": self._experiment.plain_operators}
        switches |= {"async_scheduling": "on" if why is None else f"off: {why}"}
        return {"precision": self._experiment.precision, "quantize": self._scheme, **switches}

    def stats(self) -> dict[str, Any]:
        return self.engine.stats()

    def pids(self) -> Sequence[int] | None:
        replicas = self.stats().get("replicas", [])
        return [pid for row in replicas for pid in row["pids"]] if are_here(replicas) else None

    def weight_bytes(self) -> int:
        return int(self.engine.stats()["weight_bytes"])

    def _look(self, in_flight: int) -> Sample:
        stats = self.engine.stats()
        running, replicas = stats.get("running", in_flight), stats.get("replicas")
        memory = sum(row["memory_bytes"] for row in replicas) if replicas else self.device.memory_in_use_bytes()
        sample = {"running": running, "waiting": max(0, in_flight - running), "memory_bytes": memory}
        if stats.get("kv_blocks_total"):
            sample["kv_use"] = 1 - stats["kv_blocks_free"] / stats["kv_blocks_total"]
        return sample


class BackendElsewhere(Uncounted):
    """The uncounted `Backend` that `make(*arguments)` gives, in a process of its own.

    `close` ends it, `open` starts another. Times of the two processes are on one clock: Linux counts CLOCK_MONOTONIC
    for the whole machine.
    """

    name: str
    config: ModelConfig
    max_seq_length: int
    launches_per_layer: int | None
    identity: Identity

    def __init__(self, make: Callable[..., Backend], *arguments: Any) -> None:
        self._make, self._there = (make, *arguments), None
        self._start()

    def _start(self) -> Elsewhere:
        if self._there is None:
            there = self._there = Elsewhere(*self._make)
            for name in BackendElsewhere.__annotations__:
                setattr(self, name, there.get(name))
            facts = [there.get(f"device.{name}") for name in ("name", "kind", "peak", "total_memory_bytes")]
            self.device = DistantMachine(*facts, call=there.call)
        return self._there

    def open(self) -> None:
        self._start().call("open")

    def close(self) -> None:
        if self._there is not None:
            self._there.end()
            self._there = None

    def run(self, requests: Sequence[Request], concurrency: int, on_done: OnDone | None = None) -> list[RequestRecord]:
        return self._start().call("run", requests, concurrency, on_done=on_done)

    def variant(self) -> dict[str, Any]:
        return self._start().call("variant")

    def weight_bytes(self) -> int:
        return self._start().call("weight_bytes")


def watched_cards(backend: Backend, experiment: Experiment) -> list[int]:
    """The cards that a backend computes on, as their maker's tool numbers them; empty where they are elsewhere."""
    kind, first = backend.device.kind, resolve_device(experiment.device, experiment.device_id)[1]
    replicas = backend.stats().get("replicas", [])
    if not are_here(replicas):
        return []
    if backend.cards > 1 and replicas:  # Ray has given them out by the tool's numbers
        return sorted({int(name.split()[-1]) for row in replicas for name in row["card_names"]})
    return physical_cards(kind, range(first, first + backend.cards), os.environ)


def are_here(replicas: Sequence[dict[str, Any]]) -> bool:
    """Whether every process of the replicas, as `stats` gives them, is on this machine."""
    return not {host for row in replicas for host in row["hosts"]} - {own_address(), "127.0.0.1"}


def quantize_scheme(folder: str | Path) -> str:
    """How the linears of a checkpoint are stored: none, w8a8, w8a16 or mixed; read from it, not from the wish."""
    return open_checkpoint(folder).quantization.summary


def reckon_weight_bytes(config: ModelConfig, precision: str, scheme: str) -> int:
    """Bytes of the stored weights by arithmetic on the model's shape; a mix counts as w8a8."""
    schemes = uniform_schemes(config, "w8a8" if scheme == "mixed" else scheme, ["lm_head"])
    return weight_bytes(config, schemes, DTYPES[precision].itemsize).stored
