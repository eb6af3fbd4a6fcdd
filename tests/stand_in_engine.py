"""A small engine that keeps the add_request / step contract, for sweeps that must not take long."""

import contextlib
import time
from types import SimpleNamespace

from ascend_kit.engine.sequence import RequestOutput, SamplingParams, Timeline
from ascend_kit.identity import Identity
from ascend_kit.model.config import ModelConfig
from ascend_kit.params import build_experiment
from ascend_kit.results import RunFolder

CEILINGS = {"device": "stand-in", "bf16_flops_per_s": 1e9, "int8_ops_per_s": None, "read_bytes_per_s": 1e9,
            "launch_s": 1e-7}  # fmt: skip
CONFIG = ModelConfig("qwen3", 2, 8, 2, 1, 4, 16, 1000, tie_embeddings=True, qk_norm=True)


class StandInDevice(SimpleNamespace):
    kind, name, peak, total_memory_bytes = "cpu", "stand-in", None, 2**30

    def versions(self):
        return {"torch": "stand-in"}

    def facts(self):
        return {"name": "stand-in"}

    def task_queue_level(self):
        return None

    def synchronize(self):
        pass

    def reset_peak_memory(self):
        pass

    def peak_memory_bytes(self):
        return 12345

    def memory_in_use_bytes(self):
        return 1234


class StandInEngine:
    """One token per running request and step. `break_on` names prompt lengths whose step raises."""

    def __init__(self, slots=4, break_on=(), short_on=(), step_s=0.0, weights="weights", **settings):
        self.identity = Identity(weights=weights, engine={"kind": "ascend_kit", **settings})
        self.num_loads = 0
        self.config, self.device, self.max_seq_length = CONFIG, StandInDevice(), 512
        self.model_path = None
        self.settings = SimpleNamespace(why_synchronous=lambda kind: "a stand-in")
        self.slots, self.break_on, self.short_on, self.step_s = slots, set(break_on), set(short_on), step_s
        self.sequences, self.prompts, self.most_in_flight, self.cancelled = {}, [], 0, []

    def load_model(self):
        self.num_loads += 1
        return self

    def close(self):
        self.sequences.clear()

    def stats(self):
        return {"weight_bytes": 4000}

    @property
    def has_unfinished(self):
        return bool(self.sequences)

    def add_request(self, prompt, sampling, arrival_s=None):
        assert isinstance(prompt, list) and isinstance(sampling, SamplingParams) and sampling.ignore_eos
        index = len(self.prompts)
        self.prompts.append(tuple(prompt))
        self.sequences[index] = (prompt, sampling, Timeline(arrival_s))
        self.most_in_flight = max(self.most_in_flight, len(self.sequences))
        return index

    def step(self):
        time.sleep(self.step_s)
        now, finished = time.perf_counter(), []
        for index in list(self.sequences)[: self.slots]:
            prompt, sampling, timeline = self.sequences[index]
            if len(prompt) in self.break_on:
                raise MemoryError("KV pool too small")
            timeline.token_times_s.append(now)
            wanted = sampling.max_new_tokens - (len(prompt) in self.short_on)
            if len(timeline.token_times_s) >= wanted:
                del self.sequences[index]
                finished.append(self._output(index, prompt, timeline))
        return finished

    def cancel(self, index):
        self.cancelled.append(index)
        self.sequences.pop(index, None)

    def _output(self, index, prompt, timeline):
        timeline.finished_s = timeline.token_times_s[-1]
        tokens = [1] * len(timeline.token_times_s)
        return RequestOutput(index, prompt, tokens, "", "length", None, None, timeline, 0, 0)


def experiment_for(tmp_path, **changes):
    values = dict(
        experiment="sweep", output_root=str(tmp_path), max_seq_length=512, max_new_tokens=8, batch_size=4,
        sweep_concurrency=[1, 2], sweep_prompt_len=[8, 16], sweep_output_len=[4],
    )  # fmt: skip
    return build_experiment({**values, **changes})


@contextlib.contextmanager
def opened(experiment):
    with RunFolder.open(experiment, stage="04_throughput") as folder:
        yield folder
