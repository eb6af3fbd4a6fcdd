"""llama.cpp through llama-cpp-python's plain bindings, batched as its server does: decoding slots first, then
prompts.

Option `weights`: bf16 or q8_0, written once as GGUF from the Hugging Face checkpoint. Options to try
other settings: `context`, fields of the context's parameters, and `unified`, one cache for all requests.
"""

from __future__ import annotations

import json
import mmap
import struct
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from protocol import Answer, Job, Request, Scoring, main

BATCH = 2048  # tokens per call
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Token(NamedTuple):
    """One row of a call."""

    id: int
    position: int
    slot: int
    wants_logits: bool


class Slot:
    """A running request."""

    def __init__(self, number: int, request: Request, answer: Answer):
        self.number, self.request, self.answer = number, request, answer
        self.computed = 0

    @property
    def is_done(self) -> bool:
        return len(self.answer.token_ids) == self.request.num_output_tokens

    def rows(self, room: int) -> list[Token]:
        """What this slot computes next, at most `room` tokens."""
        prompt = self.request.prompt
        if self.computed >= len(prompt):
            row = [Token(self.answer.token_ids[-1], self.computed, self.number, True)]
            self.computed += 1
            return row
        end = min(len(prompt), self.computed + room)
        rows = [Token(prompt[p], p, self.number, p == len(prompt) - 1) for p in range(self.computed, end)]
        self.computed = end
        return rows


class LlamaCpp:
    def __init__(self, job: Job):
        import llama_cpp

        self.job, self.api = job, llama_cpp
        llama_cpp.llama_backend_init()
        self._log = llama_cpp.llama_log_callback(lambda *_: None)  # kept: the library holds only its address
        llama_cpp.llama_log_set(self._log, None)
        self.model = llama_cpp.llama_model_load_from_file(str(job.derived).encode(), self._model_settings())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {job.derived}")
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.context, self.slots = None, 0
        self.prepare("W1")

    def _model_settings(self) -> Any:
        settings = self.api.llama_model_default_params()
        settings.n_gpu_layers = 0
        return settings

    def _context_settings(self, workload: str) -> Any:
        """Requests of their own get a part of the cache each, as large as the workload needs; shared ones one cache."""
        settings, job = self.api.llama_context_default_params(), self.job
        sizes = json.loads(Path(job.workloads_file).read_text())[workload]
        if "prompt_lens" in sizes and not job.options.get("unified"):
            settings.n_seq_max = min(job.slots, len(sizes["prompt_lens"]))
            longest = max(a + b for a, b in zip(sizes["prompt_lens"], sizes["output_lens"], strict=True))
            settings.n_ctx = settings.n_seq_max * -(-longest // 256) * 256
        else:
            settings.n_seq_max, settings.kv_unified = max(job.slots, 64), True
            settings.n_ctx = max(job.max_seq_length, job.kv_cache_bytes // job.kv_bytes_per_token // 256 * 256)
        settings.n_batch = BATCH
        settings.n_threads = settings.n_threads_batch = job.threads
        for name, value in job.options.get("context", {}).items():
            setattr(settings, name, value)
        return settings

    def versions(self) -> dict[str, str]:
        return {"llama_cpp_python": self.api.__version__, "system": self.api.llama_print_system_info().decode().strip()}

    def prepare(self, workload: str) -> None:
        if self.context:
            self.api.llama_free(self.context)
        settings = self._context_settings(workload)
        self.context = self.api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.memory = self.api.llama_get_memory(self.context)
        self.slots = min(self.job.slots, settings.n_seq_max)

    def generate(self, requests: list[Request]) -> list[Answer]:
        self.api.llama_memory_clear(self.memory, False)
        answers = [Answer() for _ in requests]
        waiting = deque(zip(requests, answers, strict=True))
        free, running = deque(range(self.slots)), []
        while waiting or running:
            while waiting and free:
                running.append(Slot(free.popleft(), *waiting.popleft()))
            self._step(running)
            for slot in [slot for slot in running if slot.is_done]:
                self.api.llama_memory_seq_rm(self.memory, slot.number, -1, -1)
                running.remove(slot)
                free.append(slot.number)
        return answers

    def score(self, scoring: Scoring) -> list[float]:
        """The shared tokens once, handed to a sequence per request, then all own tokens."""
        self.api.llama_memory_clear(self.memory, False)
        shared, scores = len(scoring.shared), []
        if scoring.shared:
            self._call([Token(token, p, 0, False) for p, token in enumerate(scoring.shared)])
            for number in range(1, len(scoring.own) + 1):
                self.api.llama_memory_seq_cp(self.memory, 0, number, -1, -1)
        rows, wanted = [], []
        for number, (own, target) in enumerate(zip(scoring.own, scoring.targets, strict=True), 1):
            if len(rows) + len(own) > BATCH:
                scores += self._scored(rows, wanted)
                rows, wanted = [], []
            rows += [Token(token, shared + p, number, p == len(own) - 1) for p, token in enumerate(own)]
            wanted.append((len(rows) - 1, target))
        return scores + self._scored(rows, wanted)

    def _scored(self, rows: list[Token], wanted: list[tuple[int, int]]) -> list[float]:
        import numpy as np

        self._call(rows)
        scores = []
        for row, target in wanted:
            logits = self._logits(row).astype(np.float64)
            top = logits.max()
            scores.append(float(logits[target] - top - np.log(np.exp(logits - top).sum())))
        return scores

    def _step(self, running: list[Slot]) -> None:
        rows: list[Token] = []
        ends: list[tuple[int, Slot]] = []
        for slot in sorted(running, key=lambda slot: slot.computed < len(slot.request.prompt)):
            if len(rows) < BATCH:
                rows += slot.rows(BATCH - len(rows))
                if rows[-1].wants_logits:
                    ends.append((len(rows) - 1, slot))
        self._call(rows)
        tokens = [(slot, int(self._logits(row).argmax())) for row, slot in ends]
        now = time.perf_counter()
        for slot, token in tokens:
            slot.answer.add(token, now)

    def _call(self, rows: list[Token]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for place, row in enumerate(rows):
            batch.token[place], batch.pos[place], batch.logits[place] = row.id, row.position, row.wants_logits
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = row.slot
        code = self.api.llama_decode(self.context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def _logits(self, row: int) -> Any:
        import numpy as np

        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, row), shape=(self.job.vocab_size,))


def make_derived(job: Job) -> None:
    """Write the checkpoint as GGUF once. It holds no vocabulary: token ids go in and out."""
    if job.derived.exists():
        return
    import gguf

    config = json.loads((Path(job.model) / "config.json").read_text())
    kind = job.options["weights"]
    temporary = job.derived.with_name(job.derived.name + ".partial")
    writer = gguf.GGUFWriter(temporary, config["model_type"])
    _write_header(writer, config, gguf.LlamaFileType.MOSTLY_BF16 if kind == "bf16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    for name, array in read_tensors(Path(job.model)):
        _add_tensor(writer, gguf_name(name), array, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.rename(job.derived)


def _write_header(writer: Any, config: dict, file_type: int) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("no_vocab")


def _add_tensor(writer: Any, name: str, bits: Any, kind: str) -> None:
    """`bits`: bf16 as uint16. Norms and biases go in as float32, as llama.cpp wants them."""
    import gguf
    import numpy as np

    if bits.ndim == 1 or kind == "q8_0":
        wide = (bits.astype(np.uint32) << 16).view(np.float32)
    if bits.ndim == 1:
        writer.add_tensor(name, wide)
    elif kind == "bf16":
        writer.add_tensor(name, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        codes = gguf.quants.quantize(wide, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{LAYER_NAMES[part]}.{kind}"


def read_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names and bf16 bits (uint16, mapped from the files) of all tensors of a checkpoint."""
    import numpy as np

    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = struct.unpack("<Q", data[:8])[0]
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise ValueError(f"{path.name}: {name} is {entry['dtype']}; only BF16 is read here")
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            yield name, np.frombuffer(data, np.uint16, (end - begin) // 2, begin).reshape(entry["shape"])


if __name__ == "__main__":
    main(LlamaCpp, make_derived)
