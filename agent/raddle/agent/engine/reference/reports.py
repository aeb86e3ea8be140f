"""What a rank says of itself while it runs: peer faults, pool changes, counts, to any listener."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from raddle.model.kv import KvEventKind, KvTier
from raddle.model.stats import KvEvent, PeerFault, RankStats
from raddle.model.types import RankKey

_QUEUE_MAX = 10_000
_BLOCKS_A_REPORT = 2_000


class Reports:
    """Fans reports out to streams; a new stream begins with a full report of the pool."""

    def __init__(self, key: RankKey, incarnation: str) -> None:
        self._key = key
        self._incarnation = incarnation
        self._queues: set[asyncio.Queue[RankStats]] = set()
        self._sequence = 0
        #: Faults of the newest epoch, told again to each new listener.
        self._faults: dict[tuple[str, int], PeerFault] = {}
        self.full_report: Callable[[], tuple[str, ...]] = tuple

    def kv_changed(self, kind: KvEventKind, names: tuple[str, ...]) -> None:
        for start in range(0, len(names), _BLOCKS_A_REPORT):
            part = names[start : start + _BLOCKS_A_REPORT]
            self._tell(RankStats(kv_events=(self._event(kind, part),)))

    def _event(self, kind: KvEventKind, names: tuple[str, ...]) -> KvEvent:
        event = KvEvent(kind=kind, block_hashes=names, sequence=self._sequence, tier=KvTier.DRAM)
        self._sequence += 1
        return event

    def peer_fault(self, fault: PeerFault) -> None:
        """Safe from the event loop's thread only."""
        self._faults = {k: f for k, f in self._faults.items() if f.epoch >= fault.epoch}
        self._faults[fault.peer_incarnation, fault.epoch] = fault
        self._tell(RankStats(peer_faults=(fault,), epoch=fault.epoch))

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
        self._queues.add(queue)
        try:
            while queue in self._queues or not queue.empty():
                stats = await queue.get()
                yield RankStats(
                    rank=self._key,
                    incarnation=self._incarnation,
                    epoch=stats.epoch,
                    peer_faults=stats.peer_faults,
                    expert_loads=stats.expert_loads,
                    kv_events=stats.kv_events,
                    sequences_running=stats.sequences_running,
                    tokens_generated=stats.tokens_generated,
                    kv_tokens_restored=stats.kv_tokens_restored,
                    kv_tokens_recomputed=stats.kv_tokens_recomputed,
                )
        finally:
            self._queues.discard(queue)
