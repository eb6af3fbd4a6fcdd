"""A server that speaks OpenAI's protocol as an engine of a sweep: vLLM, vllm-ascend, MindIE, SGLang and others.

What it runs cannot be hashed: identity and machine are as declared in `engines`, and the server's own word is checked
against that when it is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.checkpoint.huggingface import load_tokenizer
from ascend_kit.device.device import select_device
from ascend_kit.device.peaks import find_peak
from ascend_kit.identity import Identity
from ascend_kit.measure.endpoint import Client
from ascend_kit.measure.engines import SWITCHES, DistantMachine, Machine, Uncounted, reckon_weight_bytes
from ascend_kit.measure.metrics import RequestRecord
from ascend_kit.measure.over_time import Observed
from ascend_kit.measure.server_process import ServerProcess
from ascend_kit.measure.workload import OnDone, Request
from ascend_kit.model.config import ModelConfig
from ascend_kit.params.engines import OpenAIEngine

if TYPE_CHECKING:
    from ascend_kit.engine.text import Tokenizer
    from ascend_kit.params import Experiment

HERE = "this machine"


class EndpointBackend(Uncounted):
    """One entry of kind `openai`."""

    launches_per_layer: int | None = None
    is_exact = False  # not every server knows ignore_eos; the row has the ratio

    def __init__(self, name: str, spec: OpenAIEngine, experiment: Experiment, log_folder: Path) -> None:
        self.name, self.spec, self._experiment = name, spec, experiment
        model = Path(experiment.tokenizer_path or experiment.input_model)
        self.config = ModelConfig.from_folder(model)
        self.max_seq_length, self.slots = experiment.max_seq_length, spec.batch_size
        self.cards = self.num_devices = spec.cards
        self.precision = spec.precision or experiment.precision
        self._codec: Tokenizer | None = None
        try:
            self._codec = load_tokenizer(model)
        except ValueError:  # it counts tokens, too, but only where text is sent there must be one
            if spec.send_prompts_as == "text" or spec.api == "chat":
                raise
        self._client: Client | None = None
        self._facts: dict[str, Any] = {}
        command = spec.engine_command
        self._process = None if command is None else ServerProcess(command, log_folder / f"{name}.log")

    @property
    def device(self) -> Machine:
        place = self.spec.runs_on
        if place == HERE:
            return select_device(self._experiment.device, self._experiment.device_id)
        peak = find_peak(place) if place else None
        memory_bytes = peak.memory_bytes if peak else 0
        return DistantMachine(place or "not declared", peak=peak, total_memory_bytes=memory_bytes)

    @property
    def identity(self) -> Identity:
        spec = self.spec
        # How long to wait and where the key lies changes no number; `retries` does.
        asked = spec.model_dump(exclude={"model", "api_key_env", "ready_timeout_s", "idle_s", "runs_on"})
        return Identity(
            weights={"model": spec.model},
            engine={"kind": "openai", **asked},
            device={"name": self.device.name},
            declared=("weights", "tokenizer", "engine", "versions", "device"),
        )

    def open(self) -> None:
        """Start the server where it is ours; RuntimeError when it does not answer or serves another model."""
        if self._client is not None:
            return
        spec, client = self.spec, Client(self.spec, self._codec)
        if self._process:
            self._process.start(lambda: client.get("/v1/models") is not None, spec.ready_timeout_s)
        models = client.get("/v1/models")
        if not isinstance(models, dict):
            raise RuntimeError(f"{self.name}: no answer from {spec.base_url}/models; start the server, or give the "
                               "entry an engine_command")  # fmt: skip
        served = {str(entry.get("id")): entry for entry in models.get("data") or [] if isinstance(entry, dict)}
        if served and spec.model not in served:
            raise RuntimeError(f"{self.name}: model {spec.model!r} is not served; {spec.base_url} has {list(served)}")
        version = client.get("/version")
        self._facts = {
            "server_max_model_len": served.get(spec.model, {}).get("max_model_len"),
            "server_version": version.get("version") if isinstance(version, dict) else None,
        }
        self._client = client

    def close(self) -> None:
        """Stop the server where it is ours."""
        self._client = None
        if self._process:
            self._process.stop()

    def run(self, requests: Sequence[Request], concurrency: int, on_done: OnDone | None = None) -> list[RequestRecord]:
        self.open()
        assert self._client is not None
        return self._client.run(requests, concurrency, on_done)

    def observed(self) -> Observed:
        """The client's lag, and what the server says of itself."""
        client = self._client
        return Observed({**self._facts, **client.facts}, client.samples) if client else Observed(self._facts)

    def pids(self) -> Sequence[int] | None:
        return None if self._process is None else ()  # a server that others started may be here

    def variant(self) -> dict[str, Any]:
        return {"precision": self.precision, "quantize": self.spec.quantize, **dict.fromkeys(SWITCHES)}

    def weight_bytes(self) -> int:
        return reckon_weight_bytes(self.config, self.precision, self.spec.quantize)
