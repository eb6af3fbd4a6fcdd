"""transformers' `generate` as an engine: what users would pick without one, used as well as it can be."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ascend_kit.checkpoint.manifest import model_identity
from ascend_kit.device.device import Device
from ascend_kit.identity import Identity
from ascend_kit.measure.engines import SWITCHES
from ascend_kit.measure.metrics import RequestRecord
from ascend_kit.measure.over_time import Observed
from ascend_kit.measure.workload import Dispatcher, OnDone, Request
from ascend_kit.model.config import DTYPES, ModelConfig

Padding = Literal["longest", "max"]

if TYPE_CHECKING:
    import torch

    from ascend_kit.params import Experiment


class TransformersBackend:
    """transformers' `generate`, used as well as it can be without a scheduler of its own.

    Static batches of up to `concurrency`, left-padded to the longest prompt of the batch (`padding="longest"`) or to
    `max_seq_length` less the answer ("max"), sdpa attention, inference_mode, no end-of-text check, the dtype and device
    of the engine it is compared with. The whole batch must end before a place is free. Token times come from a streamer
    that `generate` calls after every step with the new tokens on the host, so they are real.
    """

    is_exact = True
    slots: int | None = None
    cards = num_devices = replicas = 1
    launches_per_layer: int | None = 55  # counted for eager Qwen3 in transformers 5

    def __init__(
        self,
        model_path: str | Path,
        *,
        device: Device,
        precision: str = "bf16",
        max_seq_length: int = 8192,
        padding: Padding = "longest",
        name: str = "transformers",
    ):
        self.model_path, self.config = str(model_path), ModelConfig.from_folder(model_path)
        self.device, self.precision, self.max_seq_length = device, precision, max_seq_length
        self.name, self.padding = name, padding
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

    def observed(self) -> Observed:
        return Observed({})

    def stats(self) -> dict[str, Any]:
        return {}

    def pids(self) -> Sequence[int] | None:
        return ()

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
            record_of(r, arrival_s, start_s, clock.times_s[1 : 1 + min(r.num_output_tokens, made)])
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


def record_of(
    request: Request,
    arrival_s: float,
    scheduled_s: float | None,
    times: Sequence[float],
    finished_s: float | None = None,
    error: str | None = None,
) -> RequestRecord:
    """The record of a request whose tokens came at `times`, all of perf_counter; `finished_s` where none came."""
    return RequestRecord(
        index=request.index,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_output_tokens=len(times),
        arrival_s=arrival_s,
        token_times_s=tuple(times),
        finish_reason="error" if error else "length",
        error=error,
        scheduled_s=scheduled_s,
        finished_s=times[-1] if times else finished_s,
        num_asked_tokens=request.num_output_tokens,
    )


class TokenClock:
    """A streamer for `generate` that keeps the time of each call: of the prompt, then of every step."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: object) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""
