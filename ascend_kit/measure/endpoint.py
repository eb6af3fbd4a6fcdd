"""A client of OpenAI-compatible servers that measures: streams of any number at once, raw chunks, its own lag."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import aiohttp

from ascend_kit.measure.http import first_error, get, one_try, open_session, run_in_loop, with_retries
from ascend_kit.measure.metrics import COMPLETE, RequestRecord, percentile
from ascend_kit.measure.over_time import Recorder, Sample, observed, read_metrics
from ascend_kit.measure.streams import Answer, EventParser, read_stream, token_times
from ascend_kit.measure.workload import Dispatcher, OnDone, Request
from ascend_kit.params.engines import OpenAIEngine

if TYPE_CHECKING:
    from ascend_kit.engine.text import Tokenizer

LAG_SAMPLE_S = 0.005
METRICS_EVERY_S = 0.5
LAG_LIMIT_MS = 5.0
OTHER_ENDS = ("eos_token", "stop_sequence", "tool_calls", "function_call")  # other servers' words for a good end
# Fields of a request that only some servers know; `leave_out` takes them away where they are refused.
GREEDY: dict[str, Any] = {"temperature": 0, "stream": True, "ignore_eos": True}
USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}


class Client:
    """Drives one server through workloads; after `run`, `facts` holds the client's lag and what the server told,
    `samples` its metrics over time. `codec` is needed where prompts without text are sent as text."""

    def __init__(self, server: OpenAIEngine, codec: Tokenizer | None = None) -> None:
        self.server, self.codec = server, codec
        self.facts: dict[str, Any] = {}
        self.samples: list[Sample] = []  # of the server's metrics
        self._turn = asyncio.Lock()  # of reading what has come; a new one for each event loop

    def run(self, requests: Sequence[Request], concurrency: int, on_done: OnDone | None = None) -> list[RequestRecord]:
        """Serve all requests; one record each, in the order they ended. Failures are records too."""
        return run_in_loop(lambda: self._run(requests, concurrency, on_done))

    def get(self, path: str) -> Any:
        """The JSON, or else the text, of a GET below the address; None when there is no good answer."""

        async def read() -> Any:
            async with open_session(self.server) as session:
                return await get(session, self.server.root + path)

        return run_in_loop(read)

    async def _run(self, requests: Sequence[Request], concurrency: int, on_done: OnDone | None) -> list[RequestRecord]:
        bodies = {request.index: self._body(request) for request in requests}
        records: list[RequestRecord] = []
        lags: list[float] = []
        self._turn, recorder = asyncio.Lock(), Recorder[str](METRICS_EVERY_S)
        async with open_session(self.server) as session:
            await self._sample(session, recorder)
            watching = (_measure_lag(lags), self._keep_sampling(session, recorder))
            watchers = [asyncio.create_task(work) for work in watching]
            dispatcher, changed = Dispatcher(requests, concurrency, time.perf_counter()), asyncio.Event()

            async def serve(request: Request, arrival_s: float) -> None:
                def on_end() -> None:  # its place is free before its answer is read
                    dispatcher.ended(request.index, time.perf_counter())
                    changed.set()

                records.append(await self._one(session, request, arrival_s, bodies[request.index], on_end))
                if on_done:
                    on_done(len(records))

            try:
                with first_error():  # of this program: those of a server are records
                    async with asyncio.TaskGroup() as streams:
                        while dispatcher.left:
                            for request, arrival_s in dispatcher.due(time.perf_counter()):
                                streams.create_task(serve(request, arrival_s))
                            with contextlib.suppress(TimeoutError):
                                await asyncio.wait_for(changed.wait(), dispatcher.wait_s(time.perf_counter()))
                            changed.clear()
            finally:
                for task in watchers:
                    task.cancel()
                await asyncio.gather(*watchers, return_exceptions=True)
            await self._sample(session, recorder)
        # Read only now: a text of vLLM takes some 20 ms, which no stream should wait.
        self.samples = [{"time_s": time_s, **found} for time_s, text in recorder.taken if (found := read_metrics(text))]
        self.facts = {**client_facts(lags, records), **observed(self.samples)}
        return records

    def _body(self, request: Request) -> dict[str, Any]:
        """The JSON of one request: greedy, of exactly the asked length where the server can do that."""
        server, count = self.server, request.num_output_tokens
        prompt: Any = list(request.prompt_token_ids) if request.text is None else request.text
        if request.text is None and (server.api == "chat" or server.send_prompts_as == "text"):
            assert self.codec is not None
            prompt = self.codec.decode(prompt)
        said = {"messages": [{"role": "user", "content": prompt}]} if server.api == "chat" else {"prompt": prompt}
        return server.complete({**said, **GREEDY, "max_tokens": count, "min_tokens": count, **USAGE})

    async def _one(
        self,
        session: aiohttp.ClientSession,
        request: Request,
        arrival_s: float,
        body: dict[str, Any],
        on_end: Callable[[], None],
    ) -> RequestRecord:
        """One request and its retries; `on_end` is called once, when its last byte has come or all has failed."""
        sent_s, tell, retries = time.perf_counter(), functools.cache(on_end), self.server.retries
        # The end of a stream that may be asked for again is not yet that of the request.
        answer, num_retries = await with_retries(
            retries, lambda: self._try(session, body, (lambda: None) if retries else tell)
        )
        tell()
        count, source = self._count(answer)
        times = token_times(answer.chunks, count)
        error, end = answer.error, answer.finish_reason
        if error is None and not times:
            error = "no token came"
        return replace(
            request.record(arrival_s, times, error),
            num_prompt_tokens=answer.number("prompt_tokens") or len(request.prompt_token_ids),
            finish_reason="error" if error else "stop" if end in OTHER_ENDS else end or "length",
            finished_s=answer.chunks[-1].time_s if answer.chunks else time.perf_counter(),
            num_cached_tokens=answer.number("cached_tokens", "prompt_tokens_details"),
            sent_s=sent_s,
            chunks=tuple(answer.chunks),
            num_retries=num_retries,
            tokens_counted_by=source,
        )

    async def _try(
        self, session: aiohttp.ClientSession, body: dict[str, Any], on_end: Callable[[], None]
    ) -> tuple[Answer, Mapping[str, str] | None]:
        """One try, and headers where another may help: what was streamed is not asked for again."""
        answer, parser, start, kind, last_s = Answer(), EventParser(), b"", "", time.perf_counter()
        path = "/v1/chat/completions" if self.server.api == "chat" else "/v1/completions"

        def take(time_s: float, data: bytes) -> bool:
            nonlocal start, last_s
            start, last_s = start or data[:200], time_s
            for event in parser.feed(data):
                answer.take(event, time_s)
            return answer.is_done  # some servers keep the connection open

        async def read(response: aiohttp.ClientResponse) -> None:
            nonlocal kind
            kind = response.content_type
            await read_stream(response, self.server.idle_s, on_end, take, self._turn)
            for event in parser.end():
                answer.take(event, last_s)

        fault = await one_try(session, self.server.root + path, body, read)
        headers: Mapping[str, str] | None = {}
        if fault is not None:
            answer.error, headers = fault
        elif answer.error is None and not answer.chunks:
            answer.error = f"no event came, but {kind}: {start.decode(errors='replace')!r}; does the server stream?"
            headers = None
        elif answer.error is None and not answer.is_done and answer.finish_reason is None:
            answer.error = "the stream ended without a finish reason"
        elif answer.error is None and answer.finish_reason not in (None, *COMPLETE, *OTHER_ENDS):
            answer.error = f"the server ended the answer with {answer.finish_reason!r}"
        return answer, None if answer.error is None or answer.text_chunks else headers

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
        text = await get(session, self.server.root + "/metrics")
        if isinstance(text, str):
            recorder.add(text)


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
