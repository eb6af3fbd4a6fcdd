"""A real HTTP server that answers what it is told, byte by byte: corners of protocols that our own server has not."""

from __future__ import annotations

import asyncio
import json
import threading

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
MODELS = {"data": [{"id": "m", "max_model_len": 512}]}


class ScriptedServer:
    """Each POST gets the next of `scripts`: a list of (seconds after the request, bytes), the last one again and again.
    `bodies` keeps what was asked. GETs get `pages`."""

    def __init__(self, *scripts, pages=None):
        self.scripts, self.bodies, self.most_at_once, self.now = list(scripts), [], 0, 0
        self.pages = {"/v1/models": json.dumps(MODELS), **(pages or {})}
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 24)
        self.server = asyncio.run_coroutine_threadsafe(start, self.loop).result(10)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"

    def close(self):
        self.loop.call_soon_threadsafe(self.server.close)

    async def _serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split("\r\n")[0].split()
        if method == "GET":
            text = self.pages.get(path)
            status = "200 OK" if text is not None else "404 Not Found"
            kind = "application/json" if (text or "").startswith("{") else "text/plain"
            page = (text or "").encode()
            lines = (
                f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(page)}\r\nConnection: close\r\n\r\n"
            )
            writer.write(lines.encode() + page)
        else:
            length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
            self.bodies.append(json.loads(await reader.readexactly(length)))
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)
            await self._answer(writer)
            self.now -= 1
        writer.close()

    async def _answer(self, writer):
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        start = self.loop.time()
        for at_s, data in script:
            await asyncio.sleep(max(0.0, start + at_s - self.loop.time()))
            writer.write(data)
            await writer.drain()


def event(value, end=b"\n\n"):
    """The bytes of one event."""
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()) + end


def text_chunk(text, **rest):
    return {"choices": [{"index": 0, "text": text, "finish_reason": None}], **rest}


def chat_chunk(usage=None, reason=None, **delta):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], "usage": usage}


DONE = event(b"[DONE]")


def failure(status="500 Internal Server Error", text="no luck"):
    body = text.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    return [(0, head + body)]


def usage(prompt, completion):
    return {"prompt_tokens": prompt, "completion_tokens": completion}
