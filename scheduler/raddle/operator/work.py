"""Work by name: what was marked is brought to where it belongs, one at a time for each name.

Many marks of a name while it waits are one. Work that fails is done again after a pause that
doubles; everything is done again after a long while, for what nobody told.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from raddle.model.errors import ConflictError, PermanentError, TemporaryError

WORKERS = 8
RETRY_S_MIN = 0.2
RETRY_S_MAX = 30.0
AGAIN_S = 600.0
log = structlog.get_logger()


@dataclass(frozen=True, slots=True, order=True)
class Item:
    """One thing to look after."""

    kind: str
    namespace: str
    name: str


@dataclass(slots=True)
class Counts:
    """For metrics: what was brought to where it belongs so far, and what failed."""

    done: int = 0
    failed: int = 0


class Work:
    """A queue of items without doubles."""

    def __init__(self, do: Callable[[Item], Awaitable[bool]], counts: Counts) -> None:
        """`do` brings an item to where it belongs and says whether it is still there."""
        self._do = do
        self.counts = counts
        self._queue: asyncio.Queue[Item] = asyncio.Queue()
        self._waiting: set[Item] = set()
        self._running: set[Item] = set()
        self._again: set[Item] = set()
        self._failures: dict[Item, int] = {}
        self._timers: dict[Item, asyncio.TimerHandle] = {}

    def mark(self, kind: str, namespace: str, name: str) -> None:
        """Something about it may have changed."""
        self._mark(Item(kind, namespace, name))

    def _mark(self, item: Item) -> None:
        if item in self._running:
            self._again.add(item)
        elif item not in self._waiting:
            self._waiting.add(item)
            self._queue.put_nowait(item)

    async def run(self) -> None:
        """Work for ever."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(WORKERS):
                    group.create_task(self._worker())
        finally:
            for timer in self._timers.values():
                timer.cancel()

    async def _worker(self) -> None:
        while True:
            item = await self._queue.get()
            self._waiting.discard(item)
            self._running.add(item)
            try:
                await self._attempt(item)
            finally:
                self._running.discard(item)
            if item in self._again:
                self._again.discard(item)
                self._mark(item)

    async def _attempt(self, item: Item) -> None:
        try:
            exists = await self._do(item)
        except ConflictError:
            # What it was decided on changed meanwhile: look again, soon.
            self._failed(item, RETRY_S_MIN)
        except TemporaryError as error:
            log.info("waits", item=_text(item), reason=error.reason, why=error.message)
            self._failed(item, error.retry_after_s)
        except PermanentError as error:
            log.warning("refused", item=_text(item), reason=error.reason, why=error.message)
            self._failed(item, RETRY_S_MAX)
        except Exception:
            # One object must not end the work on others.
            log.exception("failed in an unforeseen way", item=_text(item))
            self._failed(item, 1.0)
        else:
            self.counts.done += 1
            self._failures.pop(item, None)
            if exists:
                self._later(item, AGAIN_S * random.uniform(0.8, 1.2))  # noqa: S311 - no secret
            else:
                self._forget_timer(item)

    def _failed(self, item: Item, at_least_s: float) -> None:
        self.counts.failed += 1
        count = self._failures[item] = self._failures.get(item, 0) + 1
        doubled_s = RETRY_S_MIN * 2.0 ** min(count - 1, 20)
        self._later(item, min(RETRY_S_MAX, max(at_least_s, doubled_s)))

    def _later(self, item: Item, delay_s: float) -> None:
        self._forget_timer(item)
        loop = asyncio.get_running_loop()
        self._timers[item] = loop.call_later(delay_s, self._mark, item)

    def _forget_timer(self, item: Item) -> None:
        timer = self._timers.pop(item, None)
        if timer is not None:
            timer.cancel()


def _text(item: Item) -> str:
    return "/".join(part for part in (item.kind, item.namespace, item.name) if part)
