"""Streams from a job's Service while a test does something to what serves them."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tools.kubernetes.box import wait_until
from tools.kubernetes.cluster import Cluster

from raddle.cli.demo.client import stream_events
from raddle.traces import TraceRequest
from tests.kubernetes import Entrance

STREAMS = 4
#: As long as the front door itself gives a request.
STREAM_TIMEOUT_S = 120.0


class Load:
    """So many streams at every moment until the block ends; every token of theirs is known."""

    def __init__(
        self,
        cluster: Cluster,
        target: str,
        requests: Sequence[TraceRequest],
        known: Sequence[list[int]],
    ) -> None:
        self._cluster = cluster
        self._target = target
        self._pairs = list(zip(requests, known, strict=True))
        self._numbers = itertools.count()
        self._open: set[int] = set()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._main, name="load")
        #: Streams that ended as they should, tokens that came, and what went wrong.
        self.finished = 0
        self.tokens = 0
        self.wrong: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(lambda: self.tokens > 0 or bool(self.wrong), "tokens flow")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        self._thread.join()
        if error is None:
            assert not self.wrong, self.wrong

    def settle(self) -> None:
        """Every stream that is open now comes to its end, with the tokens that are known."""
        now = frozenset(self._open)
        wait_until(lambda: not now & self._open, "the open streams end", 2 * STREAM_TIMEOUT_S)
        assert not self.wrong, self.wrong

    def _main(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        entrance = Entrance(self._cluster, self._target)
        address = await entrance.start()
        try:
            await asyncio.gather(*(self._stream_on(address) for _ in range(STREAMS)))
        finally:
            await entrance.stop()

    async def _stream_on(self, address: str) -> None:
        while not self._ending.is_set():
            number = next(self._numbers)
            request, known = self._pairs[number % len(self._pairs)]
            self._open.add(number)
            came: list[int] = []
            try:
                async with asyncio.timeout(STREAM_TIMEOUT_S):
                    async for event in stream_events(address, request):
                        came += event["choices"][0]["tokens"]
                        self.tokens += 1
                if came != known:
                    self.wrong.append(f"stream {number}: {came} and not {known}")
                self.finished += 1
            except (OSError, TimeoutError, ValueError) as error:
                self.wrong.append(f"stream {number} after {len(came)} tokens: {error!r}")
            finally:
                self._open.discard(number)
