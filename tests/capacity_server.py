"""A real HTTP server of known capacity: so many places, each answer of two tokens takes one for so long."""

from __future__ import annotations

import asyncio

from scripted_server import DONE, HEAD, ScriptedServer, event, text_chunk


class CapacityServer(ScriptedServer):
    def __init__(self, places: int, service_s: float):
        self.places, self.service_s, self.num_requests = asyncio.Semaphore(places), service_s, 0
        super().__init__([])

    async def _answer(self, writer):
        self.num_requests += 1
        async with self.places:
            await asyncio.sleep(self.service_s)
        writer.write(HEAD)
        for count, letter in enumerate("ab", 1):
            usage = {"prompt_tokens": 8, "completion_tokens": count}
            writer.write(event(text_chunk(letter, usage=usage)))
        writer.write(DONE)
