"""The one HTTP client of OpenAI-compatible servers: how one is asked, and whole answers of it, many at a time.

Answers that are measured while they stream are read in endpoint.py, through the same sessions.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import aiohttp

from ascend_kit.measure.workload import Request

READ_BUFFER_BYTES = 1 << 22  # aiohttp's 64 KiB stalls long streams (vllm issue 39963)
BUSY = (408, 429, 500, 502, 503, 504)
WAIT_S = 1.0  # before a second try, twice as long before each further one; a server's Retry-After goes before
MOST_WAIT_S = 60.0
KEEP_ALIVE_S = 4.0  # uvicorn, hence vLLM, closes after 5 s of silence: a request must not meet that
# Fields of a request that only some servers know; `leave_out` takes them away where they are refused.
GREEDY: dict[str, Any] = {"temperature": 0, "stream": True, "ignore_eos": True}


class TextCodec(Protocol):
    """What a client needs of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str: ...


class EndpointError(RuntimeError):
    """The server cannot be reached, has another model, or cannot do what is asked; the text says which."""


Answer = dict[str, Any] | EndpointError  # the JSON of a whole answer, or why there is none


@dataclass(frozen=True)
class Endpoint:
    """Where a server is and how it wants to be asked.

    `send_prompts_as` ids (exact lengths, /v1/completions only) or text; `retries` of a request that failed before its
    first token, each counted in the record; `idle_s` is how long a stream may stay silent.
    """

    base_url: str
    model: str
    api: Literal["completions", "chat"] = "completions"
    api_key: str | None = None
    send_prompts_as: Literal["ids", "text"] = "ids"
    leave_out: tuple[str, ...] = ()
    extra_body: dict[str, Any] = field(default_factory=dict)
    retries: int = 0
    idle_s: float = 120.0

    @property
    def root(self) -> str:
        """The address without /v1, where /metrics is."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    @property
    def headers(self) -> dict[str, str]:
        """Authorisation, where there is a key."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def body(self, request: Request, codec: TextCodec | None) -> dict[str, Any]:
        """The JSON of one request: greedy, of exactly the asked length where the server can do that."""
        ids, count = list(request.prompt_token_ids), request.num_output_tokens
        limits = {"max_tokens": count, "min_tokens": count}
        options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        prompt: Any = ids
        if self.api == "chat" or self.send_prompts_as == "text" or request.text is not None:
            prompt = request.text
            if prompt is None:
                if codec is None:
                    raise ValueError("prompts as text need a tokenizer: set tokenizer_path")
                prompt = codec.decode(ids)
        said = {"messages": [{"role": "user", "content": prompt}]} if self.api == "chat" else {"prompt": prompt}
        return self.complete({**said, **GREEDY, **limits, **options})

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request's fields with the model and the server's own fields, without those that it refuses."""
        whole = {"model": self.model, **body, **self.extra_body}
        return {key: value for key, value in whole.items() if key not in self.leave_out}


def run_in_loop(work: Callable[[], Any]) -> Any:
    """The result of a coroutine function in an event loop of its own thread: a notebook's thread has one running."""
    loop = asyncio.new_event_loop()

    def body() -> Any:
        try:
            return loop.run_until_complete(work())
        finally:
            loop.close()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(body)
        try:
            return future.result()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # closed already
                loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
            raise


def open_session(endpoint: Endpoint) -> aiohttp.ClientSession:
    """A session with any number of connections, which may stay silent for `idle_s`."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=endpoint.idle_s),
        read_bufsize=READ_BUFFER_BYTES,
        headers=endpoint.headers,
    )


async def get(session: aiohttp.ClientSession, url: str) -> Any:
    """The JSON, or else the text, of a page whatever its type says; None when there is no good answer."""
    try:
        async with session.get(url) as response:
            if response.status != 200:
                return None
            text = await response.text()
            return json.loads(text) if text.lstrip()[:1] in ("{", "[") else text
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return None


async def refusal(response: aiohttp.ClientResponse, most: int) -> str:
    """What a server said in place of an answer, at most so many characters of it, and where it sends one to.

    Redirects are not followed: most turn a POST into a GET, and a way round would be in every time that is taken.
    """
    text = (await response.text(errors="replace"))[:most]
    place = response.headers.get("Location")
    return f"{response.status}: {text}" + (f" (it is at {place}: name that in base_url)" if place else "")


def wait_s(number: int, headers: Mapping[str, str]) -> float:
    """Seconds before retry `number`, from 1 on: what the server's Retry-After says, where it does, within limits."""
    said = headers.get("Retry-After", "")
    return min(float(said) if said.isdigit() else WAIT_S * 2 ** (number - 1), MOST_WAIT_S)


def ask(
    endpoint: Endpoint,
    path: str,
    bodies: Sequence[dict[str, Any] | None],
    concurrency: int = 1,
    on_answer: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """The JSON after each POST of a body (a GET for None) below the address, or why there is none.

    `on_answer` hears of each at once, with its place, in the client's thread; what it raises ends all.
    """
    found: list[Any] = [None] * len(bodies)
    waiting = iter(enumerate(bodies))

    async def work(session: aiohttp.ClientSession) -> None:
        for place, body in waiting:  # shared by all that work
            found[place] = await _whole(session, endpoint, path, body)
            if on_answer is not None:
                on_answer(place, found[place])

    async def all_of_them() -> None:
        async with open_session(endpoint) as session:
            working = [asyncio.create_task(work(session)) for _ in range(min(concurrency, len(bodies)))]
            try:
                await asyncio.gather(*working)
            finally:
                for task in working:
                    task.cancel()
                await asyncio.gather(*working, return_exceptions=True)

    run_in_loop(all_of_them)
    return found


async def _whole(session: aiohttp.ClientSession, endpoint: Endpoint, path: str, body: dict[str, Any] | None) -> Answer:
    fault, url, headers = "", endpoint.root + path, dict[str, str]()
    for number in range(endpoint.retries + 1):
        await asyncio.sleep(wait_s(number, headers) if number else 0)
        try:
            post = functools.partial(session.post, json=endpoint.complete(body or {}), allow_redirects=False)
            async with session.get(url) if body is None else post(url) as response:
                if response.status == 200:
                    return await response.json(content_type=None)
                fault, headers = await refusal(response, 2000), dict(response.headers)
                if response.status not in BUSY:
                    break
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            fault = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return EndpointError(f"{url}: {fault}")
