"""The measuring client against real sockets: a scripted server for the protocol's corners, ours for the rest."""

from __future__ import annotations

import gzip
import itertools
import time

import pytest
from scripted_server import DONE, HEAD, ScriptedServer, chat_chunk, event, failure, text_chunk, usage

from ascend_kit.measure import http
from ascend_kit.measure.endpoint import Client
from ascend_kit.measure.streams import Chunk, EventParser, token_times
from ascend_kit.measure.workload import Request, make_requests
from ascend_kit.params.engines import OpenAIEngine


def asked(*scripts, count=1, concurrency=1, codec=None, requests=None, **endpoint):
    """Records of requests to a scripted server, the client and the server."""
    server = ScriptedServer(*scripts)
    client = Client(OpenAIEngine(base_url=server.url, model="m", **endpoint), codec)
    try:
        found = client.run(requests or make_requests(count, 8, 4, vocab_size=200), concurrency)
    finally:
        server.close()
    return found, client, server


@pytest.mark.parametrize("cut", range(1, 12))
def test_events_are_the_same_however_the_network_cuts_them(cut):
    stream = ": ping\r\n\r\nid: 7\r\nevent: x\r\ndata: é\r\ndata:b\r\n\r\ndata: 一\r\rdata: 2\n\ndata: last".encode()
    parser, found = EventParser(), []

    for start in range(0, len(stream), cut):
        found += parser.feed(stream[start : start + cut])
    found += parser.end()

    assert [data.decode() for data in found] == ["é\nb", "一", "2", "last"]


def test_tokens_of_one_chunk_came_at_one_time_and_nothing_is_invented():
    chunks = [Chunk(1.0, "role", None, 5), Chunk(2.0, "text", None, 5), Chunk(3.0, "text", None, 5)]
    told = [Chunk(1.0, "text", 1, 5), Chunk(2.0, "text", 3, 5)]

    assert token_times(chunks, 5) == [2.0, 2.0, 2.0, 3.0, 3.0]  # 3 + 2, as even as it goes
    assert token_times(told, 4) == [1.0, 2.0, 2.0, 2.0]
    assert token_times(chunks, 1) == [2.0]  # one token whose text came in two pieces
    assert token_times([], 3) == []


def test_a_whole_answer_is_asked_again_where_the_server_is_busy_and_not_where_it_refuses(monkeypatch):
    monkeypatch.setattr(http, "WAIT_S", 0.0)
    good = failure("200 OK", '{"choices": []}')
    heard = []
    for scripts, times, expected in (
        ([failure("503 Service Unavailable"), good], 2, {"choices": []}),
        ([failure("400 Bad Request", "no such field")], 1, "400: no such field"),
        ([failure("200 OK", "no JSON")], 3, "JSONDecodeError"),
    ):
        server = ScriptedServer(*scripts)
        endpoint = OpenAIEngine(base_url=server.url, model="m", retries=2, leave_out=["top_k"], extra_body={"own": 1})
        (answer,) = http.ask(endpoint, "/v1/x", [{"top_k": 3}], on_answer=lambda place, value: heard.append(place))
        server.close()
        assert server.bodies == [{"model": "m", "own": 1}] * times
        assert answer == expected if isinstance(expected, dict) else expected in str(answer)
    assert heard == [0, 0, 0]


def test_usage_role_reasoning_and_empty_chunks_are_told_apart():
    parts = [
        chat_chunk(role="assistant", content=""),
        chat_chunk(reasoning_content="thin"),
        chat_chunk(reasoning="k"),
        chat_chunk(content=""),
        chat_chunk(content="answer"),
        chat_chunk(reason="stop"),
        {"choices": [], "usage": usage(9, 4)},
    ]
    script = [(0, HEAD), *((0.02 * n, event(part)) for n, part in enumerate(parts, 1)), (0.2, DONE)]

    (record,), _, server = asked(script, api="chat", requests=[Request(0, (1, 2), 4, text="hello")])

    assert [chunk[1] for chunk in record.chunks] == [
        "role", "text", "text", "empty", "text", "finish", "usage", "done",
    ]  # fmt: skip
    assert (record.num_prompt_tokens, record.num_output_tokens, record.tokens_counted_by) == (9, 4, "usage")
    assert record.finish_reason == "stop" and record.error is None
    times = [chunk[0] for chunk in record.chunks if chunk[1] == "text"]
    assert list(record.token_times_s) == [times[0], times[0], times[1], times[2]]  # 4 tokens in 3 chunks
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "hello"}]


def test_usage_on_the_finish_chunk_and_a_stream_without_done_are_understood():
    final = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}], "usage": usage(3, 2)}
    script = [(0, HEAD), (0.01, event(text_chunk("a"))), (0.02, event(text_chunk("b"))), (0.03, event(final, b""))]

    (record,), *_ = asked(script)

    assert (record.num_output_tokens, record.finish_reason, record.error) == (2, "length", None)
    assert [chunk[1] for chunk in record.chunks] == ["text", "text", "finish"]
    assert list(record.token_times_s) == [chunk[0] for chunk in record.chunks[:2]]  # the total is no third token


def test_continuous_usage_of_a_chunk_without_text_is_a_token_that_is_held_back():
    parts = [text_chunk(text, usage=usage(3, n)) for n, text in enumerate(("a", "", "é"), 1)]
    script = [(0, HEAD), *((0.02 * n, event(part)) for n, part in enumerate(parts, 1)), (0.07, DONE)]

    (record,), *_ = asked(script)

    assert [tuple(chunk[1:3]) for chunk in record.chunks[:3]] == [("text", 1)] * 3
    assert record.num_output_tokens == 3 and len(set(record.token_times_s)) == 3


def test_continuous_usage_tells_how_many_tokens_a_chunk_has():
    parts = [text_chunk("a", usage=usage(3, 1)), text_chunk("bcd", usage=usage(3, 4))]
    script = [(0, HEAD), (0.01, event(parts[0])), (0.03, event(parts[1])), (0.04, DONE)]

    (record,), *_ = asked(script)

    assert [chunk[2] for chunk in record.chunks if chunk[1] == "text"] == [1, 3]
    gaps = [after - before for before, after in itertools.pairwise(record.token_times_s)]
    assert gaps[0] > 0.01 and gaps[1:] == [0, 0]


def test_without_usage_a_tokenizer_counts_and_without_one_the_chunks():
    script = [(0, HEAD), (0.01, event(text_chunk("ab"))), (0.02, event(text_chunk("c"))), (0.03, DONE)]

    class Letters:
        def encode(self, text, *, add_special_tokens):
            return list(text)

        def decode(self, token_ids, *, skip_special_tokens=False):
            return "text"

    (counted,), *_ = asked(script, codec=Letters())
    (plain,), *_ = asked(script)

    assert (counted.num_output_tokens, counted.tokens_counted_by) == (3, "tokenizer")
    assert (plain.num_output_tokens, plain.tokens_counted_by) == (2, "chunks")


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ([event({"error": {"message": "out of memory"}}), DONE], "out of memory"),
        ([event({"error": "plain text"})], "plain text"),
        ([event(b"<html>")], "no JSON"),
        ([], "ended without a finish reason"),
    ],
)
def test_an_error_after_tokens_is_a_failure_and_not_an_answer(end, told):
    script = [(0, HEAD), (0.01, event(text_chunk("a"))), *((0.02, part) for part in end)]

    (record,), *_ = asked(script, retries=3)

    assert told in record.error and not record.is_complete
    assert record.num_retries == 0 and len(record.chunks) >= 1  # what was streamed is kept and not asked for again


A = event(text_chunk("a"))
ENDED = event({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (event(b""), None),  # a sign of life
        (b": ping\r\n\r\n", None),
        (b"event: ping\nid: 3\nretry: 10\n\n", None),
        (event({"choices": None, "usage": None, "id": "x"}), None),
        (event({"choices": [], "usage": {"prompt_tokens": None, "completion_tokens": None}}), None),
        (event({"choices": [], "usage": {"prompt_tokens": "many", "prompt_tokens_details": 3}}), None),
        (event({"error": None, **text_chunk("")}), None),
        (event({"choices": [{"index": 0, "text": "", "finish_reason": "abort"}]}), None),  # the last one counts
        (event({"object": "error", "message": "no room", "code": 400}), "no room"),
        (event({"error": {"message": None, "code": 7}}), "'code': 7"),
        (event({"error": ""}), "an error without a word"),
        (b"event: error\n" + event({"message": "overloaded"}), "overloaded"),
        (event(b"[1]"), "no chunk of an answer: b'[1]'"),
        (event({"choices": [None]}), "no chunk of an answer"),
        (event({"choices": [{"delta": "x"}]}), "no chunk of an answer"),
        (event({"choices": [{"delta": {"content": ["x"]}}]}), "no chunk of an answer"),
        (event({"choices": [], "usage": 5}), "no chunk of an answer"),
        (event(b"\xff\xfe"), "no JSON"),
        (event(b"[" * 20_000), "no JSON"),
    ],
)
def test_an_odd_event_is_an_error_of_its_answer_or_nothing_and_never_of_the_run(odd, told):
    (record,), *_ = asked([(0, HEAD), (0.01, A), (0.02, odd), (0.03, ENDED), (0.04, DONE)])

    assert record.chunks[0][1] == "text"
    if told is None:
        assert record.error is None and record.finish_reason == "stop" and record.num_output_tokens == 1
        assert (record.num_prompt_tokens, record.num_cached_tokens) == (8, 0)
    else:
        assert told in record.error and not record.is_complete


@pytest.mark.parametrize(
    ("reason", "is_complete"), [("eos_token", True), ("tool_calls", True), ("abort", False), ("content_filter", False)]
)
def test_only_a_good_end_completes_an_answer_whatever_a_server_calls_it(reason, is_complete):
    end = event({"choices": [{"index": 0, "text": "", "finish_reason": reason}]})

    (record,), *_ = asked([(0, HEAD), (0.01, A), (0.02, end), (0.03, DONE)])

    assert record.is_complete is is_complete
    assert is_complete or reason in record.error


def test_a_byte_order_mark_and_text_that_looks_like_the_end_change_nothing():
    parts = [event(text_chunk(text)) for text in ("a", "[DONE]", "b")]
    script = [(0, HEAD), (0.01, b"\xef\xbb\xbf" + parts[0]), (0.02, parts[1]), (0.08, parts[2]), (0.09, DONE)]

    (record,), *_ = asked(script)

    assert record.num_output_tokens == 3 and record.error is None
    assert record.finished_s - record.token_times_s[0] > 0.07


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (failure("200 OK", '{"choices": [{"text": "whole"}]}'), "does the server stream"),
        (failure("200 OK", "<html>log in</html>"), "application/octet-stream: '<html>log in</html>'"),
        (failure("200 OK", ""), "no event came"),
        (failure("204 No Content", ""), "HTTP 204"),
        (failure("301 Moved\r\nLocation: https://other/v1", ""), "it is at https://other/v1: name that in base_url"),
        (failure("307 Moved\r\nLocation: /v2", ""), "it is at /v2"),
        ([(0, b"HTTP/1.1 500 X\r\nContent-Length: 2\r\nConnection: close\r\n\r\n\xff\xfe")], "HTTP 500: \ufffd\ufffd"),
        ([(0, b"nonsense\r\n\r\n")], "Bad"),
        ([(0, b"")], "disconnected"),
    ],
)
def test_what_is_no_stream_is_named_and_not_asked_again_where_that_cannot_help(monkeypatch, answer, told):
    monkeypatch.setattr(http, "WAIT_S", 0.0)

    (record,), _, server = asked(answer, retries=1)

    assert told.lower() in record.error.lower() and not record.is_complete
    can_help = any(word in told for word in ("500", "Bad", "disconnected"))
    assert record.num_retries == can_help == len(server.bodies) - 1


def test_a_stream_that_is_packed_or_has_a_length_is_read_all_the_same():
    body = A + ENDED  # no [DONE]
    packed = gzip.compress(body)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (packed[:9], packed[9:])) + b"0\r\n\r\n"
    gz = HEAD[:-2] + b"Transfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n\r\n"
    sized = HEAD[:-2] + b"Content-Length: %d\r\n\r\n" % len(body)
    start = time.perf_counter()

    for script in ([(0, gz + chunks[:20]), (0.02, chunks[20:]), (1.0, b"")],
                   [(0, sized + body[:9]), (0.02, body[9:]), (1.0, b"")]):  # fmt: skip
        (record,), *_ = asked(script)
        assert (record.error, record.num_output_tokens, record.finish_reason) == (None, 1, "stop")
    (broken,), *_ = asked([(0, gz), (0.02, b"5\r\nplain\r\n0\r\n\r\n")])

    assert not broken.is_complete and "Payload" in broken.error
    assert time.perf_counter() - start < 1.0  # nothing waited for the connection to close


def test_a_server_that_only_pings_is_silent():
    pings = [(0.05 * n, b"7\r\n: ping\n\r\n") for n in range(1, 40)]
    head = HEAD[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
    start = time.perf_counter()

    (record,), *_ = asked([(0, head), *pings], idle_s=0.2)

    assert "nothing came for 0.2 s" in record.error and time.perf_counter() - start < 1.0


def test_retries_are_counted_and_their_time_is_part_of_the_latency(monkeypatch):
    monkeypatch.setattr(http, "WAIT_S", 0.05)
    good = [(0, HEAD), (0.01, A), (0.02, DONE)]
    slow = [(0.1, failure()[0][1])]

    (record,), client, server = asked(slow, good, retries=1)
    (refused,), *_ = asked(failure("429 Too Many Requests", "slow down"))
    (wrong,), _, asked_once = asked(failure("400 Bad Request", "no such field"), retries=3)

    assert record.num_retries == 1 and record.is_complete and len(server.bodies) == 2
    assert record.token_times_s[0] - record.arrival_s > 0.15 and client.facts["num_retries"] == 1
    assert refused.error == "HTTP 429: slow down"
    assert wrong.num_retries == 0 and len(asked_once.bodies) == 1


def test_a_server_that_says_when_to_come_again_is_heard():
    said = [{"Retry-After": "7"}, {}, {"Retry-After": "soon"}, {"Retry-After": "86400"}]

    assert [http.wait_s(3, headers) for headers in said] == [7, 4, 4, 60]
    (record,), *_ = asked(failure("429 Too Many\r\nRetry-After: 0", ""), [(0, HEAD), (0, A), (0, DONE)], retries=1)
    assert record.is_complete and record.token_times_s[0] - record.arrival_s < 0.5  # and not after a second


def test_an_error_of_our_own_ends_the_run_and_does_not_hang():
    class Broken:
        def encode(self, text, *, add_special_tokens):
            raise KeyError("no such token")

        def decode(self, token_ids, *, skip_special_tokens=False):
            return "text"

    with pytest.raises(KeyError, match="no such token"):
        asked([(0, HEAD), (0.01, event(text_chunk("a"))), (0.02, DONE)], count=3, codec=Broken())


@pytest.mark.parametrize("cut", [1, 7, 64, 100_000])
def test_a_chunked_stream_over_a_kept_connection_ends_with_its_last_chunk_however_it_is_cut(cut):
    """No [DONE], and the server closes two seconds later."""
    parts = [event(text_chunk(letter, usage=usage(8, n))) for n, letter in enumerate("ab一", 1)]
    final = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}], "usage": usage(8, 3)}
    head = HEAD[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [*parts, event(final)]) + b"0\r\n\r\n"
    pieces = [body[at : at + cut] for at in range(0, len(body), cut)]
    script = [(0, head), *((0.01 + 0.0001 * n, piece) for n, piece in enumerate(pieces)), (2.0, b"")]

    start = time.perf_counter()
    (record,), *_ = asked(script)

    assert time.perf_counter() - start < 1.5  # it does not wait for the connection to close
    assert (record.num_output_tokens, record.error, record.finish_reason) == (3, None, "length")
    assert [chunk[1] for chunk in record.chunks] == ["text"] * 3 + ["finish"]
    assert list(record.token_times_s) == sorted(record.token_times_s)


def test_a_stream_that_is_cut_off_keeps_what_came():
    head = HEAD[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
    part = event(text_chunk("a"))

    (record,), *_ = asked([(0, head), (0.02, b"%x\r\n%b\r\n" % (len(part), part)), (0.04, b"5\r\nda")])

    assert "Payload" in record.error and [chunk[1] for chunk in record.chunks] == ["text"]


def test_a_silent_stream_ends_by_the_idle_limit():
    (record,), *_ = asked([(0, HEAD), (0.01, event(text_chunk("a"))), (5, DONE)], idle_s=0.2)

    assert "imeout" in record.error


def test_nobody_is_there():
    client = Client(OpenAIEngine(base_url="http://127.0.0.1:9/v1", model="m"))

    (record,) = client.run(make_requests(1, 8, 4, vocab_size=200), 1)

    assert "Cannot connect" in record.error and client.get("/v1/models") is None


def test_closed_loop_and_timed_arrivals_hold_on_the_wire():
    script = [(0, HEAD), (0.05, event(text_chunk("a", usage=usage(8, 1)))), (0.06, DONE)]
    timed = [Request(n, (n + 1, 2), 1, send_at_s=0.1 * n) for n in range(4)]
    turns = [Request(0, (1, 2), 1), Request(1, (1, 2, 3), 1, after=0, send_at_s=0.1)]

    _, _, closed = asked(script, count=6, concurrency=2)
    open_loop, *_ = asked(script, requests=timed, concurrency=9)
    first, second = asked(script, requests=turns, concurrency=9)[0]

    assert closed.most_at_once == 2 and len(closed.bodies) == 6
    arrivals = sorted(record.arrival_s for record in open_loop)
    assert [after - before for before, after in itertools.pairwise(arrivals)] == pytest.approx([0.1] * 3)  # by plan
    assert all(0 <= record.sent_s - record.arrival_s < 0.05 for record in open_loop)
    assert second.arrival_s == pytest.approx(first.end_s + 0.1, abs=0.05)


def test_fields_a_server_refuses_can_be_left_out_and_others_added():
    _, _, server = asked(
        [(0, HEAD), (0.01, event(text_chunk("a"))), (0.02, DONE)],
        leave_out=["stream_options", "min_tokens", "ignore_eos"], extra_body={"top_k": 1},
    )  # fmt: skip

    assert server.bodies[0].keys() == {"model", "prompt", "temperature", "stream", "max_tokens", "top_k"}
    assert len(server.bodies[0]["prompt"]) == 8
