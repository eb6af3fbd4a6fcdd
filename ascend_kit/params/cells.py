"""The parameter cells of the notebooks, written from Experiment: one set of defaults, one wording."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ascend_kit.files import write_atomic
from ascend_kit.params.experiment import Experiment, choices_of, kind_of
from ascend_kit.params.notebook import CELL_MARK, literal_assignments, tagged
from ascend_kit.params.values import ParameterError

FIRST_LINE = f"{CELL_MARK}. Values changed here win over params_file, injected ones over both."
# Names -> the notebooks that use them, by their numbers.
USED_BY = {
    "experiment run output_root if_exists params_file language": "1234567",
    "seed": "345",
    "model_name input_model tokenizer_path precision quantize device device_id max_seq_length": "12345",
    "output_model adapter_path": "2345",
    "framework calibration_file smooth clip_search max_kl max_accuracy_loss if_model_exists": "2",
    "parity_max_kl parity_min_top1_agreement parity_max_logit_error parity_max_perplexity_increase": "2",
    "parity_min_greedy_share parity_min_length_ratio": "2",
    "quantize_keep": "12",
    "use_model tensor_parallel ray_address": "345",
    "cards": "1345",
    "batch_size operator_fusion plain_ops": "2345",
    "block_size max_tokens_per_step kv_cache_gib kv_cache_dtype head_dtype speculate graph_mode memory_optimize": "345",
    "async_scheduling": "345",
    "prompts_file": "23",
    "max_new_tokens temperature top_k top_p min_p repetition_penalty presence_penalty sampling": "3",
    "concurrency output_path chat_template": "3",
    "thinking": "35",
    "sweep": "124",
    "slo": "14",
    "engines": "245",
    "variants": "24",
    "sweep_repeats sweep_precision sweep_max_repeats sweep_requests_per_point search search_precision": "4",
    "load rate burstiness rate_end trace_file load_prompts length_spread shared_prefix turns think_s profile": "4",
    "log_to": "4",
    "eval_datasets dataset_path eval_batch_size eval_max_seq_length eval_fewshot eval_limit eval_chat_template": "5",
    "allow_download allow_code_execution eval_samples eval_temperature eval_top_p eval_top_k": "5",
    "eval_max_new_tokens eval_thinking_budget eval_endpoint eval_endpoint_model eval_stop_against": "5",
    "compare_runs": "67",
    "accuracy_margin_points": "56",
}


def parameters_of(notebook: str) -> list[str]:
    """The parameters of a notebook such as `04_throughput`, in the order of Experiment."""
    number = notebook.lstrip("0")[:1]
    used = {name for names, numbers in USED_BY.items() if number in numbers for name in names.split()}
    return [name for name in Experiment.model_fields if name in used]


def cell_source(notebook: str) -> str:
    """The text of a notebook's parameters cell: `name: type = default  # meaning`."""
    return "\n".join([FIRST_LINE, *map(_line, parameters_of(notebook))])


def _line(name: str) -> str:
    field = Experiment.model_fields[name]
    meaning, default = field.description or "", field.default
    missing = [word for word in choices_of(name) if word not in meaning]
    if missing:
        meaning += f": {', '.join(choices_of(name))}"
    written = json.dumps(default) if isinstance(default, (str, list, dict)) else str(default)
    return f"{name}: {kind_of(name)} = {written}  # {meaning}"


def write_cells(folder: Path, *, check: bool = False) -> list[str]:
    """Write every notebook's parameters cell anew, or only compare (`check`); returns what differs from Experiment."""
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise ParameterError(f"no notebooks NN_name.ipynb in {folder}")
    return [text for path in paths for text in _write_cell(path, check)]


def _write_cell(path: Path, check: bool) -> list[str]:
    document = json.loads(path.read_text(encoding="utf-8"))
    cell = next(cell for cell in document["cells"] if tagged(cell, "parameters"))
    before, wanted = "".join(cell["source"]), cell_source(path.stem)
    if before == wanted:
        return []
    if not check:
        cell["source"] = wanted.splitlines(keepends=True)
        write_atomic(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return [f"{path.name}: {_difference(literal_assignments(before), literal_assignments(wanted))}"]


def _difference(before: dict[str, Any], wanted: dict[str, Any]) -> str:
    changed = [name for name in {**before, **wanted} if before.get(name, ...) != wanted.get(name, ...)]
    return ", ".join(changed) or "wording"
