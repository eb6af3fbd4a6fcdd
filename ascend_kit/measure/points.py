"""One point of a sweep: what the ceilings allow there, and how it is measured on an engine."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from typing import TYPE_CHECKING, Any

from ascend_kit.checkpoint.huggingface import load_tokenizer
from ascend_kit.device.meters import PowerMeter, ProcessorMeter
from ascend_kit.engine.opened_model import CardMeter
from ascend_kit.measure import metrics
from ascend_kit.measure.engines import Backend, watched_cards
from ascend_kit.measure.forecast import Card, Deployment, request_flops
from ascend_kit.measure.loads import build
from ascend_kit.measure.metrics import RequestRecord
from ascend_kit.measure.planner import forecast
from ascend_kit.measure.rows import DEFAULTS, KEY, Point, key_of
from ascend_kit.measure.workload import Request, make_requests
from ascend_kit.results import newest_rows

if TYPE_CHECKING:
    from ascend_kit.engine.text import Tokenizer
    from ascend_kit.params import Experiment
    from ascend_kit.results import RunFolder

_WARM_UP_TOKENS = 4
_WARM_UP_SEED = 2**31


class PointForecast:
    """Floors of an engine's model on a machine, a prediction, and how near a measurement came to them.

    Floors use the measured `ceilings`, predictions the nominal peaks of the card where it is known. Everything is None
    where the ceiling of the precision was not measured.
    """

    def __init__(self, backend: Backend, stored_bytes: int | None, ceilings: dict[str, Any]) -> None:
        """`stored_bytes` of the weights of one replica; None: by arithmetic on the model's shape."""
        self.slots, self.replicas = backend.slots, backend.replicas
        variant, device = backend.variant(), backend.device
        self.measured: Deployment | None = None
        self.expected: Deployment | None = None
        precision = variant["precision"]
        if ceilings.get(f"{precision}_flops_per_s") is None:
            return
        card = Card.from_ceilings(ceilings, memory_bytes=device.total_memory_bytes, precision=precision)
        settings = {
            "tp_size": max(1, backend.num_devices // backend.replicas),
            "card_share": min(1.0, backend.num_devices / backend.replicas),
            "launches_per_layer": backend.launches_per_layer,
            "graph_mode": bool(variant["graph_mode"]),  # None: a server does not tell
            "kv_cache_dtype": variant.get("kv_cache_dtype", "auto"),
            "speculate": variant.get("speculate", 0),
            "async_scheduling": variant.get("async_scheduling") == "on",
            "graph_prompt_tokens": variant.get("graph_prompt_tokens", 0),
            "stored_bytes": stored_bytes,
        }
        self.measured = Deployment(backend.config, card, precision, variant["quantize"], **settings)
        if device.kind != "cpu" or backend.replicas == 1:  # how replicas share one CPU is not modelled
            nominal = Card(device.peak) if device.peak is not None else card
            self.expected = Deployment(backend.config, nominal, precision, variant["quantize"], **settings)

    def batch(self, point: Point) -> int:
        """Requests that one step can serve, over all replicas."""
        return min(point.concurrency, self.slots or point.concurrency, point.num_requests)

    def limits(self, point: Point) -> dict[str, Any]:
        """Columns of a row that are known before it is measured."""
        lengths = (point.prompt_len, point.output_len, self.batch(point))
        floor = forecast(self.measured, self.replicas, *lengths) if self.measured else {}
        expected = forecast(self.expected, self.replicas, *lengths) if self.expected else {}
        return {
            "kv_bytes_per_token": self.measured and self.measured.kv_token_bytes,
            "step_weight_bytes": self.measured and self.measured.weights.per_step,
            "decode_floor_ms": floor.get("decode_floor_ms"),
            "prefill_floor_ms": floor.get("prefill_floor_ms"),
            "ceiling_tokens_per_s": floor.get("ceiling_tokens_per_s"),
            "predicted_tokens_per_s": expected.get("output_tokens_per_s"),
        }

    def utilisation(
        self, point: Point, records: Sequence[RequestRecord], summary: dict[str, Any]
    ) -> dict[str, float | None]:
        """`mfu` of the point, `mbu` of its median decode step, `ceiling_share` of the ceiling; all 0..1."""
        if self.measured is None:
            return dict.fromkeys(("mfu", "mbu", "ceiling_share"))
        group, batch = self.measured, self.batch(point)
        limit = group.limit(group.card_share * self.replicas)
        context = point.prompt_len + point.output_len / 2
        weights = group.weights.per_step * min(self.replicas, batch)
        step_bytes = weights + group.kv_token_bytes * batch * context
        rate, ceiling = summary["output_tokens_per_s"], self.limits(point)["ceiling_tokens_per_s"]
        return {
            "mfu": metrics.utilisation(request_flops(group.config, records), summary["wall_s"], limit.flops_per_s),
            "mbu": metrics.utilisation(step_bytes, (summary["itl_p50_ms"] or 0.0) / 1e3, limit.bytes_per_s),
            "ceiling_share": rate / ceiling if rate and ceiling else None,
        }


class PointRunner:
    """Measures points on one engine, which is opened when there is something to measure, and afresh after a failure."""

    def __init__(
        self,
        backend: Backend,
        experiment: Experiment,
        folder: RunFolder,
        ceilings: dict[str, Any],
        settings: dict[str, Any] | None = None,
    ) -> None:
        """`settings` are the engine parameters that the sweep varies, as they are here: columns of the rows."""
        self.backend, self.experiment, self.folder, self.ceilings = backend, experiment, folder, ceilings
        self.identity, self.settings = backend.identity, settings or {}
        self._encoder: Tokenizer | None = None
        self._warm: set[tuple[int, int]] = set()
        self._forecast: PointForecast | None = None
        self._processors: ProcessorMeter | None = None  # the last one: short repeats are counted together
        self._load_error: Exception | None = None  # an engine that cannot be loaded is not tried for every point

    def run(self, points: Sequence[Point], on_progress: Callable[[float, str], None]) -> None:
        """Measure every point without a good row of this identity. `on_progress(points done, text)` is called after
        each and about once a second meanwhile."""
        rows = self.folder.rows_of("rows", self.identity)
        done = {key_of(row) for row in rows if row["status"] == "ok"}
        for number, point in enumerate(points):
            name = f"{self.backend.name}: {point}"
            text = "already done"
            if astuple(point) not in done:
                text = self.measure(point, lambda share, n=number, name=name: on_progress(n + share, name))
            on_progress(number + 1, f"{name}: {text}")

    def measured(self, points: Sequence[Point]) -> dict[Point, dict[str, Any]]:
        """The newest row of each point that has one."""
        rows = ({**DEFAULTS, **row} for row in self.folder.rows_of("rows", self.identity))
        found = newest_rows(rows, KEY)
        return {point: found[astuple(point)] for point in points if astuple(point) in found}

    def write_pruned(self, reasons: dict[Point, str]) -> None:
        """A row for each point that cannot be measured, unless it has one."""
        known = self.measured(list(reasons))
        rows = [{**self._facts(p), "status": "pruned", "error": text} for p, text in reasons.items() if p not in known]
        self._append("rows", rows)

    def measure(self, point: Point, on_share: Callable[[float], None] | None = None) -> str:
        """Run one point and append its rows; a few words on how it went. Any failure is a row, and the engine is given
        up: the next point opens a new one."""
        start, ids = time.perf_counter(), {"point_id": uuid.uuid4().hex[:12]}
        try:
            known = self._open()
            opened = time.perf_counter()
            self._warm_up(point)
            first = {"open_s": opened - start, "warm_up_s": time.perf_counter() - opened}
            row = {**self._measured(point, known, ids, on_share), **first}
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self._append("rows", [{**ids, **self._facts(point), "status": "failed", "error": text}])
            self._warm.clear()
            self._processors = None
            with contextlib.suppress(Exception):
                self.backend.close()
            return f"failed: {text}"
        seconds = time.perf_counter() - start
        self._append("rows", [{**ids, **self._facts(point), **row, "measured_in_s": seconds}])
        return f"{row['output_tokens_per_s']:.1f} output tokens/s"

    def _open(self) -> PointForecast:
        if self._load_error is not None:
            raise self._load_error
        try:
            self.backend.open()
        except Exception as error:
            self._load_error = error
            raise
        self._forecast = PointForecast(self.backend, self.backend.weight_bytes(), self.ceilings)
        return self._forecast

    def _facts(self, point: Point) -> dict[str, Any]:
        """The engine, the point and, once the engine was open, what is possible there."""
        backend, known = self.backend, self._forecast
        return {
            "backend": backend.name,
            "device": backend.device.name,
            "device_kind": backend.device.kind,
            "task_queue_level": backend.device.task_queue_level(),
            "model": self.experiment.model_name,
            **self.settings,
            **backend.variant(),
            "cards": backend.cards,
            "tensor_parallel": backend.cards // backend.replicas,
            "num_devices": backend.num_devices,
            "slots": backend.slots,
            **asdict(point),
            **({} if known is None else known.limits(point)),
        }

    def _measured(
        self, point: Point, known: PointForecast, ids: dict[str, str], on_share: Callable[[float], None] | None
    ) -> dict[str, Any]:
        requests = self._requests(point, point.repeat)
        device = self.backend.device
        device.synchronize()
        before, meter = self.backend.stats(), CardMeter(self.backend)
        watched = PowerMeter(device.kind, watched_cards(self.backend, self.experiment))
        self._processors = ProcessorMeter(self.backend.pids(), self._processors)
        with self._processors as processors, watched as power:
            records = self.backend.run(requests, point.concurrency, on_done=_Seconds(len(requests), on_share))
        cards, observed = meter.rows(), self.backend.observed()
        # Before the row: a row without its raw samples would be worse than the reverse.
        self._append("requests", [{**ids, **record.to_row()} for record in records])
        self._append("cards", [{**ids, **row} for row in cards])
        self._append("samples", [{**ids, **sample} for sample in observed.samples])
        check_complete(requests, records, is_exact=self.backend.is_exact)
        summary = metrics.summarize(records, limits=point.limits)
        return {
            **summary,
            "tokens_per_step": tokens_per_step(before, self.backend.stats()),
            **observed.columns,
            **known.utilisation(point, records, summary),
            "weight_bytes": self.backend.weight_bytes(),
            "peak_memory_bytes": device.peak_memory_bytes(),
            **power.columns(sum(record.num_output_tokens for record in records)),
            **processors.columns(),
        }

    def _append(self, table: str, rows: list[dict[str, Any]]) -> None:
        self.folder.append_all(table, rows, self.identity)

    def _warm_up(self, point: Point) -> None:
        """A short run of the same shape, once: first calls load kernels, capture graphs and grow pools."""
        shape = (point.concurrency, point.prompt_len)
        if shape in self._warm:
            return
        requests = self._requests(point, _WARM_UP_SEED)
        check_complete(requests, self.backend.run(requests, point.concurrency), is_exact=False)
        self._warm.add(shape)

    def _requests(self, point: Point, salt: int) -> list[Request]:
        config, experiment = self.backend.config, self.experiment
        # The point is part of the seed: no prompt returns within a sweep, so no cache can serve it.
        seed = (point.seed, point.concurrency, point.prompt_len, point.output_len, round((point.rate or 0) * 1e6), salt)
        given = {"vocab_size": config.vocab_size, "seed": seed, "avoid_ids": config.eos_token_ids}
        if salt == _WARM_UP_SEED:
            count, output_len = min(point.concurrency, point.num_requests), min(_WARM_UP_TOKENS, point.output_len)
            return make_requests(count, point.prompt_len, output_len, **given)
        if experiment.load_prompts and self._encoder is None:
            self._encoder = load_tokenizer(experiment.tokenizer_path or experiment.input_model)
        file = experiment.trace_file if point.load == "trace" else experiment.load_prompts
        longest = min(self.backend.max_seq_length, experiment.max_seq_length)
        return build(point, **given, max_total_len=longest, file=file, tokenizer=self._encoder)


def tokens_per_step(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """New tokens of a sequence in each of its decode steps between two `stats`: 1 without guesses; None if unknown."""
    decodes, tokens = (after.get(name, 0) - before.get(name, 0) for name in ("decodes", "decoded_tokens"))
    return tokens / decodes if decodes else None


def check_complete(requests: Sequence[Request], records: Sequence[RequestRecord], *, is_exact: bool = True) -> None:
    """Raise RuntimeError unless every request came back, without error, where `is_exact` with just the tokens asked."""
    asked = {request.index: request.num_output_tokens for request in requests}
    missing = asked.keys() - {record.index for record in records}
    failed = [record for record in records if not record.is_complete]
    wrong = [r for r in records if is_exact and r.is_complete and r.num_output_tokens != asked.get(r.index)]
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
