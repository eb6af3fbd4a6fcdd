"""A client of OpenAI-compatible servers that measures: streams of any number at once, raw chunks, its own lag."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from ascend_kit.measure.http import BUSY, Endpoint, TextCodec, get, open_session, refusal, run_in_loop, wait_s
from ascend_kit.measure.metrics import COMPLETE, RequestRecord, percentile
from ascend_kit.measure.over_time import Recorder, Sample
from ascend_kit.measure.server_facts import observed, read_metrics
from ascend_kit.measure.streams import Answer, EventParser, token_times
from ascend_kit.measure.tap import read_stream
from ascend_kit.measure.workload import Dispatcher, Request

LAG_SAMPLE_S = 0.005
METRICS_EVERY_S = 0.5
LAG_LIMIT_MS = 5.0
OTHER_ENDS = ("eos_token", "stop_sequence", "tool_calls", "function_call")  # other servers' words for a good end


class Client:
    """Drives one endpoint through workloads; after `run`, `facts` holds the client's lag and what the server
    told, `samples` its metrics over time."""

    def __init__(self, endpoint: Endpoint, codec: TextCodec | None = None) -> None:
        self.endpoint, self.codec = endpoint, codec
        self.facts: dict[str, Any] = {}
        self.samples: list[Sample] = []  # of the server's metrics
        self._turn = asyncio.Lock()  # of reading what has come; a new one for each event loop

    def run(
        self, requests: Sequence[Request], concurrency: int, on_done: Callable[[int], None] | None = None
    ) -> list[RequestRecord]:
        """Serve all requests; one record each, in the order they ended. Failures are records too."""
        bodies = {request.index: self.endpoint.body(request, self.codec) for request in requests}
        return run_in_loop(lambda: self._run(requests, bodies, concurrency, on_done))

    def get(self, path: str, timeout_s: float = 10.0) -> Any:
        """The JSON, or else the text, of a GET below the address; None when there is no good answer."""

        async def read() -> Any:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            async with aiohttp.ClientSession(timeout=timeout, headers=self.endpoint.headers) as session:
                return await get(session, self.endpoint.root + path)

        return run_in_loop(read)

    async def _run(
        self,
        requests: Sequence[Request],
        bodies: dict[int, dict[str, Any]],
        concurrency: int,
        on_done: Callable[[int], None] | None,
    ) -> list[RequestRecord]:
        self._turn = asyncio.Lock()
        records: list[RequestRecord] = []
        lags: list[float] = []
        recorder = Recorder[str](METRICS_EVERY_S)
        async with open_session(self.endpoint) as session:
            await self._sample(session, recorder)
            watchers = [
                asyncio.create_task(_measure_lag(lags)),
                asyncio.create_task(self._keep_sampling(session, recorder)),
            ]
            dispatcher, changed = Dispatcher(requests, concurrency, time.perf_counter()), asyncio.Event()
            tasks: list[asyncio.Task[None]] = []
            faults: list[BaseException] = []  # of this program: those of a server are records

            async def serve(request: Request, arrival_s: float) -> None:
                def on_end() -> None:  # its place is free before its answer is read
                    dispatcher.ended(request.index, time.perf_counter())
                    changed.set()

                try:
                    records.append(await self._one(session, request, arrival_s, bodies[request.index], on_end))
                    if on_done:
                        on_done(len(records))
                except BaseException as error:
                    faults.append(error)
                    changed.set()
                    raise

            try:
                while dispatcher.left and not faults:
                    for request, arrival_s in dispatcher.due(time.perf_counter()):
                        tasks.append(asyncio.create_task(serve(request, arrival_s)))
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(changed.wait(), dispatcher.wait_s(time.perf_counter()))
                    changed.clear()
                await asyncio.gather(*tasks)
            finally:
                for task in [*watchers, *tasks]:
                    task.cancel()
                await asyncio.gather(*watchers, *tasks, return_exceptions=True)
            await self._sample(session, recorder)
        # Read only now: a text of vLLM takes some 20 ms, which no stream should wait.
        self.samples = [{"time_s": time_s, **found} for time_s, text in recorder.taken if (found := read_metrics(text))]
        self.facts = {**client_facts(lags, records), **observed(self.samples)}
        return records

    async def _one(
        self,
        session: aiohttp.ClientSession,
        request: Request,
        arrival_s: float,
        body: dict[str, Any],
        on_end: Callable[[], None],
    ) -> RequestRecord:
        """One request and its retries; `on_end` is called once, when its last byte has come or all has failed."""
        sent_s, num_retries, tell = time.perf_counter(), 0, _Once(on_end)
        may_retry = self.endpoint.retries > 0
        answer, pause_s = await self._ask(session, body, (lambda: None) if may_retry else tell)
        # What was streamed is not asked for again, and what was refused for good neither.
        while pause_s is not None and not answer.text_chunks and num_retries < self.endpoint.retries:
            num_retries += 1
            await asyncio.sleep(pause_s(num_retries))
            answer, pause_s = await self._ask(session, body, lambda: None)
        tell()
        return self._record(request, answer, arrival_s, sent_s, num_retries)

    async def _ask(
        self, session: aiohttp.ClientSession, body: dict[str, Any], on_end: Callable[[], None]
    ) -> tuple[Answer, Callable[[int], float] | None]:
        """One try, and where another may help, seconds to wait before it by its number."""
        answer, parser, start, kind, last_s = Answer(), EventParser(), b"", "", time.perf_counter()
        path = "/v1/chat/completions" if self.endpoint.api == "chat" else "/v1/completions"

        def take(time_s: float, data: bytes) -> bool:
            nonlocal start, last_s
            start, last_s = start or data[:200], time_s
            for event in parser.feed(data):
                answer.take(event, time_s)
            return answer.is_done  # some servers keep the connection open

        pause_s: Callable[[int], float] | None = functools.partial(wait_s, headers={})
        options = {"allow_redirects": False, "headers": {"Accept-Encoding": "identity"}}  # nothing held back to pack it
        try:
            async with session.post(self.endpoint.root + path, json=body, **options) as response:
                kind = response.content_type
                if response.status != 200:
                    answer.error = f"HTTP {await refusal(response, 300)}"
                    is_busy = response.status in BUSY
                    return answer, functools.partial(wait_s, headers=dict(response.headers)) if is_busy else None
                await read_stream(response, self.endpoint.idle_s, on_end, take, self._turn)
                for event in parser.end():
                    answer.take(event, last_s)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            answer.error = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if answer.error is None and not answer.chunks:
            answer.error = f"no event came, but {kind}: {start.decode(errors='replace')!r}; does the server stream?"
            pause_s = None
        if answer.error is None and not answer.is_done and answer.finish_reason is None:
            answer.error = "the stream ended without a finish reason"
        if answer.error is None and answer.finish_reason not in (None, *COMPLETE, *OTHER_ENDS):
            answer.error = f"the server ended the answer with {answer.finish_reason!r}"
        return answer, pause_s if answer.error else None

    def _record(
        self, request: Request, answer: Answer, arrival_s: float, sent_s: float, num_retries: int
    ) -> RequestRecord:
        count, source = self._count(answer)
        times = token_times(answer.chunks, count)
        error, end = answer.error, answer.finish_reason
        if error is None and not times:
            error = "no token came"
        return RequestRecord(
            index=request.index,
            num_prompt_tokens=answer.number("prompt_tokens") or len(request.prompt_token_ids),
            num_output_tokens=len(times),
            arrival_s=arrival_s,
            token_times_s=tuple(times),
            finish_reason="error" if error else "stop" if end in OTHER_ENDS else end or "length",
            error=error,
            finished_s=answer.chunks[-1].time_s if answer.chunks else time.perf_counter(),
            num_asked_tokens=request.num_output_tokens,
            num_cached_tokens=answer.num_cached_tokens,
            sent_s=sent_s,
            chunks=tuple(answer.chunks),
            num_retries=num_retries,
            tokens_counted_by=source,
        )

    def _count(self, answer: Answer) -> tuple[int, str]:
        """Tokens of an answer and who counted them."""
        if answer.number("completion_tokens"):
            return answer.number("completion_tokens"), "usage"
        told = [chunk.num_tokens for chunk in answer.text_chunks]
        if told and all(told):
            return sum(count for count in told if count), "token_ids"
        if self.codec is not None and answer.text:
            return len(self.codec.encode(answer.text, add_special_tokens=False)), "tokenizer"
        return len(told), "chunks"

    async def _keep_sampling(self, session: aiohttp.ClientSession, recorder: Recorder[str]) -> None:
        while recorder.taken:  # a server without metrics is not asked again
            await asyncio.sleep(METRICS_EVERY_S)
            if recorder.is_due:
                await self._sample(session, recorder)

    async def _sample(self, session: aiohttp.ClientSession, recorder: Recorder[str]) -> None:
        text = await get(session, self.endpoint.root + "/metrics")
        if isinstance(text, str):
            recorder.add(text)


class _Once:
    """Calls a function the first time it is called."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function

    def __call__(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()


async def _measure_lag(lags: list[float]) -> None:
    """How much later than asked the event loop wakes: what it adds to every time it takes, in seconds."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(LAG_SAMPLE_S)
        lags.append(time.perf_counter() - before - LAG_SAMPLE_S)


def client_facts(lags: Sequence[float], records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Columns about the client itself. `is_client_limited`: its p99 lag is above 5 ms, so times are too long."""
    sends = [record.sent_s - record.arrival_s for record in records if record.sent_s is not None]
    loop_ms, send_ms = ((percentile(values, 99) or 0.0) * 1e3 for values in (lags, sends))
    return {
        "client_lag_p99_ms": loop_ms,
        "send_lag_p99_ms": send_ms,
        "is_client_limited": max(loop_ms, send_ms) > LAG_LIMIT_MS,
        "num_retries": sum(record.num_retries for record in records),
        "tokens_counted_by": ", ".join(sorted({r.tokens_counted_by for r in records if r.tokens_counted_by})),
    }
