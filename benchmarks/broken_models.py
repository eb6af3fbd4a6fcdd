"""Does an evaluation of a model that is broken on purpose end with an alarm and exit status 1 of the command line?

    python benchmarks/broken_models.py [NAME ...]

The demo model as it is (status 0), then with the rows of its embedding shuffled, with one scale wrong by a factor of
thirty, with logits that are all the same, and ending every text at its first token; or those that are named. The short
form, on a model built by hand and through endpoints, is tests/test_broken_models.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ascend_kit.demo import ensure_data
from ascend_kit.demo.assets import ensure_model

ROOT = Path(__file__).parents[1]
Tensors = dict[str, torch.Tensor]


def shuffled(tensors: Tensors) -> None:
    table = tensors.get("model.embed_tokens.weight")  # the shards are changed one by one
    if table is not None:
        table.copy_(table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))].clone())


def scaled(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if name.endswith("o_proj.weight"):
            tensor.mul_(30)


def constant(tensors: Tensors) -> None:
    if "model.norm.weight" in tensors:
        tensors["model.norm.weight"].zero_()


CHANGES: dict[str, Callable[[Tensors], None] | None] = {
    "as it is": None, "shuffled rows": shuffled, "wrong scale": scaled, "constant logits": constant,
    "ends at once": None,
}  # fmt: skip


def break_model(folder: Path, name: str) -> None:
    """Change the checkpoint in `folder`."""
    change = CHANGES[name]
    if change is not None:
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path, metadata={"format": "pt"})
    if name == "ends at once":  # whatever token comes, it ends the text
        every = list(range(json.loads((folder / "config.json").read_text())["vocab_size"]))
        for path in (folder / "config.json", folder / "generation_config.json"):
            if path.exists():
                path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": every}))


def main() -> int:
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in sys.argv[1:] or CHANGES:
            folder = Path(scratch) / name.replace(" ", "-")
            shutil.copytree(ensure_model(), folder / "model")
            break_model(folder / "model", name)
            (folder / "run.yaml").write_text(json.dumps({
                "experiment": "broken", "input_model": str(folder / "model"), "use_model": "source",
                "dataset_path": str(ensure_data()), "eval_datasets": ["mmlu", "ceval", "agieval"], "precision": "fp32",
                "output_root": str(folder / "outputs"), "max_seq_length": 2048,
            }))  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-m", "ascend_kit", "run", str(folder / "run.yaml"), "--only", "05"],
                cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
            )  # fmt: skip
            record = next((folder / "outputs").rglob("run.json"), None)
            stage = json.loads(record.read_text())["stages"]["05_evaluate"] if record else {}
            alarms = sorted({alarm["key"] for alarm in stage.get("alarms", [])})
            expected = 0 if name == "as it is" else 1
            wrong += done.returncode != expected or (expected == 1 and not alarms)
            print(f"{name:16} exit {done.returncode}  {stage.get('state')}  {', '.join(alarms) or '-'}", flush=True)
            if done.returncode not in (0, 1):
                print(done.stdout[-2000:], done.stderr[-2000:])
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
