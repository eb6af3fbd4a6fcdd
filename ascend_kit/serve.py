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
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

from aiohttp import web

from ascend_kit.engine import text
from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.engine.sequence import SamplingParams, Sequence

Json = dict[str, Any]
MAX_BODY_BYTES = 64 << 20
SAME_NAMES = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "seed", "ignore_eos", "stop",
    "logprobs",
)  # fmt: skip
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
                call = self.calls.get()
                if call is None:
                    return
                call()
            try:
                self.engine.step()
            except Exception as error:
                for tell in list(self.open):
                    tell(error)

    async def follow(self, ids: list[int], sampling: SamplingParams | None) -> AsyncIterator[Step]:
        """Each step of a request; without `sampling` the prompt's tokens are scored after one another.

        Leaving early cancels the request. An error of the request or the engine is raised.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Step | BaseException]()
        numbers, pieces = list[int](), text.TextPieces(self.engine.text_of)
        put: Callable[[Step | BaseException], object] = partial(loop.call_soon_threadsafe, queue.put_nowait)

        def on_step(sequence: Sequence) -> None:
            new = "" if sequence.is_scoring else pieces.new(sequence)
            put(Step(sequence, new, sequence.finish_reason, sequence.num_output_tokens))

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
                if step.sequence.error:
                    raise ValueError(step.sequence.error)
                yield step
        finally:
            self.open.discard(put)
            if reason is None:
                self.calls.put(lambda: [self.engine.cancel(number) for number in numbers])


class Server:
    """The handlers; `name` is the model as clients call it."""

    def __init__(self, engine: AscendInferEngine, name: str) -> None:
        self.engine, self.name, self.thread, self.created = engine, name, EngineThread(engine), int(time.time())

    def application(self) -> web.Application:
        """The aiohttp application, over a loaded engine."""
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", partial(self.complete, is_chat=False))
        app.router.add_post("/v1/chat/completions", partial(self.complete, is_chat=True))
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

    async def complete(self, request: web.Request, *, is_chat: bool) -> web.StreamResponse:
        """Both kinds of completion, whole or streamed. 400 for a request that cannot be served as it is asked."""
        try:
            body = await request.json()
            prompts = [self._chat_ids(body)] if is_chat else self._prompts(body["prompt"])
            sampling = sampling_of(body, is_chat, self.engine.max_seq_length - max(map(len, prompts)))
            if body.get("stream") and (body.get("echo") or body.get("logprobs") or len(prompts) != 1):
                raise ValueError("a stream has one prompt and neither echo nor logprobs")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return _failed(400, error)
        kind = "chat.completion" if is_chat else "text_completion"
        head = {"id": uuid.uuid4().hex, "created": int(time.time()), "model": self.name}
        if body.get("stream"):
            head["object"] = f"{kind}.chunk" if is_chat else kind
            return await self._stream(request, head, prompts[0], sampling, body.get("stream_options") or {})
        try:
            both = await asyncio.gather(*(self._choice(n, ids, sampling, body) for n, ids in enumerate(prompts)))
        except Exception as error:
            return _failed(400 if isinstance(error, ValueError) else 500, error)
        usage = {key: sum(used[key] for _, used in both) for key in _usage(0, None)}
        return web.json_response({**head, "object": kind, "choices": [one for one, _ in both], "usage": usage})

    async def _choice(
        self, index: int, ids: list[int], sampling: SamplingParams | None, body: Json
    ) -> tuple[Json, Json]:
        """One answer and its usage."""
        answer, last, rows = "", None, []
        if body.get("echo"):
            answer, rows = self.engine.tokenizer.decode(ids), [(ids[0], None, [])]
            if body.get("logprobs") is not None and len(ids) > 1:
                async for step in self.thread.follow(ids, None):
                    scores = step.sequence.target_scores[0]
                    rows += [(token, one.logprob, [one.best]) for token, one in zip(ids[1:], scores, strict=True)]
        if sampling is not None:
            async for last in self.thread.follow(ids, sampling):
                answer += last.text
        made = last.sequence.output_ids if last else []
        if last:
            rows += [(token, *found) for token, found in zip(made, last.sequence.logprobs, strict=False)]
        said: Json = {"message": {"role": "assistant", "content": answer}} if "messages" in body else {"text": answer}
        if body.get("logprobs") is not None:
            said["logprobs"] = self._logprobs(rows, body.get("return_tokens_as_token_ids", False))
        if body.get("return_token_ids"):
            said |= {"prompt_token_ids": ids, "token_ids": made}
        reason = last.finish_reason if last else "length"
        return {"index": index, **said, "finish_reason": reason}, _usage(len(ids), last)

    async def _stream(
        self, request: web.Request, head: Json, ids: list[int], sampling: SamplingParams | None, options: Json
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        is_chat, usage, step = "chat" in head["object"], {}, None

        async def send(choices: list[Json], **rest: Any) -> None:
            value = rest if "error" in rest else {**head, "choices": choices, **rest}
            await response.write(f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode())

        try:
            async for step in self.thread.follow(ids, sampling):
                said: Json = {"delta": {"content": step.text}} if is_chat else {"text": step.text}
                if is_chat and step.num_tokens <= 1:
                    said["delta"]["role"] = "assistant"
                usage = _usage(len(ids), step)
                counted = {"usage": usage} if options.get("continuous_usage_stats") else {}
                await send([{"index": 0, **said, "finish_reason": step.finish_reason}], **counted)
            if step and options.get("include_usage"):
                usage["prompt_tokens_details"] = {"cached_tokens": step.sequence.num_cached_tokens}
                await send([], usage=usage)
        except ConnectionError:
            return response
        except Exception as error:  # the status is out: only the stream can say it
            await send([], error={"message": f"{type(error).__name__}: {error}", "code": 500})
        await response.write(b"data: [DONE]\n\n")
        return response

    def _prompts(self, prompt: Any) -> list[list[int]]:
        """Token ids of a text, of ids, or of a list of either."""
        every = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
        if not all(isinstance(one, (str, list)) for one in every):
            raise ValueError("prompt: allowed a text, a list of token ids, or a list of these")
        return [text.encode(self.engine.tokenizer, one) for one in every]

    def _chat_ids(self, body: Json) -> list[int]:
        thinking = (body.get("chat_template_kwargs") or {}).get("enable_thinking")
        messages = [{**one, "content": _plain(one.get("content"))} for one in body["messages"]]
        rendered = self.engine.render_chat(messages, thinking=thinking)
        return self.engine.tokenizer.encode(rendered, add_special_tokens=False)

    def _logprobs(self, rows: list[Any], as_ids: bool) -> Json:
        """The completions form of (token id, log-probability or None, most probable tokens) a token."""

        def name(token: int) -> str:
            return f"token_id:{token}" if as_ids else self.engine.tokenizer.decode([token])

        tops: list[Json | None] = []
        for token, logprob, best in rows:
            # The most probable first: of two tokens with one text it is the one that stays.
            pairs = [*best, (token, logprob)]
            tops.append(None if logprob is None else {name(t): v for t, v in reversed(pairs)})
        names, values = [name(token) for token, *_ in rows], [logprob for _, logprob, _ in rows]
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops}


def sampling_of(body: Json, is_chat: bool, room: int) -> SamplingParams | None:
    """How a request is decoded; None where no token is asked for. ValueError for what is not done here."""
    for key, idle in NOT_DONE.items():
        if body.get(key, idle) not in (idle, None):
            raise ValueError(f"{key}: allowed {idle}, got {body[key]!r}")
    if is_chat and body.get("logprobs"):
        raise ValueError("logprobs: only /v1/completions gives them")
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    limit = (max(1, room) if is_chat else 16) if limit is None else limit
    if limit == 0 and body.get("echo"):
        return None
    given: Json = {"temperature": 1.0} | {key: body[key] for key in SAME_NAMES if body.get(key) is not None}
    return SamplingParams(max_new_tokens=limit, min_new_tokens=body.get("min_tokens") or 0, **given)


def _plain(content: Any) -> str:
    """The text of a message whose content is a text or a list of parts."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _usage(num_prompt_tokens: int, step: Step | None) -> Json:
    made = step.num_tokens if step else 0
    return {"prompt_tokens": num_prompt_tokens, "completion_tokens": made, "total_tokens": num_prompt_tokens + made}


def _failed(status: int, error: Exception) -> web.Response:
    text = f"{type(error).__name__}: {error}"
    return web.json_response({"error": {"message": text, "type": "error", "code": status}}, status=status)


def serve(engine: AscendInferEngine, name: str, host: str, port: int) -> None:
    """Serve until the process is told to stop; port 0 takes a free one. The address is the first line printed."""
    with engine:
        sock = socket.create_server((host, port))
        print(f"serving {name} at http://{host}:{sock.getsockname()[1]}/v1", flush=True)
        web.run_app(Server(engine, name).application(), sock=sock, print=None)
