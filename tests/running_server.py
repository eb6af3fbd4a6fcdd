"""Our own server in a thread with an event loop of its own, over the tiny model: one for all tests of a module."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import aiohttp
import pytest


class Running:
    """A server in a thread with an event loop of its own."""

    def __init__(self, engine) -> None:
        from aiohttp import web

        from ascend_kit.serve import Server  # not before a test needs it: it brings torch

        self.loop, self.engine = asyncio.new_event_loop(), engine
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.runner = web.AppRunner(Server(engine, "tiny").application())
        self.base = self.wait(self._start())

    def wait(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    async def _start(self) -> str:
        await self.runner.setup()
        from aiohttp import web

        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    def post(self, path: str, body) -> tuple[int, str]:
        async def send():
            async with aiohttp.ClientSession() as session, session.post(self.base + path, json=body) as answer:
                return answer.status, await answer.text()

        return self.wait(send())

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 10
        while self.engine.has_unfinished:
            assert time.monotonic() < deadline, "a request that was left is still computed"
            time.sleep(0.01)

    def json(self, path: str, body) -> dict:
        status, text = self.post(path, body)
        assert status == 200, text
        return json.loads(text)


@pytest.fixture(scope="module")
def served(tiny_qwen3_dir):
    from ascend_kit import AscendInferEngine

    settings = dict(precision="fp32", device="cpu", max_seq_length=256, batch_size=8, block_size=16, kv_cache_gib=0.05)
    with AscendInferEngine(tiny_qwen3_dir, **settings) as engine:
        running = Running(engine)
        yield running
        running.wait(running.runner.cleanup())
