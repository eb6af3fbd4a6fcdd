"""Run folders for reports, written without running anything."""

import json
import re

from ascend_kit.show.report import write_report


def write_run(folder, stages, **files):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"schema_version": 2, "created": "2026-01-01T00:00:00+0000", "updated": "2026-01-02", "stages": stages}
    (folder / "run.json").write_text(json.dumps(record))
    for name, value in files.items():
        rows = value if isinstance(value, list) else None
        text = "".join(json.dumps(row) + "\n" for row in rows) if rows is not None else json.dumps(value)
        (folder / f"{name}.{'jsonl' if rows is not None else 'json'}").write_text(text)
    return folder


def point(rate, concurrency=16, **also):
    return {"status": "ok", "backend": "ascend_kit", "concurrency": concurrency, "prompt_len": 64, "output_len": 32,
            "output_tokens_per_s": rate, "ttft_p50_ms": 20.0, "tpot_p50_ms": 1.5, **also}  # fmt: skip


DEVICE = {"kind": "npu", "name": "Ascend910B3", "versions": {"torch": "2.12.0", "cann": "8.5"}}
PARAMETERS = {"model_name": "Qwen3-8B", "precision": "bf16", "quantize": "w8a8", "graph_mode": True, "cards": 2}
STAGE = {"state": "ok", "parameters": PARAMETERS, "facts": {"device": DEVICE}}


def first_screen(folder):
    page = write_report(folder).read_text(encoding="utf-8")
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("<header")[1].split("</header>")[0]))
