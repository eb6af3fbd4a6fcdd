"""One server and one list of prompts, measured by this project and by `vllm bench serve` in turns: do they agree?

    benchmarks/peers/setup.sh vllm
    python benchmarks/compare_tools.py [--server vllm|ascend_kit] [--model FOLDER] [--repeats 3]

vLLM's own benchmark, out of the same environment, is the other tool. Both send the same texts in the same order,
greedy, of one length, so many in flight; prefix caches are off, so that the second to ask has no advantage. Printed are
the mean of each metric over the repeats with the least and the most, and whether the means differ by less than those
spread. Status 1 where they do not agree or a request failed.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ascend_kit import demo
from ascend_kit.measure.endpoint import Client
from ascend_kit.measure.metrics import summarize
from ascend_kit.measure.server_process import ServerProcess
from ascend_kit.measure.workload import Request
from ascend_kit.params import build_experiment
from ascend_kit.params.engines import OpenAIEngine

PEERS = Path.home() / ".cache/ascend-kit/peers/vllm/bin/python"
OUTPUT_LEN = 32
WORDS = ("sea", "blue", "one", "seven", "house", "river", "stone", "light", "green", "walks", "sings", "never", "old")
# Ours -> theirs.
METRICS = {
    "ttft_mean_ms": "mean_ttft_ms", "ttft_p50_ms": "median_ttft_ms", "tpot_mean_ms": "mean_tpot_ms",
    "itl_mean_ms": "mean_itl_ms", "e2e_mean_ms": "mean_e2el_ms", "output_tokens_per_s": "output_throughput",
    "requests_per_s": "request_throughput",
}  # fmt: skip
# The command itself looks for a package called vllm, which the CPU build is not.
BENCH = (
    "from vllm.benchmarks import serve; from vllm.utils.argparse_utils import FlexibleArgumentParser as P; "
    "parser = P(); serve.add_cli_args(parser); serve.main(parser.parse_args())"
)


def server_command(kind: str, python: Path, model: str, port: int) -> str:
    """The command line of a server without a prefix cache."""
    if kind == "ascend_kit":
        settings = "--set memory_optimize=false --set max_seq_length=512 --set batch_size=8 --set model_name=m"
        return f"{sys.executable} -m ascend_kit serve {model} --port {port} --set use_model=source {settings}"
    return (
        f"env VLLM_CPU_KVCACHE_SPACE=1 {python} -m vllm.entrypoints.openai.api_server --model {model} "
        f"--served-model-name m --dtype bfloat16 --enforce-eager --port {port} --max-model-len 512 "
        "--max-num-seqs 8 --no-enable-prefix-caching --gpu-memory-utilization 0.3"
    )


def ours(url: str, prompts: list[str], concurrency: int) -> dict[str, float]:
    """The metrics of one run by our client."""
    client = Client(OpenAIEngine(base_url=url, model="m"))
    requests = [Request(number, (1,), OUTPUT_LEN, text=prompt) for number, prompt in enumerate(prompts)]
    records = client.run(requests, concurrency)
    bad = [record.error for record in records if record.error]
    if bad:
        raise RuntimeError(f"{len(bad)} requests failed; the first: {bad[0]}")
    summary = summarize(records)
    return {name: float(summary[name] or 0) for name in METRICS}


def theirs(python: Path, root: str, model: str, prompts: Path, count: int, concurrency: int) -> dict[str, float]:
    """The same by `vllm bench serve`."""
    target = prompts.with_name("result.json")
    words = f"--backend openai --base-url {root} --endpoint /v1/completions --model m --tokenizer {model} "
    words += f"--dataset-name custom --dataset-path {prompts} --custom-output-len {OUTPUT_LEN} --disable-shuffle "
    words += f"--num-prompts {count} --max-concurrency {concurrency} --ignore-eos --temperature 0 --save-result "
    words += f"--result-dir {target.parent} --result-filename {target.name} --skip-chat-template --num-warmups 0 "
    words += "--percentile-metrics ttft,tpot,itl,e2el"
    done = subprocess.run([python, "-c", BENCH, *words.split()], capture_output=True, text=True)
    if done.returncode or not target.exists():
        raise RuntimeError(f"vllm bench serve failed:\n{(done.stdout + done.stderr)[-3000:]}")
    result = json.loads(target.read_text())
    target.unlink()
    if result["completed"] != count:
        raise RuntimeError(f"vllm bench serve completed {result['completed']} of {count} requests")
    return {name: float(result[other]) for name, other in METRICS.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=("vllm", "ascend_kit"), default="vllm")
    parser.add_argument("--model", help="a Hugging Face folder; default the demo model")
    parser.add_argument("--python", type=Path, default=PEERS, help=f"of vLLM's environment; default {PEERS}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=4)
    asked = parser.parse_args()
    model = asked.model or demo.resolve(build_experiment({"input_model": "demo", "prompts_file": "demo"})).input_model
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    root, generator = f"http://127.0.0.1:{port}", random.Random(0)
    prompts = [" ".join(generator.choices(WORDS, k=40)) for _ in range(asked.requests)]
    found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        server = ServerProcess(
            server_command(asked.server, asked.python, str(model), port), Path(scratch) / "server.log"
        )
        client = Client(OpenAIEngine(base_url=root + "/v1", model="m"))
        server.start(lambda: client.get("/v1/models") is not None, 600)
        try:
            ours(root + "/v1", prompts[:8], asked.concurrency)  # first calls are apart
            for _ in range(asked.repeats):
                found["ours"].append(ours(root + "/v1", prompts, asked.concurrency))
                found["theirs"].append(theirs(asked.python, root, str(model), file, len(prompts), asked.concurrency))
        finally:
            server.stop()
    print(f"server {asked.server}, {asked.requests} requests of {OUTPUT_LEN} tokens, {asked.concurrency} in flight, "
          f"{asked.repeats} repeats in turns: mean (least to most)")  # fmt: skip
    agree = [compare(name, found) for name in METRICS]
    return int(not all(agree))


def compare(name: str, found: dict[str, list[dict[str, float]]]) -> bool:
    """Print a line; whether the means differ by less than the wider spread of the two."""
    values = {who: [run[name] for run in runs] for who, runs in found.items()}
    means = {who: statistics.fmean(own) for who, own in values.items()}
    gap, spread = abs(means["ours"] - means["theirs"]), max(max(own) - min(own) for own in values.values())
    texts = [f"{who} {means[who]:.2f} ({min(own):.2f} to {max(own):.2f})" for who, own in values.items()]
    share = gap / means["theirs"] if means["theirs"] else 0.0
    print(f"{name}: {', '.join(texts)}; apart {share:.1%}, {'agree' if gap <= spread else 'DO NOT AGREE'}")
    return gap <= spread


if __name__ == "__main__":
    sys.exit(main())
