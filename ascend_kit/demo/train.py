"""Train the demo's byte-level tokenizer and its small Qwen3 model; both are saved as Hugging Face files."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ascend_kit.demo.corpus import CHAT_TEMPLATE, END_OF_TEXT, IM_END, IM_START, Corpus

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
STEPS, BATCH, LENGTH = 220, 6, 320
PEAK_LR, FLOOR_LR, WARMUP_STEPS = 4e-3, 2e-4, 20
MAX_SHARD_SIZE = "2MB"

Progress = Callable[[int, int], None]


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
    tokenizer: "PreTrainedTokenizerFast",
    *,
    steps: int = STEPS,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> "Qwen3ForCausalLM":
    """Train from scratch for `steps` updates of BATCH x LENGTH tokens; the caller's random state is kept."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(tokenizer)
        optimizer = _optimizer(model)
        batches = _batches(tokenizer, seed)
        model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            loss = _loss(model, *next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if on_progress is not None:
                on_progress(step + 1, steps)
    return model.eval()


def save_model(model: "Qwen3ForCausalLM", tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write a bfloat16 checkpoint in several shards, with tokenizer and generation settings."""
    import torch

    model = model.to(torch.bfloat16)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from PEAK_LR down to FLOOR_LR."""
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    share = (step - WARMUP_STEPS) / max(steps - WARMUP_STEPS, 1)
    return FLOOR_LR + (PEAK_LR - FLOOR_LR) * 0.5 * (1 + math.cos(math.pi * share))


def _new_model(tokenizer: "PreTrainedTokenizerFast") -> "Qwen3ForCausalLM":
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **MODEL_SIZES,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return Qwen3ForCausalLM(config)


def _optimizer(model: "Qwen3ForCausalLM") -> "torch.optim.Optimizer":
    import torch

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))


def _batches(
    tokenizer: "PreTrainedTokenizerFast", seed: int
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """Packed batches without end: token ids [BATCH, LENGTH + 1] and the loss weight of each."""
    import torch

    stream = _token_stream(tokenizer, seed)
    size = BATCH * (LENGTH + 1)
    while True:
        pairs = [next(stream) for _ in range(size)]
        ids = torch.tensor([token for token, _ in pairs]).view(BATCH, LENGTH + 1)
        weights = torch.tensor([weight for _, weight in pairs]).view(BATCH, LENGTH + 1)
        yield ids, weights


def _token_stream(tokenizer: "PreTrainedTokenizerFast", seed: int) -> Iterator[tuple[int, float]]:
    cache: dict[str, list[int]] = {}
    for document in Corpus(seed).documents():
        for text, weight in document:
            if text not in cache:
                cache[text] = tokenizer.encode(text, add_special_tokens=False)
            for token in cache[text]:
                yield token, weight


def _loss(model: "Qwen3ForCausalLM", ids: "torch.Tensor", weights: "torch.Tensor") -> "torch.Tensor":
    import torch.nn.functional as F

    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    target_weights = weights[:, 1:].flatten()
    return (losses * target_weights).sum() / target_weights.sum()
