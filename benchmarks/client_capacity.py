"""How many streams the measuring client keeps up with: a generator server in a process of its own sends tokens by the
clock, and the client must see them when they come.

    python benchmarks/client_capacity.py --streams 256 --rate 50 --tokens 100
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from multiprocessing.connection import Connection

from ascend_kit.measure.endpoint import Client
from ascend_kit.measure.metrics import percentile
from ascend_kit.measure.workload import Request
from ascend_kit.params.engines import OpenAIEngine

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def generate(pipe: Connection, rate: float) -> None:
    """Answer every POST with one token each 1/rate seconds; a token's text is the moment it was written."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET"):
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
            count = json.loads(await reader.readexactly(length))["max_tokens"]
            writer.write(HEAD)
            start = time.monotonic()
            for number in range(count):
                await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
                choice = {"index": 0, "text": f"{time.monotonic():.6f} ", "finish_reason": None}
                writer.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=4096)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


class Recorder:
    """A codec that only counts, so that no tokenizer takes part; it keeps the texts, which are times."""

    def __init__(self) -> None:
        self.texts: list[list[float]] = []

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.texts.append([float(word) for word in text.split()])
        return list(range(len(self.texts[-1])))

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return ""


def main() -> None:
    """Print the client's own lag and how long after writing each token was seen, at one number of streams."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--rate", type=float, default=50.0, help="tokens per second of a stream")
    parser.add_argument("--tokens", type=int, default=100)
    arguments = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=generate, args=(theirs, arguments.rate), daemon=True)
    server.start()
    recorder = Recorder()
    client = Client(OpenAIEngine(base_url=f"http://127.0.0.1:{ours.recv()}/v1", model="m"), recorder)
    spread_s = 1 / arguments.rate  # so that not all streams write at one moment
    requests = [Request(n, (1,), arguments.tokens, send_at_s=n * spread_s / 8) for n in range(arguments.streams)]
    before_s = time.process_time()
    records = client.run(requests, arguments.streams)
    token_us = (time.process_time() - before_s) / (arguments.streams * arguments.tokens) * 1e6
    server.terminate()
    failed = [record.error for record in records if record.error]
    # perf_counter and monotonic are one clock on Linux; records and texts are in the order in which they ended.
    seen = [r.token_times_s for r in records]
    late = [t - w for times, texts in zip(seen, recorder.texts, strict=True) for t, w in zip(times, texts, strict=True)]
    load = f"{arguments.streams} streams of {arguments.rate:g} tokens/s, {arguments.tokens} tokens each"
    lags = [f"{name} lag p99 {client.facts[f'{name}_lag_p99_ms']:.2f} ms" for name in ("client", "send")]
    print(f"{load}; {len(failed)} failed; {', '.join(lags)}; {token_us:.0f} us of processor time a token")
    print("written to seen, ms: " + ", ".join(f"p{q} {(percentile(late, q) or 0) * 1e3:.2f}" for q in (50, 90, 99)))


if __name__ == "__main__":
    main()
