"""Train the demo's byte-level tokenizer and its small Qwen3 model; both are saved as Hugging Face files."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.demo.corpus import CHAT_TEMPLATE, END_OF_TEXT, IM_END, IM_START, Corpus
from ascend_kit.files import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

VOCAB_SIZE = 2048
MODEL_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 32768,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# About 50 s on two cores.
STEPS, BATCH, LENGTH = 170, 6, 320
MATRIX_LR, OTHER_LR = 0.015, 4e-3
WARMUP_STEPS, FLOOR_SHARE = 20, 0.05
MAX_SHARD_SIZE = "2MB"


def train_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of 2,048 entries: every byte string survives encoding and decoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(Corpus().all_text(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START, IM_END],
        model_max_length=MODEL_SIZES["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def train_model(
    tokenizer: "PreTrainedTokenizerFast", *, steps: int = STEPS, seed: int = 0, on_progress: Progress | None = None
) -> "Qwen3ForCausalLM":
    """Train from scratch for `steps` updates of BATCH x LENGTH tokens; the caller's random state is kept."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(tokenizer).train()
        optimizers = _optimizers(model)
        for step, batch in zip(range(steps), _batches(tokenizer, seed), strict=False):
            _loss(model, *batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, peak in optimizers:
                optimizer.param_groups[0]["lr"] = peak * learning_rate_share(step, steps)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if on_progress is not None:
                on_progress(step + 1, steps)
    return model.eval()


def save_model(model: "Qwen3ForCausalLM", tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write a bfloat16 checkpoint in several shards, with tokenizer and generation settings."""
    model = model.bfloat16()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def learning_rate_share(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, then a cosine down to FLOOR_SHARE."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(steps - WARMUP_STEPS, 1)
    return FLOOR_SHARE + (1 - FLOOR_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


def _new_model(tokenizer: "PreTrainedTokenizerFast") -> "Qwen3ForCausalLM":
    from transformers import Qwen3Config, Qwen3ForCausalLM

    end_of_text: Any = tokenizer.eos_token_id
    config = Qwen3Config(
        **MODEL_SIZES, bos_token_id=None, eos_token_id=end_of_text, pad_token_id=end_of_text, use_cache=True
    )
    return Qwen3ForCausalLM(config)


def _optimizers(model: "Qwen3ForCausalLM") -> list[tuple["torch.optim.Optimizer", float]]:
    """Muon for the layers' matrices and AdamW for the rest, each with its peak rate.

    Muon reaches the same loss in about half the steps AdamW needs here, and its step costs 5 % more time.
    """
    import torch

    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0)
    return [(muon, MATRIX_LR), (adamw, OTHER_LR)]


def _batches(tokenizer: "PreTrainedTokenizerFast", seed: int) -> Iterator[tuple["torch.Tensor", ...]]:
    """Packed batches without end: token ids, loss weights and document numbers, each [BATCH, LENGTH + 1]."""
    import torch

    rows = _rows(tokenizer, seed)
    while True:
        ids, weights, documents = zip(*(next(rows) for _ in range(BATCH)), strict=True)
        yield torch.tensor(ids), torch.tensor(weights), torch.tensor(documents)


def _rows(tokenizer: "PreTrainedTokenizerFast", seed: int) -> Iterator[tuple[list[int], list[float], list[int]]]:
    """Rows of LENGTH + 1 tokens: whole documents behind each other, the last one cut."""
    documents = Corpus(seed).documents()
    encode = functools.cache(lambda text: tokenizer.encode(text, add_special_tokens=False))
    while True:
        ids: list[int] = []
        weights: list[float] = []
        numbers: list[int] = []
        number = 0
        while len(ids) <= LENGTH:
            for text, weight in next(documents):
                tokens = encode(text)
                ids += tokens
                weights += [weight] * len(tokens)
            numbers += [number] * (len(ids) - len(numbers))
            number += 1
        yield ids[: LENGTH + 1], weights[: LENGTH + 1], numbers[: LENGTH + 1]


def _loss(
    model: "Qwen3ForCausalLM", ids: "torch.Tensor", weights: "torch.Tensor", documents: "torch.Tensor"
) -> "torch.Tensor":
    """Weighted mean cross entropy; a token sees its own document only, as it will when it is scored alone."""
    import torch
    import torch.nn.functional as F

    same = documents[:, None, :-1, None] == documents[:, None, None, :-1]
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    # Rotary embedding only sees distances, so positions may run on across documents.
    logits = model(input_ids=ids[:, :-1], attention_mask=same & causal, use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    # The first token of a document cannot be told from what stands before it.
    target_weights = (weights[:, 1:] * (documents[:, 1:] == documents[:, :-1]).float()).flatten()
    return (losses * target_weights).sum() / target_weights.sum()
