"""Arrivals against their formulas, traces against hand-written files, and what requests share."""

from __future__ import annotations

import itertools
import json
import statistics

import numpy as np
import pytest

from ascend_kit.measure.loads import arrival_times, build, read_trace
from ascend_kit.measure.rows import Point

COMMON = {"vocab_size": 500, "seed": (1,), "max_total_len": 4096}


def of_load(load="closed", **values):
    return Point(4, 10, 4, 8, load=load, **values)


def times(count=4000, **load):
    return arrival_times(of_load(**load), count, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n\xff", "cannot be read"),
        ("t.jsonl", b'{"timestamp": NaN, "input_length": 5, "output_length": 5}', "request 1: .* nan is no time"),
        ("t.jsonl", b'{"timestamp": 1, "input_length": 1e999, "output_length": 5}', "request 1: .*OverflowError"),
    ],
)
def test_a_damaged_trace_is_refused_by_name(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ValueError, match=rf"trace_file .*{name}.*{words}"):
        read_trace(tmp_path / name)


def test_every_open_load_has_the_rate_that_was_asked():
    assert times(4, load="constant", rate=2.0) == [0.0, 0.5, 1.0, 1.5]
    assert times(3, load="all_at_once") == [0.0] * 3 and times(3, load="closed") == [None] * 3
    for kind, burstiness, variation in (("poisson", None, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4.0, 0.5)):
        found = times(load=kind, rate=8.0, burstiness=burstiness)
        gaps = [after - before for before, after in itertools.pairwise(found)]
        assert found[-1] == pytest.approx(4000 / 8.0)
        # The coefficient of variation of a gamma distribution is 1 / sqrt(shape); 4,000 draws.
        assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(variation, rel=0.1)


def test_a_ramp_has_its_rates_at_both_ends():
    found = times(300, load="ramp", rate=1.0, rate_end=5.0)
    gaps = [after - before for before, after in itertools.pairwise(found)]

    assert 1 / gaps[0] == pytest.approx(1.0, rel=0.05) and 1 / gaps[-1] == pytest.approx(5.0, rel=0.05)
    assert found[-1] < 100 < found[-1] + 0.25  # 300 requests at 3 a second on average


def test_mooncake_blocks_that_are_shared_are_shared_tokens(tmp_path):
    rows = [
        {"timestamp": 27000, "input_length": 1000, "output_length": 3, "hash_ids": [5, 6]},
        {"timestamp": 27500, "input_length": 700, "output_length": 4, "hash_ids": [5, 9]},
        {"timestamp": 28000, "input_length": 9000, "output_length": 4, "hash_ids": list(range(18))},
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    load, path = of_load("trace", rate=2.0), str(tmp_path / "trace.jsonl")

    first, second = build(load, 9, 1, 1, trace_file=path, **COMMON)  # the third does not fit into 4,096 tokens

    assert (first.send_at_s, second.send_at_s) == (0.0, 0.25)  # twice as fast
    assert (len(first.prompt_token_ids), len(second.prompt_token_ids)) == (1000, 700)
    assert first.prompt_token_ids[:512] == second.prompt_token_ids[:512]
    assert first.prompt_token_ids[512:700] != second.prompt_token_ids[512:700]
    assert (first.num_output_tokens, second.num_output_tokens) == (3, 4)


def test_azure_tables_are_read_and_a_bad_line_is_named(tmp_path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
    (tmp_path / "a.csv").write_text(text + "2023-11-16 18:17:04.4799600,110,27\n")
    (tmp_path / "b.csv").write_text(text + "yesterday,1,1\n")

    assert [(round(e.at_s, 6), *e[1:3]) for e in read_trace(tmp_path / "a.csv")] == [(0.0, 4808, 10), (0.5, 110, 27)]
    with pytest.raises(ValueError, match=r"b\.csv, request 2: expected Mooncake's JSON lines .* or Azure's CSV"):
        read_trace(tmp_path / "b.csv")


def test_turns_carry_their_history_and_wait_for_each_other():
    requests = build(of_load("poisson", rate=4.0, turns=3, think_s=0.5), 6, 10, 4, **COMMON)

    assert [len(r.prompt_token_ids) for r in requests] == [10, 24, 38] * 2
    assert [r.after for r in requests] == [None, 0, 1, None, 3, 4]
    assert requests[2].prompt_token_ids[:24] == requests[1].prompt_token_ids
    assert [r.send_at_s for r in requests if r.after is not None] == [0.5] * 4
    assert requests[3].send_at_s == pytest.approx(0.5)  # the second of two conversations, at 2 / 4 s


def test_a_share_of_each_prompt_is_common_and_the_rest_is_not():
    requests = build(of_load(shared_prefix=0.5), 8, 40, 4, **COMMON)

    assert len({r.prompt_token_ids[:20] for r in requests}) == 1
    assert len({r.prompt_token_ids[20:] for r in requests}) == 8


def test_prompts_of_a_user_keep_their_text_and_the_replies_their_length(tmp_path):
    talks = [{"conversations": [{"from": "human", "value": f"question {n}"}, {"from": "gpt", "value": "x" * n}]}
             for n in range(1, 6)]  # fmt: skip
    (tmp_path / "sharegpt.json").write_text(json.dumps(talks))
    (tmp_path / "lines.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')

    class Letters:
        def encode(self, text):
            return [ord(letter) for letter in text]

    shared, plain = (
        build(of_load(), 3, 1, 9, encoder=Letters(), prompts_file=str(tmp_path / name), **COMMON)
        for name in ("sharegpt.json", "lines.jsonl")
    )

    assert len({r.text for r in shared}) == 3
    assert all(r.num_output_tokens == int(r.text.split()[1]) for r in shared)
    assert sorted(r.text for r in plain) == ["one", "two"] and {r.num_output_tokens for r in plain} == {9}
