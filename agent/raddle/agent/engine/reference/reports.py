"""What a rank says of itself while it runs: faults, blocks, repair, counts, to any listener."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from raddle.model.kv import KvEventKind, KvTier
from raddle.model.stats import KvEvent, KvRepair, PeerFault, RankStats
from raddle.model.types import RankKey

_QUEUE_MAX = 10_000
_BLOCKS_A_REPORT = 2_000


class Reports:
    """Fans reports out to streams; a new stream begins with a full report of the rank's blocks."""

    def __init__(self, key: RankKey, incarnation: str, tier: KvTier) -> None:
        self._key = key
        self._incarnation = incarnation
        self._tier = tier
        self._queues: set[asyncio.Queue[RankStats]] = set()
        self._sequence = 0
        #: Faults of the newest epoch, told again to each new listener.
        self._faults: dict[tuple[str, int], PeerFault] = {}
        #: The last word on the repair, told again to each new listener.
        self._repair: RankStats | None = None
        self.full_report: Callable[[], tuple[str, ...]] = tuple

    def kv_changed(self, kind: KvEventKind, names: tuple[str, ...]) -> None:
        for start in range(0, len(names), _BLOCKS_A_REPORT):
            part = names[start : start + _BLOCKS_A_REPORT]
            self._tell(RankStats(kv_events=(self._event(kind, part),)))

    def _event(self, kind: KvEventKind, names: tuple[str, ...]) -> KvEvent:
        event = KvEvent(kind=kind, block_hashes=names, sequence=self._sequence, tier=self._tier)
        self._sequence += 1
        return event

    def peer_fault(self, fault: PeerFault) -> None:
        """Safe from the event loop's thread only."""
        self._faults = {k: f for k, f in self._faults.items() if f.epoch >= fault.epoch}
        self._faults[fault.peer_incarnation, fault.epoch] = fault
        self._tell(RankStats(peer_faults=(fault,), epoch=fault.epoch))

    def repaired(self, epoch: int, repair: KvRepair) -> None:
        """Where the repair of this pool member stands."""
        self._repair = RankStats(epoch=epoch, kv_repair=repair)
        self._tell(self._repair)

    def counted(self, stats: RankStats) -> None:
        self._tell(stats)

    def _tell(self, stats: RankStats) -> None:
        for queue in tuple(self._queues):
            if queue.full():
                self._queues.discard(queue)
            else:
                queue.put_nowait(stats)

    async def stream(self) -> AsyncIterator[RankStats]:
        """All reports from now on, after what a new listener has to know."""
        queue: asyncio.Queue[RankStats] = asyncio.Queue(_QUEUE_MAX)
        for fault in self._faults.values():
            queue.put_nowait(RankStats(peer_faults=(fault,), epoch=fault.epoch))
        names = self.full_report()
        # CLEARED names what is there from now on: whatever was told before is void.
        queue.put_nowait(RankStats(kv_events=(self._event(KvEventKind.CLEARED, ()),)))
        for start in range(0, len(names), _BLOCKS_A_REPORT):
            part = names[start : start + _BLOCKS_A_REPORT]
            queue.put_nowait(RankStats(kv_events=(self._event(KvEventKind.STORED, part),)))
        if self._repair is not None:
            queue.put_nowait(self._repair)
        self._queues.add(queue)
        try:
            while queue in self._queues or not queue.empty():
                stats = await queue.get()
                yield replace(stats, rank=self._key, incarnation=self._incarnation)
        finally:
            self._queues.discard(queue)
