"""A pool member's repair: copies of its blocks that other members should have and lack.

In go the members of each epoch and the blocks that come in; out go copies, hottest first, under a
bandwidth budget. Whoever holds a block and ranks first for it among the holders makes its copies,
so each is made once. A pass over what may lack copies follows each change of members; blocks
that came since, and those whose copy failed, are looked at a little later.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog

from raddle.agent.engine.reference.places import Places
from raddle.agent.engine.reference.pool import BlockStore, PoolPeers
from raddle.core.kvcache.figures import REPAIR_BYTES_PER_S
from raddle.core.kvcache.pool import RepairLoop, RepairProgress
from raddle.model.types import Fence, Member, RankKey

# What is being written to its keepers needs no repair: look at new blocks when they are older.
_PASS_INTERVAL_S = 2.0
log = structlog.get_logger()


class PoolRepair:
    """Runs beside one member's store."""

    def __init__(
        self,
        key: RankKey,
        store: BlockStore,
        peers: PoolPeers,
        fence: Callable[[], Fence],
        *,
        bytes_per_s: float = REPAIR_BYTES_PER_S,
        interval_s: float = _PASS_INTERVAL_S,
    ) -> None:
        self._key = key
        self._store = store
        self._peers = peers
        self._fence = fence
        self._interval_s = interval_s
        self._places = Places(time.monotonic)
        self._members: tuple[Member, ...] = ()
        self._loop: RepairLoop[tuple[str, Member]] = RepairLoop(bytes_per_s)
        #: Blocks that may lack copies.
        self._suspects: dict[str, None] = {}
        self._wake = asyncio.Event()
        store.added = self._added

    @property
    def progress(self) -> RepairProgress:
        return self._loop.progress

    def set_members(self, members: Sequence[Member]) -> None:
        """Who is in the pool now; called at each epoch."""
        self._places.set_members(members)
        self._members = tuple(members)
        self._suspects = dict.fromkeys(self._store.names())
        self._wake.set()

    def _added(self, names: tuple[str, ...]) -> None:
        self._suspects.update(dict.fromkeys(names))

    async def run(self) -> None:
        """Pass after pass, for ever."""
        while True:
            try:
                await asyncio.wait_for(self._wake.wait(), self._interval_s)
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self.make_one_pass()
            except Exception:
                # Whatever it was, blocks go on being served; the next pass looks again.
                log.exception("a pass of the repair failed")
                self._suspects = dict.fromkeys(self._store.names())

    async def make_one_pass(self) -> int:
        """Make the copies that are missing now; gives how many were made."""
        if len(self._members) < 2 or self._places.replicas < 2:  # noqa: PLR2004 - a copy and another
            self._suspects.clear()
            return 0
        names, self._suspects = tuple(self._suspects), {}
        await self._queue(names)
        made = 0
        while (item := await self._next()) is not None:
            name, member = item
            block = self._store.peek(name)
            if block is None:
                continue
            if await self._peers.put(self._fence(), member, [(name, block)]):
                made += 1
            else:
                self._suspects[name] = None
        if made:
            log.info("blocks were copied", copies=made, bytes=self._loop.progress.bytes_made)
        return made

    async def _next(self) -> tuple[str, Member] | None:
        """The hottest copy as soon as the budget allows; None when none is left."""
        wait_s = self._loop.free_at_s - time.monotonic()
        if len(self._loop) and wait_s > 0:
            await asyncio.sleep(wait_s)
        return self._loop.take(time.monotonic())

    async def _queue(self, names: Sequence[str]) -> None:
        """Queue copies of these blocks that keepers lack and that nobody before us makes."""
        wanted = dict(zip(names, self._places.keepers(names), strict=True))
        lacking: dict[str, list[Member]] = {}
        others = [member for member in self._members if member.rank != self._key]
        holders: dict[str, set[RankKey]] = {name: {self._key} for name in names}
        for member in others:
            asked = [name for name in names if member in wanted[name]]
            has = await self._peers.has(self._fence(), member, asked) if asked else set()
            if has is None:
                # It does not say: perhaps it is gone, perhaps only slow. Ask again later.
                self._suspects.update(dict.fromkeys(asked))
                continue
            for name in asked:
                if name in has:
                    holders[name].add(member.rank)
                else:
                    lacking.setdefault(name, []).append(member)
        for heat, name in enumerate(names):
            first = next((m.rank for m in wanted[name] if m.rank in holders[name]), self._key)
            block = self._store.peek(name)
            if first == self._key and block is not None:
                for member in lacking.get(name, ()):
                    size = len(block.payload)
                    self._loop.add((name, member), heat=heat, size_bytes=size)
