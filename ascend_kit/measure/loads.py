"""The loads that users have: when requests arrive, how long they are, what they share; seeded, the same everywhere."""

from __future__ import annotations

import csv
import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ascend_kit.files import FileError, one_line, require_regular
from ascend_kit.measure.rows import Point
from ascend_kit.measure.workload import Request, make_requests
from ascend_kit.prompts import read_entries, read_prompts

if TYPE_CHECKING:
    from ascend_kit.engine.text import Tokenizer

TRACE_BLOCK = 512  # tokens that one of Mooncake's hash_ids stands for
TIMED = ("constant", "poisson", "gamma", "ramp", "trace")


class TraceEntry(NamedTuple):
    """One recorded request; `blocks` are ids of its prompt's prefixes, where the trace has them."""

    at_s: float
    prompt_len: int
    output_len: int
    blocks: tuple[int, ...] = ()


def arrival_times(load: Point, count: int, rng: np.random.Generator) -> list[float | None]:
    """Seconds after the start for each of `count` requests; None where a free place decides.

    Random gaps are scaled so that the last request comes at count / rate, as vLLM's benchmark does: two seeds differ in
    the pattern and not in the rate. Gamma gaps of shape b have a coefficient of variation of 1 / sqrt(b). A ramp's rate
    grows linearly in time.
    """
    if load.load == "closed":
        return [None] * count
    if load.load == "all_at_once":
        return [0.0] * count
    rate, numbers = load.rate or 1.0, np.arange(count)
    end = load.rate_end or 4 * rate
    if load.load == "constant" or (load.load == "ramp" and end == rate):
        return (numbers / rate).tolist()
    if load.load == "ramp":
        slope = (end - rate) / (2 * count / (rate + end))
        # Requests so far after t: rate t + slope t^2 / 2.
        return ((np.sqrt(rate**2 + 2 * slope * numbers) - rate) / slope).tolist()
    shape = 1.0 if load.load == "poisson" else load.burstiness or 1.0
    times = np.cumsum(rng.gamma(shape, 1 / (rate * shape), count))
    return (times * (count / rate / times[-1])).tolist()


def build(
    load: Point,
    *,
    vocab_size: int,
    seed: tuple[int, ...],
    avoid_ids: Sequence[int] = (),
    max_total_len: int,
    file: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[Request]:
    """The requests of a point's load; at most so many of `file`, a trace or a user's prompts, where it has one.

    Those longer than `max_total_len` tokens are left out of a file; ValueError when none is left.
    """
    rng = np.random.default_rng(np.random.SeedSequence((*seed, 7)))
    drawn = {"vocab_size": vocab_size, "seed": seed, "avoid_ids": avoid_ids}
    drawn["shared_prefix_len"] = int(load.shared_prefix * load.prompt_len)
    if load.load == "trace":
        assert file is not None
        return _from_trace(file, load, vocab_size, seed, max_total_len)
    if file is not None:
        assert tokenizer is not None
        requests = _from_prompts(file, load, max_total_len, tokenizer, rng)
    elif load.turns > 1:
        requests = _conversations(load, drawn)
    else:
        lengths = (load.num_requests, load.prompt_len, load.output_len)
        requests = make_requests(*lengths, spread=load.length_spread, max_total_len=max_total_len, **drawn)
    first = [request for request in requests if request.after is None]
    times = dict(zip((r.index for r in first), arrival_times(load, len(first), rng), strict=True))
    return [replace(r, send_at_s=times[r.index]) if r.after is None else r for r in requests]


def _conversations(load: Point, drawn: dict) -> list[Request]:
    """Turn k carries the turns before it and the replies that were written for them, so that every engine gets the
    same prompts whatever it answers; it is sent when turn k - 1 has ended."""
    talks, per_turn = max(1, load.num_requests // load.turns), load.prompt_len + load.output_len
    requests = []
    for talk in make_requests(talks, load.turns * per_turn - load.output_len, load.output_len, **drawn):
        for turn in range(load.turns):
            index, ids = len(requests), talk.prompt_token_ids[: turn * per_turn + load.prompt_len]
            wait_s, after = (load.think_s, index - 1) if turn else (None, None)
            requests.append(Request(index, ids, load.output_len, send_at_s=wait_s, after=after))
    return requests


# --- traces -----------------------------------------------------------------------------------------------------------


def read_trace(path: str | Path) -> list[TraceEntry]:
    """A trace in Mooncake's JSON lines (`timestamp` in ms, `input_length`, `output_length`, `hash_ids`) or Azure's CSV
    (`TIMESTAMP`, `ContextTokens`, `GeneratedTokens`), from its first request on. ValueError names file and line."""
    path = Path(path)
    try:
        require_regular(path)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise FileError(f"trace_file {path} cannot be read: {error}") from None
    lines = [line for line in lines if line.strip()]
    first = lines[0].lstrip()[:1] if lines else "{"
    entries: list[TraceEntry] = []
    try:
        if first in "[{":
            rows = map(_mooncake, json.loads("".join(lines)) if first == "[" else map(json.loads, lines))
        else:
            rows = map(_azure, csv.DictReader(lines, skipinitialspace=True))
        for row in rows:
            entries.append(row)  # one by one: a fault is in the next
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, csv.Error) as error:
        raise FileError(
            f"trace_file {path}, request {len(entries) + 1}: expected Mooncake's JSON lines (timestamp, input_length, "
            "output_length) or Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens): "
            f"{type(error).__name__}: {error}"
        ) from None
    if not entries:
        raise FileError(f"trace_file {path} holds no request")
    entries.sort(key=lambda entry: entry.at_s)
    return [entry._replace(at_s=entry.at_s - entries[0].at_s) for entry in entries]


def _azure(row: dict[str, str]) -> TraceEntry:
    at = datetime.datetime.fromisoformat(row["TIMESTAMP"].strip())
    at = at if at.tzinfo else at.replace(tzinfo=datetime.UTC)  # the clock here may jump, theirs did not
    return TraceEntry(at.timestamp(), _count(row["ContextTokens"]), _count(row["GeneratedTokens"]))


def _mooncake(row: dict[str, Any]) -> TraceEntry:
    at_s, blocks = float(row["timestamp"]) / 1e3, tuple(int(block) for block in row.get("hash_ids") or ())
    if not math.isfinite(at_s):
        raise ValueError(f"{at_s} is no time")
    return TraceEntry(at_s, _count(row["input_length"]), _count(row["output_length"]), blocks)


def _count(value: Any) -> int:
    """A number of tokens, also as tables with gaps write it, 12.0."""
    if float(value) % 1 or float(value) < 0:
        raise ValueError(f"{value} tokens")
    return int(float(value))


def _from_trace(path: str, load: Point, vocab_size: int, seed: tuple[int, ...], max_total_len: int) -> list[Request]:
    kept = [e for e in read_trace(path) if e.output_len > 0 and 0 < e.prompt_len <= max_total_len - e.output_len]
    if not kept:
        raise ValueError(f"trace_file {path}: no request fits into max_seq_length {max_total_len}")
    start_s, requests = kept[0].at_s, []
    for index, entry in enumerate(kept[: load.num_requests]):
        # Own ids below zero, where the trace has none or too few: nothing of them is shared.
        own = (-1 - index * 10**6 - n for n in range(len(entry.blocks), -(-entry.prompt_len // TRACE_BLOCK)))
        ids = [token for block in (*entry.blocks, *own) for token in _block(block, vocab_size, seed)]
        at_s = (entry.at_s - start_s) / (load.rate or 1.0)
        requests.append(Request(index, tuple(ids[: entry.prompt_len]), entry.output_len, send_at_s=at_s))
    return requests


def _block(number: int, vocab_size: int, seed: tuple[int, ...]) -> list[int]:
    words = (*seed, abs(number), int(number < 0))
    return np.random.default_rng(np.random.SeedSequence(words)).integers(3, vocab_size, TRACE_BLOCK).tolist()


# --- a user's prompts -------------------------------------------------------------------------------------------------


ASKING, ASIDE = ("human", "user", "prompter", ""), ("system", "tool", "function")
TALK = ("conversations", "conversation")


def read_load_prompts(path: str | Path) -> Sequence[tuple[str, str | None]]:
    """(prompt, reply or None) of a file: ShareGPT's `conversations` as a list or in JSON lines, of each the first
    question with the answer to it, or any file that `prompts_file` may be."""
    entries = [entry for _, entry in read_entries(path, "load_prompts")]
    if not any(isinstance(entry, dict) and any(name in entry for name in TALK) for entry in entries):
        return [(str(prompt), None) for prompt in read_prompts(path, "load_prompts")]
    try:
        talks = [next((entry[name] for name in TALK if entry.get(name)), []) for entry in entries]
        pairs = [pair for talk in talks if (pair := _first_pair(talk)) and pair[0]]
    except (KeyError, TypeError, AttributeError) as error:
        raise FileError(f"load_prompts {path} is no list of conversations: {type(error).__name__} {error}") from None
    for wrong in (text for pair in pairs for text in pair if not isinstance(text, str)):
        raise FileError(f"load_prompts {path}: expected a text as the value of a turn, got {one_line(wrong)[:80]}")
    if not pairs:
        raise FileError(f"load_prompts {path}: none of {len(entries)} conversations has a question and its answer")
    return pairs


def _first_pair(talk: list[dict[str, Any]]) -> tuple[str, str] | None:
    """The first question of a conversation and the answer that follows it, whatever stands before or between them;
    turns that name no role take turns."""
    if talk and "human" in talk[0]:  # swift's turns are pairs
        return talk[0]["human"], talk[0]["assistant"]
    turns = [(str(turn.get("from") or turn.get("role") or "").lower(), turn) for turn in talk]
    turns = [(role, turn) for role, turn in turns if role not in ASIDE]
    start = next((place for place, (role, _) in enumerate(turns) if role in ASKING), len(turns))
    found = turns[start : start + 2]
    if len(found) < 2 or (found[1][0] and found[1][0] in ASKING):
        return None
    first, second = (turn["value"] if "value" in turn else turn["content"] for _, turn in found)
    return first, second


def _from_prompts(
    path: str, load: Point, max_total_len: int, tokenizer: Tokenizer, rng: np.random.Generator
) -> list[Request]:
    """A seeded choice without repetition; a reply in the file gives the output length."""
    pairs = read_load_prompts(path)
    requests: list[Request] = []
    for place in rng.permutation(len(pairs)):
        if len(requests) == load.num_requests:
            break
        prompt, reply = pairs[int(place)]
        ids = tokenizer.encode(prompt)
        length = load.output_len if reply is None else max(1, len(tokenizer.encode(reply)))
        if ids and len(ids) + length <= max_total_len:
            requests.append(Request(len(requests), tuple(ids), length, text=prompt))
    if not requests:
        raise ValueError(f"load_prompts {path}: no prompt fits into max_seq_length {max_total_len}")
    return requests
