"""transformers' continuous batching as an engine: the manager behind `generate_batch`, driven request by request."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.device.device import Device
from ascend_kit.identity import Identity
from ascend_kit.measure.baseline import TransformersBackend, record_of
from ascend_kit.measure.metrics import RequestRecord
from ascend_kit.measure.workload import Dispatcher, OnDone, Request

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
    from transformers.generation.continuous_batching.requests import GenerationOutput

NO_TOKEN = -1  # what the manager takes for "no end of text"


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

    def __init__(
        self, model_path: str | Path, *, device: Device, max_tokens_per_step: int | None = None, **settings: Any
    ) -> None:
        """`settings` as of `generate`; `require_continuous` says whether it runs there."""
        super().__init__(model_path, device=device, **settings)
        self.max_tokens_per_step = max_tokens_per_step

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
            records.append(_record(request, arrival_s, result))
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
        generation = GenerationConfig(do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=self._pad_id)
        return self._model.init_continuous_batching(generation, config)


def _record(request: Request, arrival_s: float, result: GenerationOutput) -> RequestRecord:
    times, error = tuple(result.timestamps or ()), result.error
    if error is None and len(times) < len(result.generated_tokens):
        error = "transformers began it anew for want of KV cache, and the times of its first tokens are lost"
    begun_s, ended_s = result.lifespan
    return record_of(request, arrival_s, begun_s if begun_s > 0 else None, times, ended_s, error)
