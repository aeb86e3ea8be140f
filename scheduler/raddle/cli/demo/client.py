"""Requests through the front door's HTTP stream, and the tokens that came back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from raddle.traces import TraceRequest

REQUEST_TIMEOUT_S = 90.0


@dataclass(slots=True)
class Answers:
    """Tokens of each request, the process that decodes it, and why a request did not finish."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    served_by: dict[int, str] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    finished: int = 0

    @property
    def count(self) -> int:
        return sum(len(tokens) for tokens in self.tokens.values())


async def send_all(
    address: str, requests: list[TraceRequest], answers: Answers, concurrency: int
) -> None:
    """Send all requests, so many at once; each token is kept as it comes."""
    gate = asyncio.Semaphore(concurrency)

    async def one(number: int, request: TraceRequest) -> None:
        async with gate:
            answers.tokens[number] = []
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    async for event in stream_events(address, request):
                        answers.tokens[number] += event["choices"][0]["tokens"]
                        answers.served_by[number] = event["served_by"]
                if len(answers.tokens[number]) == request.output_tokens:
                    answers.finished += 1
                else:
                    answers.failures[number] = "the stream ended early"
            except (OSError, TimeoutError, ValueError) as error:
                answers.failures[number] = repr(error)

    await asyncio.gather(*(one(n, r) for n, r in enumerate(requests)))


async def stream_events(address: str, request: TraceRequest) -> AsyncIterator[dict[str, Any]]:
    """One streamed completion, event by event.

    Raises:
        OSError: the connection broke.
        ValueError: the front door told an error.
    """
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    try:
        body = json.dumps(
            {
                "prompt": list(request.prompt),
                "max_tokens": request.output_tokens,
                "stream": True,
            }
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(event["error"]["message"])
            yield event
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def get_text(address: str, path: str) -> tuple[int, str]:
    """Status and body of a plain GET."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode()
        )
        await writer.drain()
        data = (await reader.read()).decode()
    finally:
        writer.close()
    head, _, body = data.partition("\r\n\r\n")
    return int(head.split(" ", 2)[1]), body
