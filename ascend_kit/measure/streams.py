"""What a server streams, kept as it came: bytes with their times, server-sent events, and chunks from which every
convention is derived later.

The corners are those of vLLM, SGLang, MindIE and transformers serve: CRLF and CR line ends, comments, fields over
several lines, characters cut by the network, a missing last blank line, no [DONE], a role chunk before the first token,
usage apart or on the last chunk, several tokens in a chunk, reasoning beside content, errors after a status of 200.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp


class Chunk(NamedTuple):
    """One event of a stream: when it was read (time.perf_counter seconds), what it carried, tokens where told, bytes.

    `kind` is text, role, empty, finish, usage, error or done; a chunk that carries text and more is text.
    """

    time_s: float
    kind: str
    num_tokens: int | None
    num_bytes: int


class EventParser:
    """Splits a byte stream into the data of its events, by the rules of the HTML standard for text/event-stream."""

    def __init__(self) -> None:
        self._rest, self._ended_cr, self._is_first = b"", False, True
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The data of each event that ends in what came."""
        if self._ended_cr and data[:1] == b"\n":  # the second half of a line end that the network cut
            data, self._ended_cr = data[1:], False
        if data:
            self._ended_cr = data.endswith(b"\r")
        *lines, self._rest = (self._rest + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            yield from self._line(line)

    def end(self) -> Iterator[bytes]:
        """The data of an event that the server did not finish with a blank line."""
        yield from self._line(self._rest)
        yield from self._line(b"")

    def _line(self, line: bytes) -> Iterator[bytes]:
        if not line:
            if self._data:
                yield b"\n".join(self._data)
            self._data = []
            return
        if self._is_first:
            self._is_first, line = False, line.removeprefix(b"\xef\xbb\xbf")
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))


@dataclass
class Answer:
    """One answer as it came; `take` reads an event."""

    chunks: list[Chunk] = field(default_factory=list)
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    error: str | None = None
    is_done: bool = False
    _told: int | None = 0  # tokens that continuous usage has told of; None: there is none

    def take(self, data: bytes, now_s: float) -> None:
        """Add one event's data. What is no answer of the protocol is an error of this answer, never of the program."""
        if not data.strip():  # a sign of life
            return
        if data.strip() == b"[DONE]":
            self.is_done = True
            self.chunks.append(Chunk(now_s, "done", None, len(data)))
            return
        try:
            value = json.loads(data)
            told = _error_in(value)
            kind, count = ("error", None) if told else self._content(value)
        except (ValueError, RecursionError):
            told, kind, count = f"an event is no JSON: {data[:80]!r}", "error", None
        except (AttributeError, TypeError, LookupError):
            told, kind, count = f"an event is no chunk of an answer: {data[:80]!r}", "error", None
        self.error = self.error or told
        self.chunks.append(Chunk(now_s, kind, count, len(data)))

    def _content(self, value: dict[str, Any]) -> tuple[str, int | None]:
        usage, choices = value.get("usage") or {}, value.get("choices") or []
        self.usage |= {name: one for name, one in usage.items() if one is not None}
        if not choices:
            return "usage" if usage else "empty", None
        choice = choices[0]
        delta = choice.get("delta") or {}
        text = choice.get("text") or delta.get("content") or ""
        # One field or the other, whatever the server calls it; where both are sent they say the same.
        text += delta.get("reasoning_content") or delta.get("reasoning") or ""
        self.text += text
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        count = len(choice["token_ids"]) if isinstance(choice.get("token_ids"), list) else self._count_told(usage)
        if text and count is None:
            self._told = None  # a total that comes later says nothing of the chunk that carries it
        if text or count:
            return "text", count
        if self.finish_reason:
            return "finish", count
        return ("role" if "role" in delta else "empty"), count

    def _count_told(self, usage: dict[str, Any]) -> int | None:
        """Tokens of a chunk by its continuous usage, None where there is none, or where it shrinks."""
        total, before = usage.get("completion_tokens"), self._told
        if total is None or before is None:
            return None
        self._told = total if total >= before else None
        return None if self._told is None else total - before

    def number(self, name: str, part: str = "") -> int:
        """A count of the server's usage, or of a part of that; 0 where it has none."""
        counts = self.usage.get(part) if part else self.usage
        value = counts.get(name) if isinstance(counts, dict) else None
        return value if isinstance(value, int) else 0

    @property
    def text_chunks(self) -> list[Chunk]:
        """The chunks that carried tokens."""
        return [chunk for chunk in self.chunks if chunk.kind == "text"]


def _error_in(value: Any) -> str | None:
    """What an event says has gone wrong: OpenAI's `error`, vLLM's bare error object, or a `message` with no choices."""
    told = value.get("error")
    if told is None and (value.get("object") == "error" or not value.keys() & {"choices", "usage"}):
        told = value.get("message")
    if told is None:
        return None
    told = told.get("message") or told if isinstance(told, dict) else told
    return str(told or "an error without a word")


def token_times(chunks: Sequence[Chunk], num_tokens: int) -> list[float]:
    """When each of `num_tokens` came: as told chunk by chunk, else shared out over the chunks as evenly as they go.

    Tokens of one chunk came at one time: their gaps are zero, and no token is given a time of its own that nobody saw.
    """
    texts = [chunk for chunk in chunks if chunk.kind == "text"]
    if not texts or num_tokens <= 0:
        return []
    told = [chunk.num_tokens for chunk in texts]
    counts = [count for count in told if count is not None]
    if len(counts) < len(told) or sum(counts) != num_tokens:
        share, extra = divmod(num_tokens, len(texts))
        if share == 0:  # a token's text may come in pieces: the first chunk and the last are the certain ones
            texts = [*texts[: num_tokens - 1], texts[-1]] if num_tokens > 1 else texts[:1]
        counts = [share + (place < extra) if share else 1 for place in range(len(texts))]
    return [chunk.time_s for chunk, count in zip(texts, counts, strict=True) for _ in range(count)]


# --- off the connection ---------------------------------------------------------------------------------------------

Take = Callable[[float, bytes], bool]  # (perf_counter seconds, bytes); True where no more is wanted
SLICE = 16  # reads that are given to aiohttp before other streams have a turn
# The end of a stream as bytes on the wire: the last event, or the last chunk of HTTP's chunked encoding.
LAST_EVENT, LAST_CHUNK = re.compile(rb"data: ?\[DONE\]"), b"\r\n0\r\n\r\n"
PING = re.compile(rb"(?:(?:[0-9A-Fa-f]+\r\n)?:[^\r\n]*[\r\n]+)+")  # comments alone: a server that lives, not its stream


class Tap(asyncio.Protocol):
    """Keeps (time.perf_counter seconds, bytes) of each read until the stream looks ended or the connection is lost.

    A token costs aiohttp a timer, a parser, a wake-up and a task: some 60 us. With 256 streams of 50 tokens/s that is
    more than one core has, and every time taken is late. So once the head of an answer is there, asyncio's
    `set_protocol` hands the connection over; when the stream has ended, aiohttp gets its bytes as if just come.
    """

    def __init__(self) -> None:
        self.reads: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost: tuple[BaseException | None, ...] = ()  # why the connection was, once it was
        self._tail, self._last_s = b"", time.perf_counter()

    def data_received(self, data: bytes) -> None:
        self.reads.append((time.perf_counter(), data))
        if not PING.fullmatch(data):
            self._last_s = self.reads[-1][0]
        seen = self._tail + data
        if LAST_EVENT.search(seen) or seen.endswith(LAST_CHUNK):
            self._end()
        self._tail = seen[-12:]

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost = (exc,)
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    async def wait(self, idle_s: float) -> bool:
        """Until the end, which is true; false when nothing but comments came for `idle_s`."""
        while not self.ended.done():
            left_s = self._last_s + idle_s - time.perf_counter()
            if left_s <= 0:
                return False
            await asyncio.wait([self.ended], timeout=left_s)
        return True


async def read_stream(
    response: aiohttp.ClientResponse, idle_s: float, on_end: Callable[[], None], take: Take, turn: asyncio.Lock
) -> None:
    """Give `take` all that is read of an answer's body, decoded, each with its time, once the stream has ended.

    `on_end` is called at that moment, before anything is decoded. Answers that share `turn` are decoded one after the
    other: however many end at once, a stream that still runs waits for one slice.
    Raises aiohttp.ClientError, after what had come, for a stream that breaks or is silent for `idle_s`.
    """
    content, connection = response.content, response.connection
    transport = connection.transport if connection is not None else None
    # A body of known length is no stream, and its end would not be seen.
    is_open = response.content_length is None and not content.is_eof()
    if connection is not None and transport is not None and is_open:
        handler, tap = connection.protocol, Tap()
        assert handler is not None
        handler.read_timeout = None  # of aiohttp, which sees nothing meanwhile
        handler.start_timeout()
        first = (time.perf_counter(), content.read_nowait(-1))
        transport.set_protocol(tap)
        try:
            has_ended = await tap.wait(idle_s)
            on_end()
            async with turn:
                is_done = take(*first)
                for number, (time_s, data) in enumerate(tap.reads):  # which may still grow
                    if is_done:
                        break
                    handler.data_received(data)
                    is_done = take(time_s, content.read_nowait(-1))
                    if number % SLICE == SLICE - 1:
                        await asyncio.sleep(0)
        finally:
            transport.set_protocol(handler)
            if tap.lost:
                handler.connection_lost(*tap.lost)
        if is_done:
            return
        if not has_ended:
            raise aiohttp.ServerTimeoutError(f"Timeout: nothing came for {idle_s:g} s")
    async for data in content.iter_any():
        if take(time.perf_counter(), data):
            return
