"""Engines under one interface: the same requests go in, records with real timestamps come out.

`EngineBackend` is ours; `TransformersBackend` is the baseline users would pick; `VllmBackend` is for hosts
that have vLLM installed (on Ascend: vllm with vllm-ascend). All of them run a closed loop: `concurrency`
requests are in flight, and a request arrives when a place is free.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ascend_kit.measure import costs
from ascend_kit.measure.metrics import RequestRecord, record_from_output
from ascend_kit.measure.workload import Request

if TYPE_CHECKING:
    from ascend_kit.device.device import Device
    from ascend_kit.params import Experiment

OnDone = Callable[[int], None]
SWITCHES = ("graph_mode", "operator_fusion", "memory_optimize")


class Backend(Protocol):
    """What a sweep needs of an engine."""

    name: str
    config: Any  # ModelConfig of the weights in use
    device: Device
    max_seq_length: int
    slots: int | None  # requests computed together; None: as many as are in flight
    cards: int  # as the user counts them, processes on a CPU too
    num_devices: int  # whose ceilings add up; a CPU is one, however many processes share it
    replicas: int  # copies of the weights, each read by its own steps
    launches_per_layer: int | None  # operators a decode step queues per layer; None: those of our fused path

    def run(self, requests: Sequence[Request], concurrency: int, on_done: OnDone | None = None) -> list[RequestRecord]:
        """Serve all requests in a closed loop; one record each, in the order they ended. `on_done(count)` is called
        with the number that have ended, while others run."""

    def stats(self) -> dict[str, Any]:
        """Counters and, under `replicas`, a row for each, as the engine's `stats` gives them; {} without such."""

    def variant(self) -> dict[str, Any]:
        """Switches that tell this backend's configuration from another, as plain values for a row."""

    def weight_bytes(self) -> int:
        """Bytes of the weights as stored, one replica (all its ranks together)."""

    def close(self) -> None:
        """Give the device's memory back."""


class EngineBackend:
    """Our engine, driven through add_request and step."""

    name = "ascend_kit"
    launches_per_layer = None

    def __init__(self, engine: Any, experiment: Experiment) -> None:
        self.engine = engine
        self._experiment = experiment
        self.config, self.device = engine.config, engine.device
        self.replicas = experiment.replicas
        self._scheme = quantize_scheme(engine.model_path)
        self.max_seq_length, self.slots = engine.max_seq_length, experiment.batch_size * self.replicas
        self.cards = experiment.cards
        self.num_devices = 1 if self.device.kind == "cpu" else experiment.cards

    def run(self, requests: Sequence[Request], concurrency: int, on_done: OnDone | None = None) -> list[RequestRecord]:
        waiting, in_flight = deque(requests), {}
        records: list[RequestRecord] = []
        try:
            while waiting or in_flight:
                while waiting and len(in_flight) < concurrency:
                    request = waiting.popleft()
                    in_flight[self._add(request)] = request
                for output in self.engine.step():
                    request = in_flight.pop(output.index)
                    records.append(_renumber(output, request))
                if on_done:
                    on_done(len(records))
                if in_flight and not self.engine.has_unfinished:
                    raise RuntimeError(
                        f"the engine lost {len(in_flight)} requests: it has none left but did not return them"
                    )
        except BaseException:
            self._cancel(in_flight)
            raise
        return records

    def variant(self) -> dict[str, Any]:
        experiment = self._experiment
        return {
            "precision": experiment.precision,
            "quantize": self._scheme,
            **{switch: getattr(experiment, switch) for switch in SWITCHES},
        }

    def stats(self) -> dict[str, Any]:
        return self.engine.stats()

    def weight_bytes(self) -> int:
        return int(self.engine.stats()["weight_bytes"])

    def close(self) -> None:
        self.engine.close()

    def _add(self, request: Request) -> int:
        from ascend_kit.engine.sequence import SamplingParams

        sampling = SamplingParams(max_new_tokens=request.num_output_tokens, ignore_eos=True)
        return self.engine.add_request(list(request.prompt_token_ids), sampling, arrival_s=time.perf_counter())

    def _cancel(self, in_flight: dict[int, Request]) -> None:
        """After a failure: leave the engine empty for the next point, whatever state it is in."""
        for index in in_flight:
            with contextlib.suppress(Exception):
                self.engine.cancel(index)


class TransformersBackend:
    """transformers' `generate`, used as well as it can be without a scheduler of its own.

    Static batches of up to `concurrency`, left-padded to the longest prompt of the batch, sdpa attention,
    inference_mode, no end-of-text check, the dtype and device of the engine it is compared with. A request
    arrives when its batch starts: the whole batch must end before a place is free. Token times come from a
    streamer that `generate` calls after every step with the new tokens on the host, so they are real.
    """

    name = "transformers"
    slots = None
    cards = num_devices = replicas = 1
    launches_per_layer = 55  # counted for eager Qwen3 in transformers 5

    def __init__(self, model_path: str | Path, *, device: Device, precision: str = "bf16", max_seq_length: int = 8192):
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        from ascend_kit.model.config import ModelConfig

        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        if precision not in dtypes:
            raise ValueError(f"precision is {precision!r}; allowed: {', '.join(dtypes)}")
        self.config = ModelConfig.from_folder(model_path)
        self.device, self.precision, self.max_seq_length = device, precision, max_seq_length
        model = AutoModelForCausalLM.from_pretrained(
            str(model_path), dtype=dtypes[precision], attn_implementation="sdpa", local_files_only=True
        )
        self._model = model.to(device.torch_device).eval()
        device.assert_on_device(self._model)
        self._pad_id = self.config.pad_token_id if self.config.pad_token_id is not None else 0
        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=self._pad_id)

    def run(self, requests: Sequence[Request], concurrency: int, on_done: OnDone | None = None) -> list[RequestRecord]:
        records: list[RequestRecord] = []
        for start in range(0, len(requests), concurrency):
            records += self._batch(requests[start : start + concurrency])
            if on_done:
                on_done(len(records))
        return records

    def stats(self) -> dict[str, Any]:
        return {}

    def variant(self) -> dict[str, Any]:
        return {"precision": self.precision, "quantize": "none", **dict.fromkeys(SWITCHES, False)}

    def weight_bytes(self) -> int:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self._model.parameters()}
        return sum(storages.values())

    def close(self) -> None:
        self._model = None
        if self.device.kind != "cpu":
            self.device.backend.empty_cache()

    def _batch(self, batch: Sequence[Request]) -> list[RequestRecord]:
        import torch

        self.device.synchronize()
        arrival = time.perf_counter()
        ids, mask = self._left_padded(batch)
        clock = _token_clock()
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=mask, streamer=clock, max_new_tokens=max(r.num_output_tokens for r in batch)
            )
        made = out.shape[1] - ids.shape[1]
        return [_record(r, arrival, clock.times_s[: min(r.num_output_tokens, made)]) for r in batch]

    def _left_padded(self, batch: Sequence[Request]) -> tuple[Any, Any]:
        import torch

        longest = max(len(r.prompt_token_ids) for r in batch)
        ids = torch.full((len(batch), longest), self._pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            start = longest - len(request.prompt_token_ids)
            ids[row, start:] = torch.tensor(request.prompt_token_ids)
            mask[row, start:] = 1
        return ids.to(self.device.torch_device), mask.to(self.device.torch_device)


class VllmBackend:
    """vLLM's offline engine, where it is installed: `pip install vllm vllm-ascend` on an NPU host.

    vLLM is no dependency of this project and brings its own pins of torch and its NPU plugin: use an environment
    of its own with this package installed beside it. Prefix caching is off, as our prompts are distinct
    anyway. `options` go to `vllm.EngineArgs` (for example `enforce_eager=True`, `quantization="ascend"`).
    """

    name = "vllm"
    replicas = 1
    launches_per_layer = None

    def __init__(self, model_path: str | Path, *, device: Device, experiment: Experiment, **options: Any) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ValueError(
                "backend vllm was asked for, but vllm is not installed here; install it (on Ascend with "
                "vllm-ascend) in an environment of its own, or leave this backend out"
            ) from error
        from ascend_kit.model.config import ModelConfig

        self.config, self.device = ModelConfig.from_folder(model_path), device
        self._scheme = quantize_scheme(model_path)
        self.max_seq_length, self.slots = experiment.max_seq_length, experiment.batch_size
        self.cards = self.num_devices = experiment.tensor_parallel
        self._experiment, self._vllm = experiment, vllm
        dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[experiment.precision]
        settings = dict(
            model=str(model_path),
            dtype=dtype,
            max_model_len=experiment.max_seq_length,
            max_num_seqs=experiment.batch_size,
            tensor_parallel_size=experiment.tensor_parallel,
            seed=experiment.seed,
            enable_prefix_caching=False,
        )
        self._engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**{**settings, **options}))
        self._graph_mode = not options.get("enforce_eager", False)

    def run(self, requests: Sequence[Request], concurrency: int, on_done: OnDone | None = None) -> list[RequestRecord]:
        waiting, running = deque(requests), {}
        records: list[RequestRecord] = []
        while waiting or running:
            while waiting and len(running) < concurrency:
                request = waiting.popleft()
                running[str(request.index)] = (request, time.perf_counter(), [])
                self._add(request)
            outputs, now = self._engine.step(), time.perf_counter()
            for output in outputs:
                request, arrival, times = running[output.request_id]
                times += [now] * (len(output.outputs[0].token_ids) - len(times))
                if output.finished:
                    del running[output.request_id]
                    records.append(_record(request, arrival, times))
            if on_done:
                on_done(len(records))
        return records

    def stats(self) -> dict[str, Any]:
        return {}

    def variant(self) -> dict[str, Any]:
        return {
            "precision": self._experiment.precision,
            "quantize": self._scheme,
            "graph_mode": self._graph_mode,
            "operator_fusion": True,
            "memory_optimize": True,
        }

    def weight_bytes(self) -> int:
        """vLLM does not report it, so this is arithmetic on the model's shape; a mix counts as w8a8."""
        scheme = "w8a8" if self._scheme == "mixed" else self._scheme
        return costs.weight_bytes(self.config, self._experiment.precision, scheme).stored

    def close(self) -> None:
        self._engine = None

    def _add(self, request: Request) -> None:
        n = request.num_output_tokens
        sampling = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=n,
            min_tokens=n,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.CUMULATIVE,
        )
        prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
        self._engine.add_request(str(request.index), prompt, sampling)


def as_backend(engine: Any, experiment: Experiment) -> Backend:
    """A `Backend` as it is; an AscendInferEngine (loaded) wrapped in one."""
    return engine if hasattr(engine, "run") else EngineBackend(engine, experiment)


def quantize_scheme(folder: str | Path) -> str:
    """How the linears of a checkpoint are stored: none, w8a8, w8a16 or mixed; read from it, not from the
    wish.
    """
    from ascend_kit.checkpoint.huggingface import open_checkpoint

    return open_checkpoint(folder).quantization.summary


def _renumber(output: Any, request: Request) -> RequestRecord:
    """The engine numbers requests over its life; a record carries the number within its workload."""
    record = record_from_output(output, num_asked_tokens=request.num_output_tokens)
    return RequestRecord(**{**vars(record), "index": request.index})


def _record(request: Request, arrival: float, times: Sequence[float]) -> RequestRecord:
    return RequestRecord(
        index=request.index,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_output_tokens=len(times),
        arrival_s=arrival,
        token_times_s=tuple(times),
        finish_reason="length",
        scheduled_s=arrival,
        finished_s=times[-1] if times else None,
        num_asked_tokens=request.num_output_tokens,
    )


def _token_clock() -> Any:
    """A streamer for `generate` that notes the time of every step; its first call carries the prompt."""
    from transformers.generation.streamers import BaseStreamer

    class TokenClock(BaseStreamer):
        def __init__(self) -> None:
            self.times_s: list[float] = []
            self._has_prompt = False

        def put(self, value: Any) -> None:
            if self._has_prompt:
                self.times_s.append(time.perf_counter())
            self._has_prompt = True

        def end(self) -> None:
            """Nothing is held back."""

    return TokenClock()


def baseline_backend(experiment: Experiment, device: Device) -> TransformersBackend:
    """transformers on the experiment's source checkpoint, in the experiment's precision.

    Raises ValueError for a source that transformers cannot read (Megatron) when no plain converted copy
    exists.
    """
    folder = Path(experiment.input_model)
    if not (folder / "config.json").is_file():
        folder = experiment.converted_folder
        if experiment.quantize != "none" or not (folder / "config.json").is_file():
            raise ValueError(
                f"transformers cannot read {experiment.input_model} and there is no unquantised converted "
                "copy; convert it with quantize: none, or set sweep_baseline: false"
            )
    return TransformersBackend(
        folder, device=device, precision=experiment.precision, max_seq_length=experiment.max_seq_length
    )
