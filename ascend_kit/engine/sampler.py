"""From logits to tokens, for all requests of a step in a few batched operators and without reading the device.

Each sampled row gets one uniform number made on the host from (seed, position), so a request's tokens depend on its
seed alone: not on the batch it sits in, nor on the order of steps.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ascend_kit.device.device import upload
from ascend_kit.device.ops import reference
from ascend_kit.engine.sequence import Sequence, TokenLogprobs

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on both arguments alone: SplitMix64 (Steele, Lea, Flood 2014) of their mix."""
    state = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((state ^ (state >> 31)) >> 40) / (1 << 24)  # 24 bits: exact in float32


def sample(logits: Tensor, sequences: list[Sequence], eos_ids: tuple[int, ...], ops: ModuleType = reference) -> Tensor:
    """Next token of each sequence, int64 [R], from logits [R, V]."""
    logits = _forbid_early_end(logits, sequences, eos_ids)
    greedy = ops.argmax(logits)
    rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
    if not rows:
        return greedy
    chosen = _draw(
        logits if len(rows) == len(sequences) else logits[_index(rows, logits)], [sequences[row] for row in rows]
    )
    return chosen if len(rows) == len(sequences) else greedy.index_copy(0, _index(rows, logits), chosen)


def token_logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of `tokens` [R], and ids and log-probabilities [R, num_top] of the best; float32."""
    wide = logits.float()
    normaliser = wide.logsumexp(-1, keepdim=True)
    chosen = (wide.gather(-1, tokens.unsqueeze(-1)) - normaliser).squeeze(-1)
    best = wide.topk(num_top, dim=-1)
    return chosen, best.indices, best.values - normaliser


def record_logprobs(logits: Tensor, tokens: Tensor, sequences: list[Sequence]) -> None:
    """Append the log-probabilities that some of the sequences asked for; reads the device once."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
    if not rows:
        return
    index = _index(rows, logits)
    most = max(sequences[row].sampling.logprobs for row in rows)
    chosen, ids, values = token_logprobs(logits[index], tokens[index], most)
    for place, (row, logprob, top_ids, top) in enumerate(
        zip(rows, chosen.tolist(), ids.tolist(), values.tolist(), strict=True)
    ):
        count = sequences[rows[place]].sampling.logprobs
        sequences[row].logprobs.append(TokenLogprobs(logprob, list(zip(top_ids[:count], top[:count], strict=True))))


def _draw(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Inverse-CDF sampling after temperature, top-k and top-p, on logits [R, V]."""
    params = [sequence.sampling for sequence in sequences]
    vocabulary = logits.shape[-1]
    # One host-to-device copy for all per-row numbers.
    numbers = upload(
        torch.tensor(
            [
                [
                    p.temperature,
                    p.top_p,
                    min(p.top_k or vocabulary, vocabulary),
                    uniform(p.seed or 0, s.num_output_tokens),
                ]
                for p, s in zip(params, sequences, strict=True)
            ],
            dtype=torch.float32,
        ),
        logits.device,
    )
    temperature, top_p, top_k, draw = numbers.unsqueeze(-1).unbind(1)
    values, ids = (logits.float() / temperature).sort(-1, descending=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    rank = torch.arange(vocabulary, device=logits.device)
    # The most probable token always stays, whatever top_p is.
    keep = ((rank < top_k) & (before < top_p)) | (rank == 0)
    cumulative = (probabilities * keep).cumsum(-1)
    place = (cumulative <= draw * cumulative[:, -1:]).sum(-1, keepdim=True)
    # Rounding may push the last step past the kept tokens.
    place = torch.minimum(place, keep.sum(-1, keepdim=True) - 1)
    return ids.gather(-1, place).squeeze(-1)


def _forbid_early_end(logits: Tensor, sequences: list[Sequence], eos_ids: tuple[int, ...]) -> Tensor:
    pairs = [
        (row, token)
        for row, s in enumerate(sequences)
        if s.num_output_tokens < s.sampling.min_new_tokens
        for token in (*eos_ids, *s.sampling.stop_token_ids)
    ]
    if not pairs:
        return logits
    rows, tokens = zip(*pairs, strict=True)
    logits = logits.clone()
    logits[_index(rows, logits), _index(tokens, logits)] = -torch.inf
    return logits


def _index(values: list[int] | tuple[int, ...], like: Tensor) -> Tensor:
    return upload(torch.tensor(values, dtype=torch.int64), like.device)
