"""Arrivals against their formulas, traces against hand-written files, and what requests share."""

from __future__ import annotations

import itertools
import json
import statistics

import numpy as np
import pytest

from ascend_kit.files import FileError
from ascend_kit.measure.loads import arrival_times, build, read_load_prompts, read_trace
from ascend_kit.measure.rows import Point
from ascend_kit.params import build_experiment
from ascend_kit.run.checks import RunError, check_contents

COMMON = {"vocab_size": 500, "seed": (1,), "max_total_len": 4096}


def of_load(load="closed", prompt_len=10, output_len=4, count=8, **values):
    return Point(4, prompt_len, output_len, count, load=load, **values)


def times(count=4000, **load):
    return arrival_times(of_load(**load), count, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n\xff", "cannot be read"),
        ("t.jsonl", b'{"timestamp": NaN, "input_length": 5, "output_length": 5}', "request 1: .* nan is no time"),
        ("t.jsonl", b'{"timestamp": 1, "input_length": 1e999, "output_length": 5}', "request 1: .*: inf tokens"),
        ("t.jsonl", b'{"timestamp": 1, "input_length": -5, "output_length": 5}', "request 1: .*: -5 tokens"),
        ("t.jsonl", b'{"timestamp": 1, "input_length": 5.5, "output_length": 5}', "request 1: .*: 5.5 tokens"),
        ("t.jsonl", b'{"timestamp": 1, "input_length": 5}', "request 1: .*KeyError: 'output_length'"),
        ("t.json", b'[{"timestamp": 1, "input_length": 5, "output_length": 5}, 6]', "request 2: expected Mooncake"),
        ("t.json", b'[{"timestamp": 1,', "request 1: expected Mooncake"),
        ("t.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,5\n", "request 1: .*TypeError"),
        ("t.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
        ("t.csv", b"\xef\xbb\xbf \n\n", "holds no request"),
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

    first, second = build(load, file=path, **COMMON)  # the third does not fit into 4,096 tokens

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


def test_a_trace_is_read_whatever_its_order_its_marks_and_the_form_of_its_numbers(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b"\xef\xbb\xbfTIMESTAMP, ContextTokens, GeneratedTokens\r\n"
        b"2024-05-10 00:00:02.500000+00:00,30,3.0\r\n\r\n2024-05-10T00:00:01Z,20,2\r\n"
    )
    rows = [{"timestamp": 3000, "input_length": 7, "output_length": 1, "hash_ids": None},
            {"timestamp": -1000, "input_length": 8.0, "output_length": 0}]  # fmt: skip
    (tmp_path / "b.jsonl").write_text("\n \n" + "\n".join(map(json.dumps, rows)) + "\n")

    assert read_trace(tmp_path / "a.csv") == [(0.0, 20, 2, ()), (1.5, 30, 3, ())]
    assert read_trace(tmp_path / "b.jsonl") == [(0.0, 8, 0, ()), (4.0, 7, 1, ())]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    assert read_trace(tmp_path / "list.json") == read_trace(tmp_path / "b.jsonl")
    (only,) = build(of_load("trace", rate=1.0), file=str(tmp_path / "b.jsonl"), **COMMON)
    assert len(only.prompt_token_ids) == 7  # nothing was written for the other


def test_a_prompt_with_fewer_blocks_than_its_length_needs_is_as_long_as_the_trace_says(tmp_path):
    row = {"timestamp": 0, "input_length": 2000, "output_length": 3, "hash_ids": [5]}
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({**row, "timestamp": at}) for at in (0, 1)))

    first, second = build(of_load("trace", rate=1.0), file=str(tmp_path / "t.jsonl"), **COMMON)

    assert len(first.prompt_token_ids) == len(second.prompt_token_ids) == 2000
    assert first.prompt_token_ids[:512] == second.prompt_token_ids[:512]
    assert first.prompt_token_ids[512:1024] != second.prompt_token_ids[512:1024]


def turns(*pairs, key="value", role="from"):
    return {"conversations": [{role: who, key: text} for who, text in pairs]}


ANSWERED = ("q", "a")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (turns(("human", "q"), ("gpt", "a"), ("human", "more")), ANSWERED),
        (turns(("system", "be kind"), ("human", "q"), ("gpt", "a")), ANSWERED),
        (turns(("gpt", "hello"), ("human", "q"), ("bing", "a")), ANSWERED),
        (turns(("user", "q"), ("tool", "42"), ("assistant", "a"), key="content", role="role"), ANSWERED),
        ({"conversations": [{"value": "q"}, {"value": "a"}]}, ANSWERED),
        ({"conversation": [{"human": "q", "assistant": "a"}]}, ANSWERED),
        (turns(("human", "q"), ("human", "again"), ("gpt", "a")), None),
        (turns(("gpt", "a"), ("system", "x")), None),
        (turns(("human", "q")), None),
        (turns(("human", ""), ("gpt", "a")), None),
        ({"conversations": None}, None),
        ({"id": "x"}, None),
    ],
)
def test_of_a_conversation_the_first_question_and_its_answer_are_taken_whatever_the_roles(tmp_path, entry, expected):
    plain = turns(("human", "one"), ("gpt", "two"))
    (tmp_path / "list.json").write_text(json.dumps([entry, plain]), encoding="utf-8-sig")
    (tmp_path / "lines.jsonl").write_text(json.dumps(entry) + "\n\n" + json.dumps(plain) + "\n")

    for name in ("list.json", "lines.jsonl"):
        assert read_load_prompts(tmp_path / name) == [pair for pair in (expected, ("one", "two")) if pair]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([turns(("human", "q"))], "none of 1 conversations has a question and its answer"),
        ([turns(("human", 3), ("gpt", "a"))], "expected a text as the value of a turn, got 3"),
        ([turns(("human", "q"), ("gpt", None))], "expected a text"),
        ([turns(("human", "q"), ("gpt", "a")), 5], "is no list of conversations"),
        ([{"conversations": ["q", "a"]}], "is no list of conversations"),
        ([{"conversations": [{"from": "human", "words": "q"}, {"from": "gpt", "words": "a"}]}], "no list of conv"),
    ],
)
def test_damaged_conversations_are_refused_by_name(tmp_path, content, words):
    (tmp_path / "talks.json").write_text(json.dumps(content))

    with pytest.raises(FileError, match=rf"load_prompts .*talks\.json.*{words}"):
        read_load_prompts(tmp_path / "talks.json")


def test_trace_and_prompts_of_a_load_are_read_before_a_run_starts(tmp_path):
    (tmp_path / "t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n")
    (tmp_path / "p.json").write_text(json.dumps([turns(("human", "q"))]))
    values = {"output_root": str(tmp_path), "trace_file": str(tmp_path / "t.csv"), "load": "trace"}
    experiment = build_experiment({**values, "load_prompts": str(tmp_path / "p.json")})

    with pytest.raises(RunError, match=r"trace_file .*t\.csv, request 1: .*; load_prompts .*p\.json: none of 1"):
        check_contents(experiment, ["trace_file", "load_prompts"], converts=False)


def test_turns_carry_their_history_and_wait_for_each_other():
    requests = build(of_load("poisson", count=6, rate=4.0, turns=3, think_s=0.5), **COMMON)

    assert [len(r.prompt_token_ids) for r in requests] == [10, 24, 38] * 2
    assert [r.after for r in requests] == [None, 0, 1, None, 3, 4]
    assert requests[2].prompt_token_ids[:24] == requests[1].prompt_token_ids
    assert [r.send_at_s for r in requests if r.after is not None] == [0.5] * 4
    assert requests[3].send_at_s == pytest.approx(0.5)  # the second of two conversations, at 2 / 4 s


def test_a_share_of_each_prompt_is_common_and_the_rest_is_not():
    requests = build(of_load(prompt_len=40, shared_prefix=0.5), **COMMON)

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
        build(of_load(output_len=9, count=3), tokenizer=Letters(), file=str(tmp_path / name), **COMMON)
        for name in ("sharegpt.json", "lines.jsonl")
    )

    assert len({r.text for r in shared}) == 3
    assert all(r.num_output_tokens == int(r.text.split()[1]) for r in shared)
    assert sorted(r.text for r in plain) == ["one", "two"] and {r.num_output_tokens for r in plain} == {9}
