"""Prompt files: what is taken for what, and how a fault reads."""

from __future__ import annotations

import json
import os

import pytest

from ascend_kit.prompts import Prompt, PromptsError, read_prompts

LINES = '{"prompt": "x"}\n\n{"text": "y", "id": 3}\n'
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.txt", LINES),
        ("a.jsonl", LINES.replace("\n", "\r\n")),
        ("a.jsonl", "\ufeff" + LINES),
        ("a.json", '["x", {"content": "y"}]'),
        ("a.jsonl", '[\n "x",\n {"prompt": "y"}\n]\n'),
        ("a.jsonl", '"x"\n"y"\n'),
        ("a.txt", "x\n\ny\n"),
        ("a.txt", "\ufeffx\r\ny"),
        ("noending", "x\ry\r"),
    ],
)
def test_content_and_not_the_suffix_says_what_a_file_is(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())

    assert read_prompts(tmp_path / name) == ["x", "y"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c"])
def test_separators_inside_a_prompt_do_not_end_it(tmp_path, separator):
    prompts = [f"one{separator}two", "three"]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p in prompts[1:])
    )
    (tmp_path / "a.txt").write_bytes("\n".join(prompts).encode())

    assert read_prompts(tmp_path / "a.txt") == prompts
    assert read_prompts(tmp_path / "a.jsonl") == prompts[1:]


def test_text_that_only_looks_like_json_stays_text(tmp_path):
    lines = ["[INST] Hello [/INST]", '"Quoted"', "{x} is a set", "42"]
    (tmp_path / "a.txt").write_text("\n".join(lines))

    assert read_prompts(tmp_path / "a.txt") == lines


def test_an_empty_field_leaves_the_word_to_the_filled_one(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": None, "text": "", "messages": TURNS}))

    assert read_prompts(tmp_path / "a.jsonl")[0].messages == TURNS


@pytest.mark.parametrize("field", ["messages", "prompt"])
def test_a_conversation_keeps_its_messages(tmp_path, field):
    (tmp_path / "a.jsonl").write_text(json.dumps({field: TURNS}) + '\n{"prompt": "alone"}\n')

    conversation, alone = read_prompts(tmp_path / "a.jsonl")

    assert conversation.messages == TURNS
    assert conversation == "system: Be brief.\nuser: Hello"
    assert alone.messages is None and alone == "alone"
    assert isinstance(alone, Prompt)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{\n "prompts": ["x"]\n}', r"one JSON object with the fields \['prompts'\]"),
        ("a.json", '{"prompts": ["x"]}', r"line 1: .*found an object with the fields \['prompts'\]"),
        ("a.jsonl", '{"prompt": "x"}\n{"promt": "y"}\n', r"line 2: .*found an object with the fields \['promt'\]"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', "line 2: not JSON"),
        ("a.txt", '{"prompt": "x"}\nplain\n', "line 2: not JSON, but line 1 is"),
        ("a.jsonl", '{"prompt": ""}\n', "line 1"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": "x", "text": "x and y"}\n', "line 2: has prompt and text; which one"),
        ("a.json", json.dumps([{"prompt": "x", "messages": TURNS}]), "entry 1: has prompt and messages; which one"),
        ("a.jsonl", '{"prompt": null}\n', "line 1"),
        ("a.jsonl", '{"prompt": "x", "prompt": "y"}\n', "line 1: not JSON"),
        ("a.json", '["x", 3]', "entry 2: .*found 3"),
        ("a.json", json.dumps(TURNS), "entry 1: a message by itself"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": ["x"]}]}', "line 1"),
        ("a.json", "[]", "empty JSON list"),
        ("a.json", "[" * 100_000, "line 1: not JSON"),
        ("a.txt", "\n\n", "holds no prompt"),
        ("a.txt", "\ufeff", "holds no prompt"),
        ("a.txt", b"x\xff", "not UTF-8 text: byte 1 is 0xff"),
        ("a.txt", "x\ny\n".encode("utf-16-le"), "a NUL stands at character 1"),
        ("a.csv", 'prompt,answer\n"a, b",c\n', "is a table by its name"),
        ("a.txt", '{\n "prompt": "x"\n}\n{\n "prompt": "y"\n}\n', "line 1: not JSON"),
        ("a.jsonl", '{"prompt": "  "}', "line 1: expected a text"),
        ("a.jsonl", '{"prompt": "x", "prompt": "y"}', "a field stands twice"),
        ("a.jsonl", '{"prompt": "x", "tools": [{"type": "function"}]}', "line 1: tools cannot be handed on"),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}',
            "line 1, message 1: tool_calls cannot be handed on",
        ),
        ("a.jsonl", '{"messages": [{"role": "", "content": "x"}]}', "line 1, message 1: expected a content"),
        ("a.jsonl", '{"messages": [{"role": "human", "content": "x"}]}', "one of system, user, .*'human'"),
        ("a.jsonl", '{"system": "Be brief.", "prompt": "x"}', "line 1: system cannot be handed on"),
        ("a.txt", "x" * ((1 << 24) + 1), "a prompt of 16777217 characters"),
    ],
)
def test_a_fault_names_parameter_file_and_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(PromptsError, match=message) as error:
        read_prompts(path, "calibration_file")

    assert str(error.value).startswith(f"calibration_file {path}") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_what_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(PromptsError, match="cannot be read"):
        read_prompts(tmp_path / name)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(PromptsError, match="it is a pipe or a device"):
        read_prompts(tmp_path / "pipe")


@pytest.mark.parametrize("path", ["a\0b", "\ud83d"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(PromptsError, match="is no path"):
        read_prompts(path)
