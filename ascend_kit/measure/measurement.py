"""One point of a sweep on one backend: warm up, run the requests, keep raw times, card loads and the row."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ascend_kit.measure import metrics
from ascend_kit.measure.backends import Backend
from ascend_kit.measure.expectation import Point, PointCosts
from ascend_kit.measure.load import LoadMeter
from ascend_kit.measure.metrics import Limits, RequestRecord
from ascend_kit.measure.workload import Request, make_requests
from ascend_kit.params import ENGINE_SWITCHES

if TYPE_CHECKING:
    from ascend_kit.params import Experiment
    from ascend_kit.results import RunFolder

Progress = Callable[[float, int, str], None]
# What makes two rows measurements of the same thing. A resumed sweep skips a point whose key has an ok row.
KEY = (
    "backend",
    "device",
    "model",
    *ENGINE_SWITCHES,
    "slots",
    "concurrency",
    "prompt_len",
    "output_len",
    "num_requests",
    "seed",
    "repeat",
)
_WARM_UP_TOKENS = 4
_WARM_UP_SEED = 2**31
_writing = threading.Lock()  # points measured at the same time write to the same tables


class Measurement:
    """One backend's points: what stays the same from one to the next. Rows of several threads are written in turn."""

    def __init__(self, backend: Backend, experiment: Experiment, folder: RunFolder, ceilings: dict[str, Any]) -> None:
        self.backend, self.experiment, self.folder = backend, experiment, folder
        self.is_stopped = False  # its engine was closed: what fails from now on is no result
        self.limits = Limits(experiment.ttft_limit_ms, experiment.tpot_limit_ms)
        self.variant = backend.variant()
        self.weight_bytes = backend.weight_bytes()
        self.costs = PointCosts(backend, ceilings)
        self._warm: set[tuple[int, int]] = set()

    def facts(self, point: Point) -> dict[str, Any]:
        """What is known of a point before measuring: its key and its ceilings."""
        experiment, backend = self.experiment, self.backend
        return {
            "backend": backend.name,
            "device": backend.device.name,
            "device_kind": backend.device.kind,
            "model": experiment.model_name,
            **self.variant,
            "cards": backend.cards,
            "tensor_parallel": backend.cards // backend.replicas,
            "num_devices": backend.num_devices,
            "slots": backend.slots,
            **asdict(point),
            "seed": experiment.seed,
            "weight_bytes": self.weight_bytes,
            **self.costs.ceilings(point),
        }

    def key(self, point: Point) -> tuple:
        """What a resumed sweep compares with the rows that are there."""
        facts = self.facts(point)
        return tuple(facts[name] for name in KEY)

    def measure(
        self, point: Point, notes: dict[str, Any], *, on_share: Callable[[float], None] | None = None
    ) -> tuple[bool, str]:
        """Run one point and append its rows, `notes` as they are at its end among them; whether it worked, and a few
        words on it.

        `on_share(share)` is told about once a second how much of the point is done, 0..1.
        """
        start, ids = time.perf_counter(), {"point_id": uuid.uuid4().hex[:12]}
        try:
            self._warm_up(point)
            row = self._measured(point, ids, on_share)
        except Exception as error:  # any failure of a point is a result; the next point may work
            return False, self.fail(point, {**ids, **notes}, error)
        self._append("rows", {**ids, **notes, **self.facts(point), **row, "measured_in_s": time.perf_counter() - start})
        return True, f"{row['output_tokens_per_s']:.1f} output tokens/s"

    def fail(self, point: Point, notes: dict[str, Any], error: BaseException) -> str:
        """Keep a row for a point that could not be measured; a few words on it."""
        text = f"{type(error).__name__}: {error}"
        if not self.is_stopped:
            self._append("rows", {**notes, **self.facts(point), "status": "failed", "error": text})
        return f"failed: {text}"

    def _append(self, table: str, *rows: dict[str, Any]) -> None:
        with _writing:
            self.folder.append_all(table, rows)

    def _measured(self, point: Point, ids: dict[str, str], on_share: Callable[[float], None] | None) -> dict[str, Any]:
        requests = self._requests(point, point.num_requests, point.output_len, point.repeat)
        device = self.backend.device
        device.synchronize()
        load = LoadMeter(self.backend)
        records = self.backend.run(requests, point.concurrency, on_done=_Seconds(len(requests), on_share))
        cards = load.rows()
        # Before the row: a row without its raw samples would be worse than the reverse.
        self._append("requests", *({**ids, **record.to_row()} for record in records))
        self._append("cards", *({**ids, **row} for row in cards))
        check_complete(requests, records)
        summary = metrics.summarize(records, limits=self.limits)
        return {
            **summary,
            **self.costs.utilisation(point, records, summary),
            "peak_memory_bytes": device.peak_memory_bytes(),
        }

    def _warm_up(self, point: Point) -> None:
        """A short run of the same shape, once: first calls load kernels, capture graphs and grow pools."""
        shape = (point.concurrency, point.prompt_len)
        if shape in self._warm:
            return
        count = min(point.concurrency, point.num_requests)
        requests = self._requests(point, count, min(_WARM_UP_TOKENS, point.output_len), _WARM_UP_SEED)
        self.backend.run(requests, point.concurrency)
        self._warm.add(shape)

    def _requests(self, point: Point, count: int, output_len: int, salt: int) -> list[Request]:
        config = self.backend.config
        # The point is part of the seed: no prompt returns within a sweep, so no cache can serve it.
        seed = (self.experiment.seed, point.concurrency, point.prompt_len, point.output_len, salt)
        return make_requests(
            count,
            point.prompt_len,
            output_len,
            vocab_size=config.vocab_size,
            seed=seed,
            avoid_ids=getattr(config, "eos_token_ids", ()),
        )


def check_complete(requests: Sequence[Request], records: Sequence[RequestRecord]) -> None:
    """Raise RuntimeError unless every request came back, without error, with exactly the tokens asked for."""
    asked = {request.index: request.num_output_tokens for request in requests}
    missing = asked.keys() - {record.index for record in records}
    failed = [record for record in records if not record.is_complete]
    wrong = [r for r in records if r.is_complete and r.num_output_tokens != asked.get(r.index)]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(asked)} requests failed; the first: {failed[0].error}")
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(asked)} requests never came back")
    if wrong:
        first = wrong[0]
        raise RuntimeError(
            f"{len(wrong)} of {len(asked)} requests have a wrong length; request {first.index} was "
            f"asked for {asked.get(first.index)} tokens and gave {first.num_output_tokens}"
        )


class _Seconds:
    """Passes on how many requests are done, about once a second: more would cost the measurement time."""

    def __init__(self, total: int, tell: Callable[[float], None] | None) -> None:
        self.total, self.tell, self.last_s = total, tell, time.perf_counter()

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if self.tell is not None and now - self.last_s >= 1.0:
            self.last_s = now
            self.tell(done / self.total)
