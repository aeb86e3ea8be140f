"""A pool member's repair: copies of its blocks that other members should have and lack.

In go the members of each epoch and the blocks that come in; out go copies, hottest first, under a
bandwidth budget, and reports of where this stands. Whoever holds a block and ranks first for it
among the holders makes its copies, so each is made once. A pass over what may lack copies follows
each change of members; blocks that came since, and those whose copy failed, are looked at a little
later.

A member whose node is drained counts as no holder: it, or who ranks before it, makes copies of all
that it holds, and it says when they are made, so that its process may end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from raddle.agent.engine.reference.block_store import Block, BlockStore
from raddle.agent.engine.reference.places import Places
from raddle.agent.engine.reference.pool import ROUNDS_BEYOND_REPLICAS, PoolPeers
from raddle.core.kvcache.figures import REPAIR_BYTES_PER_S
from raddle.core.kvcache.pool import RepairLoop, ramp
from raddle.model.stats import KvRepair
from raddle.model.types import Fence, Member, RankKey

# What is being written to its keepers needs no repair: look at new blocks when they are older.
_PASS_INTERVAL_S = 2.0
# Somebody waits for a member that hands its blocks on: it looks again sooner.
_HANDING_ON_INTERVAL_S = 0.2
# How often a long pass says where it stands.
_REPORT_INTERVAL_S = 0.5
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy to be made: of which block, its ranking, and who has it (its other copies add)."""

    name: str
    ranking: Sequence[int]
    held: list[int]


class PoolRepair:
    """Runs beside one member's store."""

    def __init__(
        self,
        key: RankKey,
        store: BlockStore,
        peers: PoolPeers,
        fence: Callable[[], Fence],
        told: Callable[[int, KvRepair], None] = lambda _epoch, _repair: None,
        *,
        bytes_per_s: float = REPAIR_BYTES_PER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._key = key
        self._store = store
        self._peers = peers
        self._fence = fence
        self._told = told
        self._clock = clock
        self._began_s = clock()
        self._places = Places(clock)
        self._draining = False
        self._epoch = 0
        self._loop: RepairLoop[_Copy] = RepairLoop(bytes_per_s)
        #: Blocks that may lack copies.
        self._suspects: dict[str, None] = {}
        self._without_room = 0
        self._last_told: tuple[int, KvRepair] | None = None
        self._told_at_s = 0.0
        self._wake = asyncio.Event()
        store.added = self._added

    @property
    def progress(self) -> KvRepair:
        """Where the repair stands."""
        made = self._loop.progress
        return KvRepair(
            copies_made=made.copies_made,
            bytes_made=made.bytes_made,
            copies_left=made.copies_left,
            bytes_left=made.bytes_left,
            left=self._loop.seconds_to_protection(self._clock()),
            is_handed_on=not self._suspects and not len(self._loop),
            copies_without_room=self._without_room,
        )

    def set_members(self, members: Sequence[Member], epoch: int) -> None:
        """Who is in the pool at the epoch."""
        self._places.set_members(members)
        self._epoch = epoch
        mine = next((member for member in members if member.rank == self._key), None)
        self._draining = mine is not None and mine.kv_draining
        if mine is not None and mine.start_epoch > min(m.start_epoch for m in members):
            # It came to a pool that has blocks: its room grows, so that what others have no room
            # for does not all come here.
            self._store.room_share = lambda: ramp(self._clock() - self._began_s)
        # What is queued goes by the numbers of the members before.
        self._loop.clear()
        self._suspects = dict.fromkeys(self._store.names())
        self._wake.set()

    def _added(self, names: tuple[str, ...]) -> None:
        self._suspects.update(dict.fromkeys(names))

    async def run(self) -> None:
        """Pass after pass, for ever."""
        while True:
            interval_s = _HANDING_ON_INTERVAL_S if self._draining else _PASS_INTERVAL_S
            try:
                await asyncio.wait_for(self._wake.wait(), interval_s)
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
        fence, epoch = self._fence(), self._epoch
        names, self._suspects = tuple(self._suspects), {}
        if self._draining or self._places.replicas > 1:
            await self._queue(fence, names)
        made = 0
        while (copy := await self._next()) is not None:
            made += await self._make(fence, copy)
            if self._clock() - self._told_at_s >= _REPORT_INTERVAL_S:
                self._tell(epoch)
        if made:
            log.info("blocks were copied", copies=made, bytes=self._loop.progress.bytes_made)
        self._tell(epoch)
        return made

    def _tell(self, epoch: int) -> None:
        """Say where the repair stands, if that is new."""
        self._told_at_s = self._clock()
        # What was found with some members says nothing of others.
        done = epoch == self._epoch and self.progress.is_handed_on
        word = (epoch, replace(self.progress, is_handed_on=done))
        if word != self._last_told:
            self._last_told = word
            self._told(*word)

    async def _next(self) -> _Copy | None:
        """The hottest copy as soon as the budget allows; None when none is left."""
        wait_s = self._loop.free_at_s - self._clock()
        if len(self._loop) and wait_s > 0:
            await asyncio.sleep(wait_s)
        return self._loop.take(self._clock())

    async def _make(self, fence: Fence, copy: _Copy) -> bool:
        """Write one copy to the best of the ranking that takes it."""
        members, held = self._places.members, copy.held
        for _ in range(len(members) + 1):
            block = self._store.peek(copy.name)
            found = self._target(copy, block) if block is not None else None
            if block is None or found is None:
                return False
            target, idle_s = found
            refused = await self._peers.put(fence, members[target], [(copy.name, block)], idle_s)
            if members is not self._places.members:
                return False
            if refused is None:
                self._suspects[copy.name] = None
                return False
            if not refused:
                held.append(target)
                return True
            if idle_s is not None:
                break
            self._places.is_full(target)
        self._without_room += 1
        return False

    def _target(self, copy: _Copy, block: Block) -> tuple[int, float | None] | None:
        """Who gets a copy: the best that has room, else that makes some of what idled so long.

        The writer's node gets the only copy when there is no other one left: better than none.
        """
        held, idle_s = copy.held, self._store.idle_s(copy.name)
        for writer_node in (block.writer_node, ""):
            for usable, evict_idle_s in ((self._places.with_room(), None), (None, idle_s)):
                picked = self._places.pick(
                    copy.ranking, held=held, usable=usable, writer_node=writer_node
                )
                if len(picked) > len(held):
                    return picked[len(held)], evict_idle_s
        return None

    async def _queue(self, fence: Fence, names: Sequence[str]) -> None:
        """Queue copies of these blocks that lack some and that nobody before us makes."""
        members = self._places.members
        rankings = dict(zip(names, self._places.rankings(names), strict=True))
        holders = await self._holders(fence, members, rankings)
        if members is not self._places.members:
            return
        for heat, (name, ranking) in enumerate(rankings.items()):
            block = self._store.peek(name)
            if block is None or name in self._suspects:
                continue
            held = [number for number in holders[name] if not members[number].kv_draining]
            lacking = len(self._places.pick(ranking, held=held)) - len(held)
            first = next((number for number in ranking if number in holders[name]), None)
            if lacking and first is not None and members[first].rank != self._key:
                # It makes them. Whoever waits to end looks whether it did.
                if self._draining:
                    self._suspects[name] = None
                continue
            for _ in range(lacking):
                size = len(block.payload)
                self._loop.add(_Copy(name, ranking, held), heat=heat, size_bytes=size)

    async def _holders(
        self, fence: Fence, members: Sequence[Member], rankings: dict[str, list[int]]
    ) -> dict[str, list[int]]:
        """Who has each block: asked are those that should have it, and a few after them."""
        mine = self._places.number(self._key)
        replicas = self._places.replicas
        found = {name: [] if mine is None else [mine] for name in rankings}
        for number in range(min(len(members), replicas + ROUNDS_BEYOND_REPLICAS)):
            asked: dict[int, list[str]] = {}
            for name, ranking in rankings.items():
                staying = [n for n in found[name] if not members[n].kv_draining]
                if ranking[number] != mine and len(staying) < replicas:
                    asked.setdefault(ranking[number], []).append(name)
            for member, some in asked.items():
                has = await self._peers.has(fence, members[member], some)
                if has is None:
                    # It does not say: perhaps it is gone, perhaps only slow. Ask again later.
                    self._suspects.update(dict.fromkeys(some))
                for name in has or ():
                    found[name].append(member)
        return found
