"""Hugging Face transformers.

Option `mode`: generate (padded batches), generate_batch (continuous batching), hflm (lm-eval's adapter,
scoring only). Option `pad_to`: generate's batches are padded to that many tokens instead of the longest prompt.
"""

from __future__ import annotations

import time
from typing import Any

from protocol import Answer, Job, Request, Scoring, check_counts, main

BATCH = 16  # requests per padded batch; larger ones waste more of it on padding
SCORING_BATCH = 8
PAGE = 256  # tokens per page of generate_batch's cache, its default


class Loaded:
    """The model in bf16; what the three modes share."""

    attention = "sdpa"

    def __init__(self, job: Job):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(job.threads)
        self.job, self.torch = job, torch
        self.model = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=torch.bfloat16, attn_implementation=self.attention
        ).eval()

    def versions(self) -> dict[str, str]:
        import transformers

        return {"transformers": transformers.__version__, "torch": self.torch.__version__}

    def prepare(self, workload: str) -> None:
        pass

    def generate(self, requests: list[Request]) -> list[Answer]:
        raise NotImplementedError(f"{type(self).__name__} does not generate")

    def score(self, scoring: Scoring) -> list[float] | None:
        raise NotImplementedError(f"{type(self).__name__} does not score")


class Padded(Loaded):
    """`generate` in batches: prompts padded on the left to the longest, decoding until the longest answer.

    Prompts of like length go together, which a user can arrange; the lengths of answers are not known before.
    """

    def generate(self, requests: list[Request]) -> list[Answer]:
        order = sorted(range(len(requests)), key=lambda place: len(requests[place].prompt))
        answers: dict[int, Answer] = {}
        for first in range(0, len(order), BATCH):
            places = order[first : first + BATCH]
            answers |= zip(places, self._batch([requests[place] for place in places]), strict=True)
        return [answers[place] for place in range(len(requests))]

    def _batch(self, requests: list[Request]) -> list[Answer]:
        torch, steps = self.torch, max(request.num_output_tokens for request in requests)
        width = max(self.job.options.get("pad_to", 0), *(len(request.prompt) for request in requests))
        pad = self.model.config.pad_token_id
        ids = torch.full((len(requests), width), pad)
        for row, request in zip(ids, requests, strict=True):
            row[width - len(request.prompt) :] = torch.tensor(request.prompt)
        positions = torch.arange(width)
        mask = (positions >= torch.tensor([[width - len(request.prompt)] for request in requests])).long()
        times: list[float] = []

        def note_time(input_ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=mask,
                min_new_tokens=steps,
                max_new_tokens=steps,
                do_sample=False,
                pad_token_id=pad,
                stopping_criteria=[note_time],
            )
        return [
            Answer(row[: request.num_output_tokens].tolist(), times[: request.num_output_tokens])
            for row, request in zip(out[:, width:], requests, strict=True)
        ]

    def score(self, scoring: Scoring) -> list[float]:
        """Plain forward passes that compute the logits of the last position only."""
        torch, prompts, scores = self.torch, scoring.prompts, []
        for first in range(0, len(prompts), SCORING_BATCH):
            part = torch.tensor(prompts[first : first + SCORING_BATCH])
            targets = torch.tensor(scoring.targets[first : first + SCORING_BATCH])
            with torch.inference_mode():
                logits = self.model(part, logits_to_keep=1, use_cache=False).logits[:, -1].float()
            scores += logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
        return scores


class Continuous(Loaded):
    """`generate_batch`'s manager, entered directly because it takes an output length per request.

    It is kept over all workloads, as a server would keep it, so that its start and its cache cost no time.
    """

    def __init__(self, job: Job):
        super().__init__(job)
        from transformers import ContinuousBatchingConfig, GenerationConfig

        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=max(8, job.kv_cache_bytes // (PAGE * job.kv_bytes_per_token)),
            max_batch_tokens=job.options.get("max_batch_tokens", 512),
            max_requests_per_batch=job.slots,
        )
        pad = self.model.config.pad_token_id
        generation = GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=pad)
        self.manager = self.model.init_continuous_batching(generation, config)
        self.manager.start()

    def close(self) -> None:
        self.manager.stop(block=True, timeout=5)

    def generate(self, requests: list[Request]) -> list[Answer]:
        results = self._run(requests)
        return [Answer(list(result.generated_tokens), list(result.timestamps)) for result in results]

    def score(self, scoring: Scoring) -> None:
        """One new token behind each prompt: the manager reports the logarithm of its own choice only.

        The shared tokens go first, since only pages that are already computed are shared.
        """
        if scoring.shared:
            self._run([Request(scoring.shared, 1)])
        requests = [Request(prompt, 1) for prompt in scoring.prompts]
        check_counts(requests, [len(result.generated_tokens) for result in self._run(requests)])

    def _run(self, requests: list[Request]) -> list[Any]:
        order = [
            self.manager.add_request(
                request.prompt, max_new_tokens=request.num_output_tokens, record_timestamps=True, eos_token_id=-1
            )
            for request in requests
        ]
        done = self._collect(self.manager, len(order))
        return [done[name] for name in order]

    @staticmethod
    def _collect(manager: Any, count: int) -> dict[str, Any]:
        done: dict[str, Any] = {}
        while len(done) < count:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("the generation thread ended early")
            if result is not None and result.error:
                raise RuntimeError(result.error)
            if result is not None and result.is_finished():
                done[result.request_id] = result
        return done


class Harness(Loaded):
    """lm-eval's own adapter for transformers: the usual way to score. W4 only."""

    def __init__(self, job: Job):
        super().__init__(job)
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=False)
        self.harness = HFLM(pretrained=self.model, tokenizer=tokenizer, batch_size=SCORING_BATCH, max_length=2048)

    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        return {**super().versions(), "lm_eval": version("lm_eval")}

    def score(self, scoring: Scoring) -> list[float]:
        requests = [
            (("", ""), prompt, [target]) for prompt, target in zip(scoring.prompts, scoring.targets, strict=True)
        ]
        return [logprob for logprob, _ in self.harness._loglikelihood_tokens(requests, disable_tqdm=True)]


MODES = {"generate": Padded, "generate_batch": Continuous, "hflm": Harness}

if __name__ == "__main__":
    main(lambda job: MODES[job.options["mode"]](job))
