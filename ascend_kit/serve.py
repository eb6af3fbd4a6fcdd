"""A small OpenAI-compatible server over the engine, for trying a model in a chat client and for measuring through the
protocol; not for production: no authentication, one model, one process.

`/v1/models`, `/v1/completions` (text or token ids; `echo` with `logprobs` gives the prompt's log-probabilities),
`/v1/chat/completions`, both streaming, `/metrics` in Prometheus form. One thread steps the engine; the event
loop passes on what came.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import fields
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

from aiohttp import web

from ascend_kit.engine import text
from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.engine.sequence import SamplingParams, Sequence

Json = dict[str, Any]
Sampling = SamplingParams | None  # None: no token is asked for
SAME_NAMES = [field.name for field in fields(SamplingParams)]  # as clients call them, too, but for the two lengths
# What would change the answer and is not done here; the value is the one that asks for nothing.
NOT_DONE: Json = {"n": 1, "best_of": 1, "suffix": None, "frequency_penalty": 0, "logit_bias": None, "tools": None}


class Step(NamedTuple):
    """What a step brought for a request, and how many tokens it has now."""

    sequence: Sequence
    text: str
    finish_reason: str | None
    num_tokens: int


class EngineThread(threading.Thread):
    """The one thread that touches the engine: calls reach it through a queue and run between two steps."""

    def __init__(self, engine: AscendInferEngine) -> None:
        super().__init__(name="ascend-kit-engine", daemon=True)
        self.engine, self.calls = engine, SimpleQueue[Callable[[], object] | None]()
        self.open: set[Callable[[BaseException], object]] = set()  # how to tell each open request of a failure

    def run(self) -> None:
        """Step while there is work, until None is called."""
        while True:
            while not self.engine.has_unfinished or not self.calls.empty():
                if not (call := self.calls.get()):
                    return
                call()
            try:
                self.engine.step()
            except Exception as error:
                for tell in list(self.open):
                    tell(error)

    async def follow(self, ids: list[int], sampling: Sampling) -> AsyncIterator[Step]:
        """Each step of a request; without `sampling` the prompt's tokens are scored after one another.

        Leaving early cancels the request. An error of the request or the engine is raised.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Step | BaseException]()
        numbers, pieces = list[int](), text.TextPieces(self.engine.text_of)
        put: Callable[[Step | BaseException], object] = partial(loop.call_soon_threadsafe, queue.put_nowait)

        def on_step(sequence: Sequence) -> None:
            step = Step(sequence, pieces.new(sequence), sequence.finish_reason, sequence.num_output_tokens)
            put(ValueError(sequence.error) if sequence.error else step)

        def start() -> None:
            add = self.engine.add_scored if sampling is None else partial(self.engine.add_request, sampling=sampling)
            try:
                numbers.append(add(ids, on_step=on_step))
            except Exception as error:
                put(error)

        self.open.add(put)
        self.calls.put(start)
        reason = None
        try:
            while reason is None:
                step = await queue.get()
                if isinstance(step, BaseException):
                    raise step
                reason = step.finish_reason
                yield step
        finally:
            self.open.discard(put)
            self.calls.put(lambda: [self.engine.cancel(number) for number in numbers])  # nothing when it has ended


class Server:
    """The handlers; `name` is the model as clients call it."""

    def __init__(self, engine: AscendInferEngine, name: str) -> None:
        self.engine, self.name, self.thread, self.created = engine, name, EngineThread(engine), int(time.time())

    def application(self) -> web.Application:
        """The aiohttp application, over a loaded engine."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/{kind:(chat/)?completions}", self.complete)
        app.cleanup_ctx.append(self._running)
        return app

    async def _running(self, _: web.Application) -> AsyncIterator[None]:
        self.thread.start()
        yield
        self.thread.calls.put(None)

    async def models(self, _: web.Request) -> web.Response:
        """The one model and its context limit."""
        facts = {"max_model_len": self.engine.max_seq_length, "owned_by": "ascend_kit", "created": self.created}
        return web.json_response({"object": "list", "data": [{"id": self.name, "object": "model", **facts}]})

    async def metrics(self, _: web.Request) -> web.Response:
        """Counters since the start, and the share of KV blocks in use, under the names vLLM gave them."""
        stats = self.engine.stats()
        values = {
            "num_requests_running": stats["running"],
            "num_requests_waiting": max(0, len(self.thread.open) - stats["running"]),
            "num_preemptions_total": stats.get("preemptions", 0),
            "prefix_cache_queries_total": stats.get("prompt_tokens", 0),
            "prefix_cache_hits_total": stats.get("cached_prompt_tokens", 0),
            "generation_tokens_total": stats.get("output_tokens", 0),
        }
        if stats.get("kv_blocks_total"):
            values["kv_cache_usage_perc"] = 1 - stats["kv_blocks_free"] / stats["kv_blocks_total"]
        return web.Response(text="".join(f"ascend_kit:{name} {value}\n" for name, value in values.items()))

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Both kinds of completion, whole or streamed. 400 for a request that cannot be served as it is asked."""
        is_chat = request.match_info["kind"] == "chat/completions"
        try:
            body = {key: value for key, value in (await request.json()).items() if value is not None}
            prompts = [self._chat_ids(body)] if is_chat else self._prompts(body["prompt"])
            sampling = sampling_of(body, is_chat, self.engine.max_seq_length - max(map(len, prompts)))
            if body.get("stream") and (body.get("echo") or body.get("logprobs") or len(prompts) != 1):
                raise ValueError("a stream has one prompt and neither echo nor logprobs")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return web.json_response(_error(400, error), status=400)
        kind = "chat.completion" + ".chunk" * bool(body.get("stream")) if is_chat else "text_completion"
        head = {"id": uuid.uuid4().hex, "object": kind, "created": int(time.time()), "model": self.name}
        if body.get("stream"):
            chunks = self._chunks(head, prompts[0], sampling, body.get("stream_options") or {})
            return await _streamed(request, chunks)
        try:
            both = await asyncio.gather(*(self._choice(n, ids, sampling, body) for n, ids in enumerate(prompts)))
        except Exception as error:
            status = 400 if isinstance(error, ValueError) else 500
            return web.json_response(_error(status, error), status=status)
        choices, counts = zip(*both, strict=True)
        return web.json_response({**head, "choices": choices, "usage": _usage(sum(map(len, prompts)), sum(counts))})

    async def _choice(self, index: int, ids: list[int], sampling: Sampling, body: Json) -> tuple[Json, int]:
        """One answer and how many tokens it has."""
        answer, last, rows = "", None, []
        if body.get("echo"):
            answer, rows = self.engine.tokenizer.decode(ids), [(ids[0], None, [])]
            if "logprobs" in body and len(ids) > 1:
                async for step in self.thread.follow(ids, None):
                    scores = step.sequence.target_scores[0]
                    rows += [(token, one.logprob, [one.best]) for token, one in zip(ids[1:], scores, strict=True)]
        if sampling is not None:
            async for last in self.thread.follow(ids, sampling):
                answer += last.text
        made, scores = (last.sequence.output_ids, last.sequence.logprobs) if last else ([], [])
        rows += [(token, *found) for token, found in zip(made, scores, strict=False)]
        said: Json = {"message": {"role": "assistant", "content": answer}} if "messages" in body else {"text": answer}
        if "logprobs" in body:
            said["logprobs"] = self._logprobs(rows, body.get("return_tokens_as_token_ids", False))
        if body.get("return_token_ids"):
            said |= {"prompt_token_ids": ids, "token_ids": made}
        return {"index": index, **said, "finish_reason": last.finish_reason if last else "length"}, len(made)

    async def _chunks(self, head: Json, ids: list[int], sampling: Sampling, options: Json) -> AsyncIterator[Json]:
        """The events of a streamed answer; a failure is the last: the status is out, only the stream can say it."""
        is_chat, usage = "chat" in head["object"], {}
        try:
            async for step in self.thread.follow(ids, sampling):
                role = {"role": "assistant"} if step.num_tokens <= 1 else {}
                said: Json = {"delta": {**role, "content": step.text}} if is_chat else {"text": step.text}
                details = {"prompt_tokens_details": {"cached_tokens": step.sequence.num_cached_tokens}}
                usage = {"usage": _usage(len(ids), step.num_tokens) | details}
                choice = {"index": 0, **said, "finish_reason": step.finish_reason}
                yield {**head, "choices": [choice], **(usage if options.get("continuous_usage_stats") else {})}
            if usage and options.get("include_usage"):
                yield {**head, "choices": [], **usage}
        except Exception as error:
            yield _error(500, error)

    def _prompts(self, prompt: Any) -> list[list[int]]:
        """Token ids of a text, of ids, or of a list of either."""
        every = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
        if not all(isinstance(one, (str, list)) for one in every):
            raise ValueError("prompt: allowed a text, a list of token ids, or a list of these")
        return [text.encode(self.engine.tokenizer, one) for one in every]

    def _chat_ids(self, body: Json) -> list[int]:
        messages = [{**one, "content": _plain(one.get("content"))} for one in body["messages"]]
        chat = self.engine.render_chat(messages, thinking=body.get("chat_template_kwargs", {}).get("enable_thinking"))
        return self.engine.tokenizer.encode(chat, add_special_tokens=False)

    def _logprobs(self, rows: list[Any], as_ids: bool) -> Json:
        """The completions form of (token id, log-probability or None, most probable tokens) a token."""

        def name(token: int) -> str:
            return f"token_id:{token}" if as_ids else self.engine.tokenizer.decode([token])

        # The most probable last: of two tokens with one text it is the one that stays.
        tops = [None if logprob is None else {name(t): v for t, v in ((token, logprob), *reversed(best))}
                for token, logprob, best in rows]  # fmt: skip
        names, values = [name(token) for token, *_ in rows], [logprob for _, logprob, _ in rows]
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops}


def sampling_of(body: Json, is_chat: bool, room: int) -> Sampling:
    """How a request is decoded; None where no token is asked for. ValueError for what is not done here."""
    for key, idle in (NOT_DONE | ({"logprobs": False} if is_chat else {})).items():
        if body.get(key, idle) != idle:
            raise ValueError(f"{key}: allowed {idle}, got {body[key]!r}")
    limit = body.get("max_completion_tokens", body.get("max_tokens", max(1, room) if is_chat else 16))
    if limit == 0 and body.get("echo"):
        return None
    given: Json = {"temperature": 1.0} | {key: body[key] for key in SAME_NAMES if key in body}
    given |= {"max_new_tokens": limit, "min_new_tokens": body.get("min_tokens", 0)}
    return SamplingParams(**given)


def _plain(content: Any) -> str:
    """The text of a message whose content is a text or a list of parts."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


async def _streamed(request: web.Request, chunks: AsyncIterator[Json]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    with suppress(ConnectionError):  # the client has left
        async for chunk in chunks:
            await response.write(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
    return response


def _usage(asked: int, made: int) -> Json:
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


def _error(code: int, error: Exception) -> Json:
    return {"error": {"message": f"{type(error).__name__}: {error}", "type": "error", "code": code}}


def serve(engine: AscendInferEngine, name: str, host: str, port: int) -> None:
    """Serve until the process is told to stop; port 0 takes a free one. The address is the first line printed."""
    with engine:
        sock = socket.create_server((host, port))
        print(f"serving {name} at http://{host}:{sock.getsockname()[1]}/v1", flush=True)
        web.run_app(Server(engine, name).application(), sock=sock, print=None)
