"""transformers as an engine, what users would pick without one: `generate`, and the manager of its continuous batching.

The manager is the one behind `generate_batch`, driven request by request.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ascend_kit.checkpoint.manifest import model_identity
from ascend_kit.device.device import Device
from ascend_kit.identity import Identity
from ascend_kit.measure.engines import SWITCHES, Uncounted
from ascend_kit.measure.metrics import RequestRecord
from ascend_kit.measure.workload import Dispatcher, OnDone, Request
from ascend_kit.model.config import DTYPES, ModelConfig

if TYPE_CHECKING:
    import torch
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
    from transformers.generation.continuous_batching.requests import GenerationOutput

    from ascend_kit.params import Experiment


class TransformersBackend(Uncounted):
    """transformers' `generate`, used as well as it can be without a scheduler of its own.

    Static batches of up to `concurrency`, left-padded to the longest prompt of the batch (`padding="longest"`) or to
    `max_seq_length` less the answer ("max"), sdpa attention, inference_mode, no end-of-text check, the dtype and device
    of the engine it is compared with. The whole batch must end before a place is free. Token times come from a streamer
    that `generate` calls after every step with the new tokens on the host, so they are real.
    """

    launches_per_layer: int | None = 55  # counted for eager Qwen3 in transformers 5

    def __init__(
        self,
        model_path: str | Path,
        *,
        device: Device,
        precision: str = "bf16",
        max_seq_length: int = 8192,
        padding: Literal["longest", "max"] = "longest",
        max_tokens_per_step: int | None = None,  # of continuous batching
        name: str = "transformers",
    ):
        self.model_path, self.config = str(model_path), ModelConfig.from_folder(model_path)
        self.device, self.precision, self.max_seq_length = device, precision, max_seq_length
        self.name, self.padding, self.max_tokens_per_step = name, padding, max_tokens_per_step
        self._pad_id = self.config.pad_token_id if self.config.pad_token_id is not None else 0
        self._model: Any = None  # of a class that transformers chooses

    @property
    def identity(self) -> Identity:
        engine = {"kind": "transformers", "precision": self.precision, "attention": "sdpa", "padding": self.padding}
        versions = {**self.device.versions(), "transformers": importlib.metadata.version("transformers")}
        return model_identity(self.model_path).with_parts(engine=engine, versions=versions, device=self.device.facts())

    def open(self) -> None:
        if self._model is not None:
            return
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()  # a notebook would keep its bar for ever, below the sweep's own
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
        dispatcher = Dispatcher(requests, concurrency, time.perf_counter())
        while dispatcher.left:
            batch = dispatcher.due(time.perf_counter())
            if not batch:
                time.sleep(dispatcher.wait_s(time.perf_counter()) or 0)
                continue
            records += self._batch([request for request, _ in batch], [arrival_s for _, arrival_s in batch])
            for request, _ in batch:
                dispatcher.ended(request.index, time.perf_counter())
            if on_done:
                on_done(len(records))
        return records

    def variant(self) -> dict[str, Any]:
        return {"precision": self.precision, "quantize": "none", **dict.fromkeys(SWITCHES, False)}

    def weight_bytes(self) -> int:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self._model.parameters()}
        return sum(storages.values())

    def _batch(self, batch: Sequence[Request], arrivals_s: Sequence[float]) -> list[RequestRecord]:
        import torch

        self.device.synchronize()
        start_s = time.perf_counter()
        ids, mask = self._left_padded(batch)
        clock = TokenClock()
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=mask, streamer=clock, max_new_tokens=max(r.num_output_tokens for r in batch)
            )
        made = out.shape[1] - ids.shape[1]
        return [
            replace(r.record(arrival_s, clock.times_s[1 : 1 + min(r.num_output_tokens, made)]), scheduled_s=start_s)
            for r, arrival_s in zip(batch, arrivals_s, strict=True)
        ]

    def _left_padded(self, batch: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        longest = max(len(r.prompt_token_ids) for r in batch)
        if self.padding == "max":
            longest = self.max_seq_length - max(r.num_output_tokens for r in batch)
        ids = torch.full((len(batch), longest), self._pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            start = longest - len(request.prompt_token_ids)
            ids[row, start:] = torch.tensor(request.prompt_token_ids)
            mask[row, start:] = 1
        return ids.to(self.device.torch_device), mask.to(self.device.torch_device)


def source_of(experiment: Experiment) -> Path:
    """The checkpoint that transformers reads: the experiment's own, else its plain converted copy. ValueError where it
    can read neither (Megatron, and nothing unquantised was converted)."""
    folder = Path(experiment.input_model)
    if not (folder / "config.json").is_file():
        folder = experiment.converted_folder
        if experiment.quantize != "none" or not (folder / "config.json").is_file():
            raise ValueError(
                f"transformers cannot read {experiment.input_model} and there is no unquantised converted "
                "copy; convert it with quantize: none, or take transformers out of engines"
            )
    return folder


class TokenClock:
    """A streamer for `generate` that keeps the time of each call: of the prompt, then of every step."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: object) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


# --- continuous batching ----------------------------------------------------------------------------------------------


def require_continuous(device_kind: str) -> None:
    """ValueError where transformers has no continuous batching that takes an output length a request."""
    import transformers

    config = getattr(transformers, "ContinuousBatchingConfig", None)
    if not hasattr(config, "page_size"):
        raise ValueError(
            f"engines: batching: continuous needs transformers 5.17 or later, here is {transformers.__version__}"
        )
    if device_kind not in ("cpu", "cuda"):
        raise ValueError(f"engines: batching: continuous runs on cpu and cuda, not on {device_kind}; allowed: padded")


class ContinuousBackend(TransformersBackend):
    """The manager takes each request when it is due and notes the time of each token as it reaches the host.

    Up to `concurrency` requests and `max_tokens_per_step` tokens a step. On a CPU the cache has room for just as many
    of the longest requests, elsewhere the manager takes what memory is free. Pages are not shared between prompts, for
    the manager does not tell how many were. sdpa attention, as in `generate`: nothing is fetched to replace it.
    """

    _made_for = (0, 0)  # requests at a time, blocks of KV cache; of the manager that the model keeps

    @property
    def identity(self) -> Identity:
        found = super().identity
        engine = {**found.engine, "padding": "none", "max_tokens_per_step": self.max_tokens_per_step}
        return found.with_parts(engine=engine)

    def close(self) -> None:
        if self._model is not None:
            self._model.destroy_cached_continuous_batching_manager()
        self._made_for = (0, 0)
        super().close()

    def run(self, requests: Sequence[Request], concurrency: int, on_done: OnDone | None = None) -> list[RequestRecord]:
        records: list[RequestRecord] = []
        for request, arrival_s, result in self.serve(requests, concurrency):
            times, error = tuple(result.timestamps or ()), result.error
            if error is None and len(times) < len(result.generated_tokens):
                error = "transformers began it anew for want of KV cache, and the times of its first tokens are lost"
            record, (begun_s, ended_s) = request.record(arrival_s, times, error), result.lifespan
            begun_s = begun_s if begun_s > 0 else None
            records.append(replace(record, scheduled_s=begun_s, finished_s=times[-1] if times else ended_s))
            if on_done:
                on_done(len(records))
        return records

    def serve(self, requests: Sequence[Request], concurrency: int) -> Iterator[tuple[Request, float, GenerationOutput]]:
        """Each request with its arrival time and what came of it, in the order they ended."""
        self.open()
        manager, in_flight = self._manager(requests, concurrency), dict[str | None, tuple[Request, float]]()
        manager.warmup()  # makes the cache and captures graphs, where there are any; nothing the second time
        manager.start()
        try:
            dispatcher = Dispatcher(requests, concurrency, time.perf_counter())
            while dispatcher.left:
                for request, arrival_s in dispatcher.due(time.perf_counter()):
                    ids, count = list(request.prompt_token_ids), request.num_output_tokens
                    name = manager.add_request(ids, max_new_tokens=count, record_timestamps=True)
                    in_flight[name] = request, arrival_s
                wait_s = dispatcher.wait_s(time.perf_counter())
                result = manager.get_result(timeout=1.0 if wait_s is None else min(wait_s, 1.0))
                if result is None and not manager.is_running():
                    cause = manager.background_thread_status.fatal_error or "it gave no reason"
                    raise RuntimeError(f"transformers' generation thread ended: {cause}")
                if result is not None and result.is_finished():
                    request, arrival_s = in_flight.pop(result.request_id)
                    dispatcher.ended(request.index, time.perf_counter())
                    yield request, arrival_s, result
        finally:
            # The manager stays with the model, its thread does not: what is left in it is failed.
            manager.stop(block=True, keep_for_next_session=True, hard_stop=bool(in_flight))
            if in_flight:
                self._made_for = (0, 0)

    def _manager(self, requests: Sequence[Request], concurrency: int) -> ContinuousBatchingManager:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        config = ContinuousBatchingConfig(
            max_requests_per_batch=concurrency,
            max_batch_tokens=self.max_tokens_per_step,
            allow_block_sharing=False,
            auto_switch_to_flash=False,
        )
        blocks = 0
        if self.device.kind == "cpu":
            longest = max(len(r.prompt_token_ids) + r.num_output_tokens for r in requests)
            blocks = concurrency * (-(-longest // config.page_size) + 1)
            config.num_blocks, config.safety_margin = blocks, 0.0  # enough for all: none needs to be held back
        if self._made_for[0] != concurrency or self._made_for[1] < blocks:
            self._model.destroy_cached_continuous_batching_manager()
            self._made_for = concurrency, blocks
        # -1 is what the manager takes for "no end of text".
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=self._pad_id)
        return self._model.init_continuous_batching(generation, config)
