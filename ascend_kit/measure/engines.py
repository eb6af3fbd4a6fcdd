"""What a sweep drives, under one interface: the same requests go in, records with real timestamps come out.

`EngineBackend` is ours; `TransformersBackend` is the baseline users would pick; `VllmBackend` is for hosts that have
vLLM installed (on Ascend: vllm with vllm-ascend). Engines of other kinds have their home here. All of them run a closed
loop: `concurrency` requests are in flight, and a request arrives when a place is free.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ascend_kit.checkpoint.huggingface import open_checkpoint
from ascend_kit.checkpoint.identity import model_identity
from ascend_kit.device.device import Device, select_device
from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.engine.sequence import RequestOutput, SamplingParams
from ascend_kit.identity import Identity
from ascend_kit.measure.metrics import RequestRecord, record_from_output
from ascend_kit.measure.workload import Request
from ascend_kit.model.config import DTYPES, ModelConfig
from ascend_kit.model.tensors import uniform_schemes, weight_bytes

if TYPE_CHECKING:
    import torch
    from transformers.generation.streamers import BaseStreamer

    from ascend_kit.params import Experiment

OnDone = Callable[[int], None]
SWITCHES = ("graph_mode", "operator_fusion", "memory_optimize")


@runtime_checkable
class Backend(Protocol):
    """An engine as a sweep sees it. What it is made of is known before `open`; only then does it hold a model."""

    name: str
    config: ModelConfig  # of the weights in use
    max_seq_length: int
    slots: int | None  # requests computed together; None: as many as are in flight
    cards: int  # as the user counts them, processes on a CPU too
    num_devices: int  # whose ceilings add up; a CPU is one, however many processes share it
    replicas: int  # copies of the weights, each read by its own steps
    launches_per_layer: int | None  # operators a decode step queues per layer; None: those of our fused path

    @property
    def device(self) -> Device:
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
        """Serve all requests in a closed loop; one record each, in the order they ended. `on_done(count)` is called
        with the number that have ended, while others run. A failure leaves no request behind."""
        ...

    def stats(self) -> dict[str, Any]:
        """Counters and, under `replicas`, a row for each, as the engine's `stats` gives them; {} without such."""
        ...

    def variant(self) -> dict[str, Any]:
        """Switches that tell this configuration from another, as plain values for a row."""
        ...

    def weight_bytes(self) -> int:
        """Bytes of the weights as stored, one replica (all its ranks together); the model is open."""
        ...


class EngineBackend:
    """Our engine, driven through add_request and step."""

    name = "ascend_kit"
    launches_per_layer: int | None = None

    def __init__(self, engine: AscendInferEngine, experiment: Experiment) -> None:
        self.engine, self._experiment = engine, experiment
        self.config, self.max_seq_length = engine.config, engine.max_seq_length
        self.cards, self.replicas = experiment.cards, experiment.replicas
        self.slots: int | None = experiment.batch_size * self.replicas
        self.num_devices = 1 if self.device.kind == "cpu" else self.cards
        self._scheme = quantize_scheme(engine.model_path)

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
        waiting, in_flight = deque(requests), {}
        records: list[RequestRecord] = []
        try:
            while waiting or in_flight:
                while waiting and len(in_flight) < concurrency:
                    request = waiting.popleft()
                    in_flight[self._add(request)] = request
                for output in self.engine.step():
                    records.append(_renumber(output, in_flight.pop(output.index)))
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

    def variant(self) -> dict[str, Any]:
        switches = {switch: getattr(self._experiment, switch) for switch in SWITCHES}
        return {"precision": self._experiment.precision, "quantize": self._scheme, **switches}

    def stats(self) -> dict[str, Any]:
        return self.engine.stats()

    def weight_bytes(self) -> int:
        return int(self.engine.stats()["weight_bytes"])

    def _add(self, request: Request) -> int:
        sampling = SamplingParams(max_new_tokens=request.num_output_tokens, ignore_eos=True)
        return self.engine.add_request(list(request.prompt_token_ids), sampling, arrival_s=time.perf_counter())


class TransformersBackend:
    """transformers' `generate`, used as well as it can be without a scheduler of its own.

    Static batches of up to `concurrency`, left-padded to the longest prompt of the batch, sdpa attention,
    inference_mode, no end-of-text check, the dtype and device of the engine it is compared with. A request
    arrives when its batch starts: the whole batch must end before a place is free. Token times come from a
    streamer that `generate` calls after every step with the new tokens on the host, so they are real.
    """

    name = "transformers"
    slots: int | None = None
    cards = num_devices = replicas = 1
    launches_per_layer: int | None = 55  # counted for eager Qwen3 in transformers 5

    def __init__(self, model_path: str | Path, *, device: Device, precision: str = "bf16", max_seq_length: int = 8192):
        if precision not in DTYPES:
            raise ValueError(f"precision is {precision!r}; allowed: {', '.join(DTYPES)}")
        self.model_path, self.config = str(model_path), ModelConfig.from_folder(model_path)
        self.device, self.precision, self.max_seq_length = device, precision, max_seq_length
        self._pad_id = self.config.pad_token_id if self.config.pad_token_id is not None else 0
        self._model: Any = None  # of a class that transformers chooses

    @property
    def identity(self) -> Identity:
        engine = {"kind": self.name, "precision": self.precision, "attention": "sdpa"}
        return _identity(self.model_path, self.device, engine, "transformers")

    def open(self) -> None:
        if self._model is not None:
            return
        from transformers import AutoModelForCausalLM, GenerationConfig

        model: Any = AutoModelForCausalLM.from_pretrained(
            self.model_path,
            dtype=DTYPES[self.precision],
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
        )
        self._model = model.to(self.device.torch_device).eval()
        self.device.assert_on_device(self._model)
        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=self._pad_id)

    def close(self) -> None:
        self._model = None
        if self.device.kind != "cpu":
            self.device.backend.empty_cache()

    def run(self, requests: Sequence[Request], concurrency: int, on_done: OnDone | None = None) -> list[RequestRecord]:
        self.open()
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

    def _batch(self, batch: Sequence[Request]) -> list[RequestRecord]:
        import torch

        self.device.synchronize()
        arrival = time.perf_counter()
        ids, mask = self._left_padded(batch)
        times_s: list[float] = []
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                streamer=_token_clock(times_s),
                max_new_tokens=max(r.num_output_tokens for r in batch),
            )
        made = out.shape[1] - ids.shape[1]
        return [_record(r, arrival, times_s[: min(r.num_output_tokens, made)]) for r in batch]

    def _left_padded(self, batch: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
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
    launches_per_layer: int | None = None

    def __init__(self, model_path: str | Path, *, device: Device, experiment: Experiment, **options: Any) -> None:
        try:
            self._vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise ValueError(
                "backend vllm was asked for, but vllm is not installed here; install it (on Ascend with "
                "vllm-ascend) in an environment of its own, or leave this backend out"
            ) from error
        self._engine: Any = None
        self.model_path, self.config, self.device = str(model_path), ModelConfig.from_folder(model_path), device
        self._scheme = quantize_scheme(model_path)
        self.max_seq_length = experiment.max_seq_length
        self.slots: int | None = experiment.batch_size
        self.cards = self.num_devices = experiment.tensor_parallel
        self.precision = experiment.precision
        self._settings = {
            "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[experiment.precision],
            "max_model_len": experiment.max_seq_length,
            "max_num_seqs": experiment.batch_size,
            "tensor_parallel_size": experiment.tensor_parallel,
            "seed": experiment.seed,
            "enable_prefix_caching": False,
            **options,
        }

    @property
    def identity(self) -> Identity:
        return _identity(self.model_path, self.device, {"kind": self.name, **self._settings}, "vllm")

    def open(self) -> None:
        if self._engine is None:
            arguments = self._vllm.EngineArgs(model=self.model_path, **self._settings)
            self._engine = self._vllm.LLMEngine.from_engine_args(arguments)

    def close(self) -> None:
        self._engine = None

    def run(self, requests: Sequence[Request], concurrency: int, on_done: OnDone | None = None) -> list[RequestRecord]:
        self.open()
        waiting, running = deque(requests), {}
        records: list[RequestRecord] = []
        try:
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
        except BaseException:
            with contextlib.suppress(Exception):
                self._engine.abort_request(list(running))
            raise
        return records

    def stats(self) -> dict[str, Any]:
        return {}

    def variant(self) -> dict[str, Any]:
        switches = {**dict.fromkeys(SWITCHES, True), "graph_mode": not self._settings.get("enforce_eager", False)}
        return {"precision": self.precision, "quantize": self._scheme, **switches}

    def weight_bytes(self) -> int:
        return reckon_weight_bytes(self.config, self.precision, self._scheme)  # vLLM does not report it

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


def as_backend(engine: AscendInferEngine | Backend, experiment: Experiment) -> Backend:
    """A `Backend` as it is; our engine, loaded or not, wrapped in one."""
    if isinstance(engine, Backend):
        return engine
    return EngineBackend(engine, experiment)


def baseline_backend(experiment: Experiment, device: Device) -> TransformersBackend:
    """transformers on the experiment's source checkpoint, in the experiment's precision.

    Raises ValueError for a source that transformers cannot read (Megatron) when no plain converted copy exists.
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


def quantize_scheme(folder: str | Path) -> str:
    """How the linears of a checkpoint are stored: none, w8a8, w8a16 or mixed; read from it, not from the wish."""
    return open_checkpoint(folder).quantization.summary


def reckon_weight_bytes(config: ModelConfig, precision: str, scheme: str) -> int:
    """Bytes of the stored weights by arithmetic on the model's shape; a mix counts as w8a8."""
    schemes = uniform_schemes(config, "w8a8" if scheme == "mixed" else scheme, ["lm_head"])
    return weight_bytes(config, schemes, DTYPES[precision].itemsize).stored


def _identity(model_path: str, device: Device, engine: dict[str, Any], package: str) -> Identity:
    versions = {**device.versions(), package: _version(package)}
    return model_identity(model_path).with_parts(engine=engine, versions=versions, device=device.facts())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _renumber(output: RequestOutput, request: Request) -> RequestRecord:
    """The engine numbers requests over its life; a record carries the number within its workload."""
    return replace(record_from_output(output, num_asked_tokens=request.num_output_tokens), index=request.index)


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


def _token_clock(times_s: list[float]) -> BaseStreamer:
    """A streamer for `generate` that adds the time of every step; its first call carries the prompt."""
    from transformers.generation.streamers import BaseStreamer

    class TokenClock(BaseStreamer):
        has_prompt = False

        def put(self, value: Any) -> None:
            if self.has_prompt:
                times_s.append(time.perf_counter())
            self.has_prompt = True

        def end(self) -> None:
            """Nothing is held back."""

    return TokenClock()
