"""This repository's engine, through its public class; options: `quantize` (none, w8a8, w8a16)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # a checkout that is not installed works too

from protocol import Answer, Job, Request, Scoring, main


class AscendKit:
    """One engine for all workloads; KV blocks on demand and shared prefixes are its normal setting."""

    def __init__(self, job: Job):
        import torch

        from ascend_kit import AscendInferEngine

        torch.set_num_threads(job.threads)
        model = job.model if job.options.get("quantize", "none") == "none" else job.derived
        self.engine = AscendInferEngine(
            model,
            precision="bf16",
            device="cpu",
            max_seq_length=job.max_seq_length,
            batch_size=job.slots,
            graph_mode=True,
            operator_fusion=True,
            memory_optimize=True,
            kv_cache_gib=job.kv_cache_bytes / 2**30,
        ).load_model()

    def versions(self) -> dict[str, str]:
        import torch

        import ascend_kit
        from ascend_kit.device.ops import native

        return {"ascend_kit": ascend_kit.__version__, "torch": torch.__version__, "kernels": native.status()}

    def prepare(self, workload: str) -> None:
        pass

    def generate(self, requests: list[Request]) -> list[Answer]:
        from ascend_kit import SamplingParams

        sampling = [SamplingParams(max_new_tokens=request.num_output_tokens, ignore_eos=True) for request in requests]
        outputs = self.engine.generate([request.prompt for request in requests], sampling)
        errors = [output.error for output in outputs if output.error]
        if errors:
            raise RuntimeError(errors[0])
        return [Answer(output.token_ids, output.timeline.token_times_s) for output in outputs]

    def score(self, scoring: Scoring) -> list[float]:
        pairs = [(prompt, [target]) for prompt, target in zip(scoring.prompts, scoring.targets, strict=True)]
        return [score.logprob for score in self.engine.score(pairs)]


def make_derived(job: Job) -> None:
    """Convert the checkpoint to int8 once."""
    from ascend_kit import convert

    quantize = job.options.get("quantize", "none")
    if quantize != "none" and not job.derived.exists():
        convert(job.model, job.derived, quantize=quantize, quantize_keep=job.options.get("quantize_keep", ["lm_head"]))


if __name__ == "__main__":
    main(AscendKit, make_derived)
