"""Prints what a decode step costs on an NPU, for transformers and this engine, at the sizes of real models.

A step with 100 tokens of a prompt beside the decodes is counted, too, eager and in a graph.

Run: python benchmarks/npu_counts.py. Needs no NPU and no weights: the real torch_npu runs over a stub
runtime (see tests/npu_sim) and operators are counted, not computed. What is counted costs time on hardware:
launches (several microseconds of host time each when run eagerly), host synchronisations (each drains the
device's queue), and bytes moved over the least possible (weights and KV cache read once). Launch counts are
the host's; `kernels/layer` is what the device runs per layer, inside a graph as well.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import npu_sim

COLUMNS = ("launches", "launches_per_layer", "syncs", "uploads", "replays", "bytes_ratio")
HEADINGS = ("launches", "kernels/layer", "syncs", "uploads", "replays", "bytes/minimum")


def main() -> None:
    """Count every configuration and print one table; `--json` writes the rows as well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=1024, help="tokens per sequence when the step runs")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()

    rows = list(count_all(npu_sim.start(), options.context, options.batch))
    print(f"One decode step at {options.context} tokens per sequence, bf16 unless int8\n")
    print(f"{'model':<12} {'engine':<22} {'batch':>5} " + " ".join(f"{h:>13}" for h in HEADINGS))
    for row in rows:
        values = " ".join(f"{row[column]:>13.5g}" for column in COLUMNS)
        print(f"{row['model']:<12} {row['engine']:<22} {row['batch']:>5} {values}")
    print("\ntransformers: synchronisations per token of generate(), from a tiny model that is computed")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def count_all(sim: Any, context: int, batches: list[int]) -> Any:
    """Rows of the table, as dictionaries."""
    from npu_sim.counting import MODELS, count_step
    from npu_sim.counting_transformers import count_transformers_step

    ours = {
        "ours, plain ops": dict(fused=False),
        "ours, eager": {},
        "ours, graph": dict(graph_mode=True),
        "with 100 of a prompt": dict(graph_mode=True, graph_prompt_tokens=0, prompt_tokens=100),
        "with 100, in a graph": dict(graph_mode=True, prompt_tokens=100),
        "ours, w8a8 graph": dict(graph_mode=True, quantize="w8a8"),
        "ours, w8a16 graph": dict(graph_mode=True, quantize="w8a16"),
    }
    for model, config in MODELS.items():
        for batch in batches:
            cost = count_transformers_step(sim, config, batch=batch, context=context)
            yield dict(model=model, engine="transformers, eager", batch=batch, **asdict(cost))
            for engine, changes in ours.items():
                cost = count_step(sim, config, batch=batch, context=context, **changes)
                yield dict(model=model, engine=engine, batch=batch, **asdict(cost))


if __name__ == "__main__":
    main()
