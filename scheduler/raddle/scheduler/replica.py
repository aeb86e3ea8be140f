"""What one scheduler process is: its mirror, its role, and the leader that it knows.

Services ask it for reads, put requests through it, and learn from it where the leader is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raddle.core.events import Event
from raddle.core.requests import Request
from raddle.model import keys
from raddle.model.errors import Reason, TemporaryError
from raddle.model.incident import LeaderRecord
from raddle.scheduler.authorization import Policy
from raddle.scheduler.leader import Leader
from raddle.scheduler.metrics import Metrics
from raddle.scheduler.mirror import Mirror
from raddle.telemetry.tls import TlsFiles


@dataclass(slots=True)
class Replica:
    """One scheduler, leading or standing by."""

    identity: str
    address: str
    version: str
    mirror: Mirror
    metrics: Metrics
    policy: Policy
    tls: TlsFiles | None = None
    fault_injection: bool = False
    store_version: str = ""
    leader: Leader | None = None
    #: Why the store could not be asked for a leader lately; empty while it answers.
    store_trouble: Callable[[], str] = lambda: ""
    start_time: float = field(default_factory=time.time)

    def leader_record(self) -> LeaderRecord | None:
        found: LeaderRecord | None = self.mirror.get(keys.LEADER)
        return found

    def require_leader(self) -> Leader:
        """The leader in this process.

        Raises:
            TemporaryError: NOT_LEADER with the leader's address, or NO_LEADER.
        """
        if self.leader is not None:
            return self.leader
        record = self.leader_record()
        if record is None or record.identity == self.identity:
            raise self._leaderless("no scheduler leads at the moment")
        raise TemporaryError(
            Reason.NOT_LEADER, f"the leader is {record.address}", leader_address=record.address
        )

    def _leaderless(self, what: str) -> TemporaryError:
        """Without its store nobody can lead: then that is what to look at."""
        trouble = self.store_trouble()
        if not trouble:
            return TemporaryError(
                Reason.NO_LEADER, f"{what}: one is being elected, or the store is away; try again."
            )
        return TemporaryError(
            Reason.STORE_UNAVAILABLE,
            f"{what}, since the store does not answer ({trouble}): look after etcd, then repeat"
            " with the same idempotency key.",
        )

    async def ask(self, request: Request, identity: str, timeout_s: float) -> Any:
        return await self.require_leader().ask(request, identity, timeout_s)

    def tell(self, event: Event) -> None:
        self.require_leader().tell(event)

    async def wait_leader_changed(self, known: LeaderRecord) -> None:
        """Return once another one leads, in this process or elsewhere."""
        while self.leader is None and self.leader_record() in (known, None):
            await self.mirror.wait_moved()

    async def wait_leader_known(self, timeout_s: float) -> LeaderRecord | None:
        """The leader's record, waiting a while for one; None when we lead ourselves.

        Raises:
            TemporaryError: NO_LEADER at the timeout.
        """
        deadline = time.monotonic() + timeout_s
        while self.leader is None:
            record = self.leader_record()
            if record is not None and record.identity != self.identity:
                return record
            if time.monotonic() >= deadline:
                raise self._leaderless("no scheduler led until the deadline")
            await asyncio.sleep(0.05)
        return None
