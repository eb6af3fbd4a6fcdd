"""OpenVINO GenAI's continuous batching on a CPU.

Option `weights`: bf16 or int8, exported once with optimum-intel. Options `scheduler` and `properties` override what
is set here, to try other settings.
"""

from __future__ import annotations

import gc
import itertools
import shutil
import time

from protocol import Answer, Job, Request, Scoring, check_counts, main


class OpenVino:
    """A pipeline without prefix caching (its default), or with it while scoring."""

    def __init__(self, job: Job):
        self.job, self.pipeline, self.has_prefixes = job, None, None
        self.numbers = itertools.count()
        self._open(prefixes=False)

    def versions(self) -> dict[str, str]:
        import openvino
        import openvino_genai

        return {"openvino": openvino.__version__, "openvino_genai": openvino_genai.__version__}

    def prepare(self, workload: str) -> None:
        self._open(prefixes=workload == "W4")

    def generate(self, requests: list[Request]) -> list[Answer]:
        return self._run([request.prompt for request in requests], [request.num_output_tokens for request in requests])

    def score(self, scoring: Scoring) -> None:
        """One new token behind each prompt with its log-probability; that of a given token cannot be had.

        A prefix is found only by requests that come after it was computed, so the shared tokens go first.
        """
        if scoring.shared:
            self._run([scoring.shared], [1])
        requests = [Request(prompt, 1) for prompt in scoring.prompts]
        answers = self._run(scoring.prompts, [1] * len(requests), logprobs=1)
        check_counts(requests, [len(answer.token_ids) for answer in answers])

    def _open(self, prefixes: bool) -> None:
        if self.has_prefixes == prefixes:
            return
        import openvino_genai as genai

        self.pipeline = None
        gc.collect()  # two pipelines at once would double the memory
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs, scheduler.max_num_batched_tokens = self.job.slots, 2048
        scheduler.cache_size = max(1, self.job.kv_cache_bytes >> 30)
        scheduler.enable_prefix_caching, scheduler.dynamic_split_fuse = prefixes, True
        for name, value in self.job.options.get("scheduler", {}).items():
            setattr(scheduler, name, value)
        properties = {"INFERENCE_NUM_THREADS": self.job.threads, "INFERENCE_PRECISION_HINT": "bf16"}
        properties |= self.job.options.get("properties", {})
        self.pipeline = genai.ContinuousBatchingPipeline(str(self.job.derived), scheduler, "CPU", properties)
        self.has_prefixes = prefixes

    def _run(self, prompts: list[list[int]], counts: list[int], logprobs: int = 0) -> list[Answer]:
        import numpy as np
        import openvino

        handles = []
        for prompt, count in zip(prompts, counts, strict=True):
            tokens = openvino.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self.pipeline.add_request(next(self.numbers), tokens, self._generation(count, logprobs)))
        answers, waiting = [Answer() for _ in prompts], set(range(len(prompts)))
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            self._read(handles, answers, waiting, counts)
        self._read(handles, answers, waiting, counts)
        return answers

    @staticmethod
    def _read(handles: list, answers: list[Answer], waiting: set[int], counts: list[int]) -> None:
        now = time.perf_counter()
        for place in list(waiting):
            while handles[place].can_read():
                for output in handles[place].read().values():
                    for token in output.generated_ids:
                        answers[place].add(token, now)
            if len(answers[place].token_ids) >= counts[place]:
                waiting.discard(place)

    @staticmethod
    def _generation(count: int, logprobs: int) -> object:
        import openvino_genai as genai

        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos, config.do_sample, config.eos_token_id = True, False, 257
        if logprobs:
            config.logprobs = logprobs
        return config


def make_derived(job: Job) -> None:
    """Export the checkpoint once, with weights as they are or in int8 (per channel, optimum's own choice)."""
    if (job.derived / "openvino_model.xml").is_file():
        return
    from optimum.intel import OVModelForCausalLM

    temporary = job.derived.with_name(job.derived.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model = OVModelForCausalLM.from_pretrained(
        job.model, export=True, load_in_8bit=job.options["weights"] == "int8", compile=False
    )
    model.save_pretrained(temporary)
    temporary.rename(job.derived)


if __name__ == "__main__":
    main(OpenVino, make_derived)
