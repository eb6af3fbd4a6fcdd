"""vLLM's CPU build, compiled and with prefix caching (its defaults), driven as its `LLM.generate` does.

tcmalloc and Intel's OpenMP are loaded before Python, as its documentation asks; peers/setup.sh puts both into the
environment's lib folder. Options: arguments of `LLM`.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path

from protocol import Answer, Job, Request, Scoring, main

PRELOADED = ("lib/libtcmalloc_minimal.so*", "lib/libiomp5.so")


def set_environment(job: Job) -> None:
    """vLLM reads these on import."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, job.kv_cache_bytes >> 30)),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{job.threads - 1}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, so that its memory and its clock are ours
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(Path(sys.prefix) / "vllm-cache"),
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def preload() -> None:
    """Start this script over with the recommended libraries loaded first, those that are there."""
    found = [str(path) for name in PRELOADED for path in sorted(Path(sys.prefix).glob(name))[:1]]
    if found and "LD_PRELOAD" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_PRELOAD": ":".join(found)})


class Vllm:
    """One `LLM`; requests go to its engine directly, so that each token's time is known."""

    def __init__(self, job: Job):
        set_environment(job)
        from vllm import LLM

        settings = {
            "dtype": "bfloat16",
            "max_model_len": job.max_seq_length,
            "max_num_seqs": job.slots,
            "max_num_batched_tokens": 2048,
            "enable_prefix_caching": True,
            "skip_tokenizer_init": True,
            "seed": 0,
            "disable_log_stats": True,
        }
        self.llm = LLM(model=job.model, **(settings | job.options))
        self.names = (str(number) for number in itertools.count())

    def versions(self) -> dict[str, str]:
        import torch
        import vllm

        loaded = ", ".join(Path(path).name for path in os.environ.get("LD_PRELOAD", "").split(":") if path)
        return {"vllm": vllm.__version__, "torch": torch.__version__, "preloaded": loaded}

    def prepare(self, workload: str) -> None:
        pass

    def generate(self, requests: list[Request]) -> list[Answer]:
        answers, _ = self._run(
            [request.prompt for request in requests],
            [self._sampling(request.num_output_tokens) for request in requests],
        )
        return answers

    def score(self, scoring: Scoring) -> list[float]:
        """Through `logprob_token_ids`: `prompt_logprobs` would compute even a cached prefix again."""
        settings = [self._sampling(1, logprob_token_ids=[target]) for target in scoring.targets]
        _, logprobs = self._run(scoring.prompts, settings)
        return [found[target].logprob for found, target in zip(logprobs, scoring.targets, strict=True)]

    def _run(self, prompts: list[list[int]], settings: list) -> tuple[list[Answer], list]:
        """Answers, and the log-probabilities reported with each last token."""
        engine, places = self.llm.llm_engine, {}
        for place, (prompt, sampling) in enumerate(zip(prompts, settings, strict=True)):
            name = next(self.names)
            places[name] = place
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        answers, logprobs = [Answer() for _ in prompts], [None] * len(prompts)
        while engine.has_unfinished_requests():
            outputs, now = engine.step(), time.perf_counter()
            for output in outputs:
                place, new = places[output.request_id], output.outputs[0]
                for token in new.token_ids:
                    answers[place].add(token, now)
                if new.logprobs:
                    logprobs[place] = new.logprobs[-1]
        return answers, logprobs

    @staticmethod
    def _sampling(count: int, **more: object) -> object:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=0,
            max_tokens=count,
            min_tokens=count,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            **more,
        )


if __name__ == "__main__":
    preload()
    main(Vllm)
