"""Conversion speed against a plain copy of the same files, in turns, and the peak memory of the conversion.

    python benchmarks/convert_speed.py --size-gb 4 --folder /data/scratch
    python benchmarks/convert_speed.py --model /models/Qwen3-8B --folder /data/scratch --quantize w8a8

Both sides read the same weight files, write beside each other and call fsync; imports are not timed.
Without --model a bf16 Qwen3 of random weights of the given size is made first. Every turn writes and
removes one copy and one result.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 12288,
    "vocab_size": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHARD_BYTES = 2 << 30

CONVERT = """
import json, sys, time
from ascend_kit.checkpoint.convert import convert
def peak_bytes():  # not getrusage, whose figure survives exec and would be that of this script's parent
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
imports = peak_bytes()
begin = time.perf_counter()
result = convert(sys.argv[1], sys.argv[2], quantize=sys.argv[3], if_exists="refuse")
print(json.dumps({"seconds": time.perf_counter() - begin, "imports_bytes": imports, "peak_bytes": peak_bytes()}))
"""


def make_model(folder: Path, size_gb: float) -> Path:
    """Random bf16 weights in shards; the same bytes are repeated, which no file system here compresses
    away.
    """
    import torch

    from ascend_kit.checkpoint.tensor_jobs import OutputTensor
    from ascend_kit.checkpoint.writer import shard_header
    from ascend_kit.model.config import ModelConfig
    from ascend_kit.model.tensors import expected_shapes

    config = {**SHAPE, "num_hidden_layers": 1}
    while _num_bytes(config) < size_gb * 1e9:
        config["num_hidden_layers"] += 1
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards, weight_map = [[]], {}
    for name, shape in expected_shapes(ModelConfig.from_dict(config)).items():
        if sum(o.nbytes for o in shards[-1]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(OutputTensor(name, torch.bfloat16, shape))
    noise = torch.randn(64 << 20).mul_(0.02).bfloat16().view(torch.uint8).numpy()
    for number, outputs in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {output.name: path.name for output in outputs}
        with open(path, "wb") as file:
            file.write(shard_header(outputs))
            left = sum(output.nbytes for output in outputs)
            while left:
                left -= file.write(noise[: min(left, noise.nbytes)])
            os.fsync(file.fileno())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _num_bytes(config: dict) -> int:
    import torch

    from ascend_kit.model.config import ModelConfig
    from ascend_kit.model.tensors import expected_shapes

    return 2 * sum(torch.Size(shape).numel() for shape in expected_shapes(ModelConfig.from_dict(config)).values())


def time_copy(source: Path, target: Path) -> tuple[float, int]:
    """(seconds, bytes) of copying the weight files with the system's fastest copy, fsync included."""
    target.mkdir()
    begin, total = time.perf_counter(), 0
    for path in sorted(source.glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
        fd = os.open(target / path.name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        total += path.stat().st_size
    return time.perf_counter() - begin, total


def time_convert(source: Path, target: Path, quantize: str) -> dict[str, float]:
    """Seconds, bytes and peak memory of one conversion in a process of its own."""
    command = [sys.executable, "-c", CONVERT, str(source), str(target), quantize]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def drop_caches(wanted: bool) -> None:
    """Make the next reads come from disk; needs root."""
    if wanted:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")


def largest_tensor(source: Path) -> int:
    """Bytes of the largest tensor."""
    from ascend_kit.checkpoint.huggingface import open_checkpoint

    return max(tensor.nbytes for tensor in open_checkpoint(source).sources.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder with room for three models")
    parser.add_argument("--model", type=Path, help="checkpoint to convert; default: a synthetic one")
    parser.add_argument("--size-gb", type=float, default=4.0, help="size of the synthetic checkpoint, 10^9 bytes")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quantize", default="none", choices=["none", "w8a8", "w8a16"])
    parser.add_argument("--cold", action="store_true", help="drop the page cache before every measurement (root)")
    arguments = parser.parse_args()
    work = arguments.folder / "convert_speed"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    source = arguments.model or make_model(work / "source", arguments.size_gb)
    copies, conversions, peaks = [], [], []
    for turn in range(arguments.turns):
        drop_caches(arguments.cold)
        seconds, total = time_copy(source, work / "copy")
        copies.append(total / seconds)
        shutil.rmtree(work / "copy")
        drop_caches(arguments.cold)
        measured = time_convert(source, work / "result", arguments.quantize)
        conversions.append(total / measured["seconds"])
        peaks.append(measured["peak_bytes"])
        shutil.rmtree(work / "result")
        print(
            f"turn {turn + 1}: copy {copies[-1] / 1e6:.0f} MB/s, convert {conversions[-1] / 1e6:.0f} MB/s of source, "
            f"ratio {conversions[-1] / copies[-1]:.2f}, peak {peaks[-1] / 2**20:.0f} MiB",
            flush=True,
        )
    largest = largest_tensor(source)
    print(f"source {total / 1e9:.2f} GB, largest tensor {largest / 2**20:.0f} MiB, quantize {arguments.quantize}")
    print(
        f"median: copy {statistics.median(copies) / 1e6:.0f} MB/s, convert "
        f"{statistics.median(conversions) / 1e6:.0f} MB/s, ratio "
        f"{statistics.median(c / p for c, p in zip(conversions, copies, strict=True)):.2f}"
    )
    print(
        f"peak memory {max(peaks) / 2**20:.0f} MiB; limit 3 x largest + 500 MB = {(3 * largest + 5e8) / 2**20:.0f} MiB"
    )
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
