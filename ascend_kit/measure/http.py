"""The one HTTP client of OpenAI-compatible servers: one try, further ones, and whole answers, many at a time.

Answers that are measured while they stream are read in endpoint.py, through the same sessions.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import aiohttp

from ascend_kit.params.engines import OpenAIEngine

READ_BUFFER_BYTES = 1 << 22  # aiohttp's 64 KiB stalls long streams (vllm issue 39963)
BUSY = (408, 429, 500, 502, 503, 504)
WAIT_S = 1.0  # before a second try, twice as long before each further one; a server's Retry-After goes before
MOST_WAIT_S = 60.0
PAGE_S = 5.0  # that a page such as /metrics may take
MOST_CHARACTERS = 1000  # of what a server said in place of an answer
KEEP_ALIVE_S = 4.0  # uvicorn, hence vLLM, closes after 5 s of silence: a request must not meet that
Result = TypeVar("Result")


class EndpointError(RuntimeError):
    """The server cannot be reached, has another model, or cannot do what is asked; the text says which."""


Answer = dict[str, Any] | EndpointError  # the JSON of a whole answer, or why there is none


class Fault(NamedTuple):
    """Why a request has no answer, and the headers of what came where another try may help, else None."""

    text: str
    headers: Mapping[str, str] | None


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


@contextlib.contextmanager
def first_error() -> Iterator[None]:
    """The first error itself in place of the group that a TaskGroup makes of it."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def open_session(server: OpenAIEngine) -> aiohttp.ClientSession:
    """A session with any number of connections, which may stay silent for `idle_s`."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=server.idle_s),
        read_bufsize=READ_BUFFER_BYTES,
        headers={**server.headers, "Accept-Encoding": "identity"},  # nothing is held back to pack it
    )


async def get(session: aiohttp.ClientSession, url: str) -> Any:
    """The JSON, or else the text, of a page whatever its type says; None when there is no good answer in time."""
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=PAGE_S)) as response:
            if response.status != 200:
                return None
            text = await response.text()
            return json.loads(text) if text.lstrip()[:1] in ("{", "[") else text
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return None


async def one_try(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any] | None,
    read: Callable[[aiohttp.ClientResponse], Awaitable[Result]],
) -> Result | Fault:
    """What `read` makes of the answer to a POST of a body, or a GET for None.

    Redirects of a POST are not followed but told: most turn it into a GET, and a way round would be in every time that
    is taken.
    """
    method, is_get = ("GET", True) if body is None else ("POST", False)
    try:
        async with session.request(method, url, json=body, allow_redirects=is_get) as response:
            if response.status == 200:
                return await read(response)
            text = (await response.text(errors="replace"))[:MOST_CHARACTERS]
            place = response.headers.get("Location")
            told = f"HTTP {response.status}: {text}" + (f" (it is at {place}: name that in base_url)" if place else "")
            return Fault(told, dict(response.headers) if response.status in BUSY else None)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        return Fault(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, {})


async def with_retries(
    retries: int, try_once: Callable[[], Awaitable[tuple[Result, Mapping[str, str] | None]]]
) -> tuple[Result, int]:
    """What the last try gave, and how many followed the first. A try gives it with the headers of a `Fault`."""
    number = 0
    while True:
        found, headers = await try_once()
        if headers is None or number == retries:
            return found, number
        number += 1
        await asyncio.sleep(wait_s(number, headers))


def wait_s(number: int, headers: Mapping[str, str]) -> float:
    """Seconds before retry `number`, from 1 on: what the server's Retry-After says, where it does, within limits."""
    said = headers.get("Retry-After", "")
    return min(float(said) if said.isdigit() else WAIT_S * 2 ** (number - 1), MOST_WAIT_S)


def ask(
    server: OpenAIEngine,
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
            found[place] = await _whole(session, server, server.root + path, body)
            if on_answer is not None:
                on_answer(place, found[place])

    async def all_of_them() -> None:
        async with open_session(server) as session:
            with first_error():
                async with asyncio.TaskGroup() as working:
                    for _ in range(min(concurrency, len(bodies))):
                        working.create_task(work(session))

    run_in_loop(all_of_them)
    return found


async def _whole(session: aiohttp.ClientSession, server: OpenAIEngine, url: str, body: dict[str, Any] | None) -> Answer:
    whole = None if body is None else server.complete(body)

    async def try_once() -> tuple[Answer, Mapping[str, str] | None]:
        found = await one_try(session, url, whole, lambda response: response.json(content_type=None))
        return (EndpointError(f"{url}: {found.text}"), found.headers) if isinstance(found, Fault) else (found, None)

    return (await with_retries(server.retries, try_once))[0]
