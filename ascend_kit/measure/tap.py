"""Takes a stream's bytes off its connection with their times and nothing else; what they mean is read afterwards.

A token costs aiohttp a timer, a parser, a wake-up and a task: some 60 us. With 256 streams of 50 tokens/s that is more
than one core has, and every time taken is late. So once the head of an answer is there, asyncio's `set_protocol` hands
the connection over; when the stream has ended, aiohttp gets its bytes as if they had just come.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable

import aiohttp

Take = Callable[[float, bytes], bool]  # (perf_counter seconds, bytes); True where no more is wanted
SLICE = 16  # reads that are given to aiohttp before other streams have a turn
# The end of a stream as bytes on the wire: the last event, or the last chunk of HTTP's chunked encoding.
LAST_EVENT, LAST_CHUNK = re.compile(rb"data: ?\[DONE\]"), b"\r\n0\r\n\r\n"
PING = re.compile(rb"(?:(?:[0-9A-Fa-f]+\r\n)?:[^\r\n]*[\r\n]+)+")  # comments alone: a server that lives, not its stream


class Tap(asyncio.Protocol):
    """Keeps (time.perf_counter seconds, bytes) of each read until the stream looks ended or the connection is lost."""

    def __init__(self) -> None:
        self.reads: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost: BaseException | None = None
        self.is_lost = False
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
        self.lost, self.is_lost = exc, True
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    async def wait(self, idle_s: float) -> None:
        """Until the end; aiohttp.ServerTimeoutError when nothing but comments came for `idle_s`."""
        while not self.ended.done():
            left_s = self._last_s + idle_s - time.perf_counter()
            if left_s <= 0:
                raise aiohttp.ServerTimeoutError(f"Timeout: nothing came for {idle_s:g} s")
            await asyncio.wait([self.ended], timeout=left_s)


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
        handler, tap, silent = connection.protocol, Tap(), None
        assert handler is not None
        handler.read_timeout = None  # of aiohttp, which sees nothing meanwhile
        handler.start_timeout()
        first = (time.perf_counter(), content.read_nowait(-1))
        transport.set_protocol(tap)
        try:
            try:
                await tap.wait(idle_s)
            except aiohttp.ServerTimeoutError as error:
                silent = error
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
            if tap.is_lost:
                handler.connection_lost(tap.lost)
        if is_done:
            return
        if silent is not None:
            raise silent
    async for data in content.iter_any():
        if take(time.perf_counter(), data):
            return
