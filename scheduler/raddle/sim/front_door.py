"""A simulated front door: it owns sequences and follows their jobs' routes."""

from __future__ import annotations

import asyncio

from raddle.core.events import FrontDoorLost, SequencesReported
from raddle.model import keys
from raddle.model.errors import PermanentError
from raddle.model.kinds import RoleKind
from raddle.model.routes import Routes, RouteState, SequenceReport
from raddle.model.types import RankKey
from raddle.scheduler.leader import Leader
from raddle.sim.wire import Wire
from raddle.store.follow import follow
from raddle.store.memory import MemoryStore
from raddle.store.protocol import Snapshot
from raddle.wire import records as codec

DOOR = "door-0"
SEQUENCES_A_JOB = 12


class SimulatedFrontDoor:
    """Keeps some sequences running on every live job; each new leader is told all of them."""

    def __init__(self, store: MemoryStore, wire: Wire) -> None:
        self._store = store
        self._wire = wire
        self.routes: dict[str, Routes] = {}
        self.sequences: dict[str, dict[str, SequenceReport]] = {}
        #: Sequences that a restore of the plan moved, and those that the door sent anew itself.
        self.restored = 0
        self.sent_anew = 0

    async def run(self) -> None:
        await asyncio.gather(self._follow_routes(), self._follow_leaders())

    async def _follow_leaders(self) -> None:
        while True:
            leader = self._wire.leader
            if leader is not None:
                for job_uid in self.sequences:
                    self._tell(leader, job_uid, snapshot=True)
            await self._wire.wait_change()
            if leader is not None:
                leader.tell(FrontDoorLost(DOOR))

    async def _follow_routes(self) -> None:
        async for item in follow(self._store, keys.ROUTES):
            if isinstance(item, Snapshot):
                changed = [(record.key, record.value) for record in item.records]
                present = {record.key for record in item.records}
                for job_uid in [uid for uid in self.routes if keys.routes(uid) not in present]:
                    self._gone(job_uid)
            else:
                changed = [(c.key, c.record.value) for c in item.changes if c.record is not None]
                for gone in [c.key for c in item.changes if c.record is None]:
                    self._gone(gone.removeprefix(keys.ROUTES))
            for key, value in changed:
                try:
                    routes = codec.decode(key, value)
                except PermanentError:
                    # It goes on with what it knows until the record is written anew.
                    continue
                self._routed(routes)

    def _gone(self, job_uid: str) -> None:
        self.routes.pop(job_uid, None)
        self.sequences.pop(job_uid, None)

    def _routed(self, routes: Routes) -> None:
        old = self.routes.get(routes.job_uid)
        if old is not None and routes.epoch < old.epoch:
            # Refused, as of a store that was set back: a leader goes above every live epoch.
            return
        self.routes[routes.job_uid] = routes
        if routes.state is not RouteState.LIVE:
            return
        decode = [m.rank for m in routes.members if m.kind is RoleKind.DECODE]
        targets = {restore.sequence_id: restore.target for restore in routes.restores}
        mine = self.sequences.setdefault(routes.job_uid, {})
        for number in range(SEQUENCES_A_JOB):
            name = f"s{number}"
            rank = self._rank_of(mine.get(name), targets.get(name), decode, number)
            mine[name] = SequenceReport(
                sequence_id=name, rank=rank, prompt_tokens=64, sent_tokens=number
            )
        if self._wire.leader is not None:
            self._tell(self._wire.leader, routes.job_uid, snapshot=False)

    def _rank_of(
        self,
        old: SequenceReport | None,
        target: RankKey | None,
        decode: list[RankKey],
        number: int,
    ) -> RankKey:
        if old is not None and target in decode:
            self.restored += old.rank != target
            return target
        if old is not None and old.rank in decode:
            return old.rank
        self.sent_anew += old is not None
        return decode[number % len(decode)]

    def _tell(self, leader: Leader, job_uid: str, *, snapshot: bool) -> None:
        updated = tuple(self.sequences[job_uid].values())
        leader.tell(SequencesReported(DOOR, job_uid, snapshot, updated, ()))
