"""The nodes that one agent process serves: begun and ended one by one, while the others run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass

import structlog

from raddle.agent.leader_link import StatsStream
from raddle.agent.node import NodeAgent
from raddle.store.etcd.store import EtcdStore

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Parts:
    """What serves one node."""

    agent: NodeAgent
    stream: StatsStream
    store: EtcdStore


class ServedNodes:
    """Node agents by node. `failed` ends with what ended one of them, which none should do."""

    def __init__(self, make: Callable[[str], Parts]) -> None:
        self._make = make
        self._parts: dict[str, Parts] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(self._parts)

    @property
    def silent(self) -> tuple[str, ...]:
        """Those whose health is not under a lease in the store at this moment."""
        # A copy first: it is asked for from another thread as well.
        parts = list(self._parts.items())
        return tuple(node for node, part in parts if not part.agent.is_reporting)

    @property
    def first_stream(self) -> StatsStream | None:
        return next((parts.stream for parts in self._parts.values()), None)

    async def serve(self, nodes: Collection[str]) -> None:
        """Serve these and no others."""
        gone = [node for node in self._parts if node not in nodes]
        new = [node for node in nodes if node not in self._parts]
        if not gone and not new:
            return
        log.info("nodes", begun=new, ended=gone)
        for node in gone:
            await self._end(node)
        for node in new:
            self._begin(node)

    def _begin(self, node: str) -> None:
        parts = self._parts[node] = self._make(node)
        task = self._tasks[node] = asyncio.create_task(parts.agent.run())
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self.failed.done():
            return
        error = task.exception()
        if error is not None:
            self.failed.set_exception(error)

    async def _end(self, node: str) -> None:
        """Its real ranks run on."""
        task = self._tasks.pop(node)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await self._parts.pop(node).store.close()

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for parts in self._parts.values():
            await parts.store.close()
        self._parts.clear()
        self._tasks.clear()
        self.failed.cancel()
