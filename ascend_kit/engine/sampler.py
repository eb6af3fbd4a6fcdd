"""From logits to tokens, for all requests of a step in a few batched operators and without reading the device.

Each sampled row gets one uniform number made on the host from (seed, position), so a request's tokens depend on its
seed alone: not on the batch it sits in, nor on the order of steps.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from types import ModuleType

import torch
from torch import Tensor

from ascend_kit.device.device import upload
from ascend_kit.device.ops import reference
from ascend_kit.engine.sequence import Sequence, TokenLogprobs
from ascend_kit.engine.speculation import Ahead

_MASK = (1 << 64) - 1
NOT_FINITE = -1  # in place of a token: the row's logits hold NaN or infinity
LEAST_TEMPERATURE = 1e-30  # smaller ones are not numbers in float32; differences of logits overflow long before


def mix(seed: int, number: int) -> int:
    """64 bits that depend on both arguments alone: SplitMix64 (Steele, Lea, Flood 2014) of their mix."""
    state = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on both arguments alone."""
    return (mix(seed, position) >> 40) / (1 << 24)  # 24 bits: exact in float32


Sampled = Sequence | Ahead


def sample(logits: Tensor, sequences: Seq[Sampled], eos_ids: tuple[int, ...], ops: ModuleType = reference) -> Tensor:
    """Next token of each sequence, int64 [R], from logits [R, V]; NOT_FINITE where a row holds NaN or infinity."""
    # One pass over the logits: a sum is finite where all of them are, in any dtype but float16, whose range is small.
    is_finite = logits.sum(-1, dtype=torch.float32 if logits.dtype == torch.float16 else None).isfinite()
    logits = _penalise(logits, sequences)
    logits = _forbid_early_end(logits, sequences, eos_ids)
    tokens = ops.argmax(logits)
    rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
    if len(rows) == len(sequences):
        tokens = _draw(logits, sequences)
    elif rows:
        index = _index(rows, logits)
        tokens = tokens.index_copy(0, index, _draw(logits[index], [sequences[row] for row in rows]))
    return tokens.where(is_finite, NOT_FINITE)


def token_logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of `tokens` [R], and ids and log-probabilities [R, num_top] of the best; float32."""
    wide = logits.float()
    normaliser = wide.logsumexp(-1, keepdim=True)
    chosen = (wide.gather(-1, tokens.unsqueeze(-1)) - normaliser).squeeze(-1)
    best = wide.topk(num_top, dim=-1)
    return chosen, best.indices, best.values - normaliser


def record_logprobs(logits: Tensor, tokens: Tensor, sequences: Seq[Sampled]) -> None:
    """Append the log-probabilities that some of the sequences asked for; reads the device once."""
    wanted = {row: s.sampling.logprobs for row, s in enumerate(sequences) if s.sampling.logprobs is not None}
    if not wanted:
        return
    index = _index(list(wanted), logits)
    chosen, ids, values = token_logprobs(logits[index], tokens[index].clamp(min=0), max(wanted.values()))
    found = zip(wanted.items(), chosen.tolist(), ids.tolist(), values.tolist(), strict=True)
    for (row, count), logprob, top_ids, top in found:
        sequences[row].logprobs.append(TokenLogprobs(logprob, list(zip(top_ids[:count], top[:count], strict=True))))


def _draw(logits: Tensor, sequences: Seq[Sampled]) -> Tensor:
    """Inverse-CDF sampling after temperature, top-k, top-p and min-p, on logits [R, V]."""
    params = [sequence.sampling for sequence in sequences]
    vocabulary = logits.shape[-1]
    limits = [min(p.top_k or vocabulary, vocabulary) for p in params]
    # One host-to-device copy for all per-row numbers.
    numbers = upload(
        torch.tensor(
            [
                [max(p.temperature, LEAST_TEMPERATURE), p.top_p, p.min_p, limit, uniform(p.seed or 0, position)]
                for p, limit, position in zip(params, limits, (s.num_output_tokens for s in sequences), strict=True)
            ],
            dtype=torch.float32,
        ),
        logits.device,
    )
    temperature, top_p, min_p, top_k, draw = numbers.unsqueeze(-1).unbind(1)
    if max(limits) < vocabulary:  # what lies behind the largest k need not be sorted
        values, ids = _best(logits.float(), max(limits))
    else:
        values, ids = logits.float().sort(dim=-1, descending=True, stable=logits.device.type == "cpu")
    rank = torch.arange(values.shape[-1], device=logits.device)
    # The best becomes 0 first: a tiny temperature then makes the others minus infinity and never 0 / 0.
    values = ((values - values[:, :1]) / temperature).masked_fill(rank >= top_k, -torch.inf)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # The most probable token always stays, whatever top_p is.
    keep = ((before < top_p) & (probabilities >= min_p * probabilities[:, :1]) & (rank < top_k)) | (rank == 0)
    cumulative = (probabilities * keep).cumsum(-1)
    place = (cumulative <= draw * cumulative[:, -1:]).sum(-1, keepdim=True)
    # Rounding may push the last step past the kept tokens.
    place = torch.minimum(place, keep.sum(-1, keepdim=True) - 1)
    return ids.gather(-1, place).squeeze(-1)


def _best(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest `count` of each row and their ids, descending; on a CPU equal ones by id, as a stable sort has them.

    16-bit logits are often equal, and their order decides which token a number draws.
    """
    if logits.device.type != "cpu":
        return logits.topk(count, -1)
    last = logits.shape[-1] - 1
    bits = (logits + 0.0).view(torch.int32)  # the sum makes minus zero zero
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers in the order of the numbers
    keys = ascending.long().bitwise_left_shift_(32).bitwise_or_(last - torch.arange(last + 1))
    ids = last - (keys.topk(count, -1).values & 0xFFFFFFFF)
    return logits.gather(-1, ids), ids


def _penalise(logits: Tensor, sequences: Seq[Sampled]) -> Tensor:
    """Logits after the penalties for tokens that are there already, as transformers (repetition, over prompt and
    answer) and vLLM (presence, over the answer) define them."""
    repeated = [(row, token, s.sampling.repetition_penalty) for row, s in enumerate(sequences)
                if s.sampling.repetition_penalty != 1.0 for token in set(s.token_ids)]  # fmt: skip
    present = [(row, token, s.sampling.presence_penalty) for row, s in enumerate(sequences)
               if s.sampling.presence_penalty != 0.0 for token in set(s.output_ids)]  # fmt: skip
    if repeated or present:
        logits = logits.float().clone()
    if repeated:
        rows, tokens, penalty = _columns(repeated, logits)
        old = logits[rows, tokens]
        logits[rows, tokens] = torch.where(old < 0, old * penalty, old / penalty)
    if present:
        rows, tokens, penalty = _columns(present, logits)
        logits[rows, tokens] -= penalty
    return logits


def _columns(entries: list[tuple[int, int, float]], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, tokens, numbers = zip(*entries, strict=True)
    return _index(rows, like), _index(tokens, like), upload(torch.tensor(numbers, dtype=torch.float32), like.device)


def _forbid_early_end(logits: Tensor, sequences: Seq[Sampled], eos_ids: tuple[int, ...]) -> Tensor:
    pairs = [
        (row, token)
        for row, s in enumerate(sequences)
        if s.num_output_tokens < s.sampling.min_new_tokens
        for token in (*eos_ids, *s.sampling.stop_token_ids)
        if 0 <= token < logits.shape[-1]
    ]
    if not pairs:
        return logits
    rows, tokens = zip(*pairs, strict=True)
    logits = logits.clone()
    logits[_index(rows, logits), _index(tokens, logits)] = -torch.inf
    return logits


def _index(values: list[int] | tuple[int, ...], like: Tensor) -> Tensor:
    return upload(torch.tensor(values, dtype=torch.int64), like.device)
