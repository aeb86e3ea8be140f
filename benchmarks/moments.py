"""Moments of one recovery on this host's monotonic clock, and the phases that lie between them.

In go etcd's history as it is seen here, the incident's journal and what `timed_scheduler` tells;
out come moments in seconds and phases in milliseconds. Everything runs on one host, so the moments
of all processes compare.
"""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from raddle.model import keys
from raddle.model.incident import Incident, IncidentPhase
from raddle.store.etcd.store import EtcdStore
from raddle.store.follow import follow
from raddle.store.protocol import Snapshot
from raddle.wire import records as wire

#: A phase is named by what ended it, at that moment; None: this did not happen.
Moment = tuple[str, float | None]
_TIMEOUT_S = 60.0


def phases_ms(began_s: float, moments: Iterable[Moment]) -> dict[str, float]:
    """Milliseconds between consecutive moments: they add up to the time from the first to the last.

    What did not happen has no phase; its time belongs to the next one. A phase is below zero where
    two processes saw the same change in another order than it was made.
    """
    found: dict[str, float] = {}
    for name, moment_s in moments:
        if moment_s is not None:
            found[name] = (moment_s - began_s) * 1e3
            began_s = moment_s
    return found


def with_key(key: str) -> Callable[[str], bool]:
    return key.__eq__


def below(prefix: str) -> Callable[[str], bool]:
    return lambda key: key.startswith(prefix)


class History:
    """When records below some prefixes changed, as a watcher of etcd saw it from `start` on."""

    def __init__(self, endpoints: str, *prefixes: str) -> None:
        self._store = EtcdStore(endpoints.split(","), "default", operation_key="operations/bench")
        self._prefixes = (keys.LEADER, *prefixes)
        self._seen: list[tuple[float, str, bytes | None]] = []
        self._moved = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        #: What the monotonic clock lacks to the wall clock, as a term began.
        self._wall_s = 0.0

    async def start(self) -> None:
        """Follow, and return when all there is was seen."""
        begun = [asyncio.Event() for _ in self._prefixes]
        self._tasks = [
            asyncio.create_task(self._follow(prefix, event))
            for prefix, event in zip(self._prefixes, begun, strict=True)
        ]
        await asyncio.gather(*(event.wait() for event in begun))

    async def _follow(self, prefix: str, begun: asyncio.Event) -> None:
        async for item in follow(self._store, prefix):
            now = time.monotonic()
            if prefix == keys.LEADER:
                # A leader's times are the wall clock's at the start of its term, carried on by the
                # monotonic clock: what adjusts the wall clock later does not count.
                self._wall_s = time.time() - now
            if isinstance(item, Snapshot):
                self._seen += [(now, record.key, record.value) for record in item.records]
            else:
                for change in item.changes:
                    value = change.record.value if change.record is not None else None
                    self._seen.append((now, change.key, value))
            begun.set()
            moved, self._moved = self._moved, asyncio.Event()
            moved.set()

    def find(
        self, matches: Callable[[str], bool], after_s: float, wanted: Callable[[Any], bool]
    ) -> tuple[float, Any] | None:
        """The first change since then to a wanted record, or to None for one that went."""
        first = bisect_left(self._seen, after_s, key=lambda seen: seen[0])
        for moment_s, key, data in self._seen[first:]:
            if matches(key):
                value = None if data is None else wire.decode(key, data)
                if wanted(value):
                    return moment_s, value
        return None

    async def wait(
        self, matches: Callable[[str], bool], after_s: float, wanted: Callable[[Any], bool]
    ) -> tuple[float, Any]:
        """The same, once it happened."""
        async with asyncio.timeout(_TIMEOUT_S):
            while (found := self.find(matches, after_s, wanted)) is None:
                await self._moved.wait()
        return found

    async def closed_incident(self, job_uid: str, epoch: int, after_s: float) -> Incident:
        """The incident that led to this epoch of the job, with its whole journal."""

        def is_it(value: Any) -> bool:
            return value is not None and value.phase is IncidentPhase.CLOSED and _led(value)

        def _led(value: Any) -> bool:
            return any((p.job_uid, p.epoch) == (job_uid, epoch) for p in value.plans)

        _, incident = await self.wait(below(keys.INCIDENTS), after_s, is_it)
        assert isinstance(incident, Incident)
        return incident

    def began(self, incident: Incident, phase: IncidentPhase) -> float | None:
        """When a leader began a phase of the incident, for the last time; None if none did."""
        starts = [entry.start_time for entry in incident.timeline if entry.phase is phase]
        return self.monotonic_s(starts[-1]) if starts else None

    def monotonic_s(self, wall_s: float) -> float:
        return wall_s - self._wall_s

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._store.close()


class SchedulerTimes:
    """What `timed_scheduler` processes wrote of themselves: a line of JSON each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _lines(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def decision(self, incident_id: str) -> dict[str, float]:
        """When the incident's last plan was decided and encoded, seconds; empty if unknown."""
        found = [line for line in self._lines() if line.get("incident") == incident_id]
        return {name: found[-1][name] for name in ("decided", "encoded")} if found else {}

    def takes(self, after_s: float) -> float | None:
        """When a standby first set out to take the lead since then."""
        moments = (line["takes"] for line in self._lines() if "takes" in line)
        return min((moment for moment in moments if moment >= after_s), default=None)


def decision(history: History, times: SchedulerTimes, incident: Incident) -> list[Moment]:
    """From the leader's first sight of the loss until the plan is encoded."""
    told = times.decision(incident.id)
    return [
        ("gather", history.began(incident, IncidentPhase.DECIDE)),
        ("decide", told.get("decided")),
        ("encode", told.get("encoded")),
    ]
