"""Leader election: one key, put once a term, and a fence that a deposed leader cannot pass.

In go a store, a value (who we are) and a way to ask whether the present leader lives; out comes a
`Term` with the fence for every transaction. Safety comes from the fence, not from time, so a
standby may take over fast: at once when the leader's connection closed and a new one is refused,
else after some seconds of silence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum

import structlog

from raddle.model import keys
from raddle.model.errors import RaddleError, TemporaryError
from raddle.store.protocol import Compare, Delete, Lease, Put, Record, Store, Transaction

LEADER_TTL_S = 10.0
PROBE_INTERVAL_S = 0.1
SILENCE_MAX_S = 2.5
# A leader that was deposed while it lived waits this long, doubled each time, before it takes over
# from a living one again: two that cannot see each other must not duel.
DEPOSED_WAIT_S = 10.0
DEPOSED_WAIT_MAX_S = 300.0
log = structlog.get_logger()


class Probe(Enum):
    """What a standby saw of the leader."""

    ALIVE = "alive"
    #: No answer in time: it may be stopped, or the network may be cut.
    SILENT = "silent"
    #: An established connection closed and a new one was refused: its process is gone.
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Term:
    """One leader's time in office."""

    fence: Compare
    #: The store's revision of the takeover: caches must have reached it before a decision.
    revision: int
    lease: Lease

    async def resign(self, store: Store) -> None:
        """Give the key back so that a standby need not wait."""
        try:
            await store.commit(
                Transaction(compares=(self.fence,), writes=(Delete(keys.LEADER),)), timeout_s=2.0
            )
        except RaddleError as error:
            log.info("could not resign; the lease will end", why=str(error))
        await self.lease.revoke()


class Election:
    """One replica's wish to lead. `probe` gets the leader's record as stored."""

    def __init__(
        self, store: Store, value: bytes, probe: Callable[[Record], Awaitable[Probe]]
    ) -> None:
        self._store = store
        self._value = value
        self._probe = probe
        self._not_before_s = 0.0
        #: Why the store could not be asked the last time; empty while it answers.
        self.trouble = ""
        self._wait_s = DEPOSED_WAIT_S

    def deposed(self) -> None:
        """We lost the lead while alive: be slow to take it from a living leader."""
        self._not_before_s = asyncio.get_running_loop().time() + self._wait_s
        self._wait_s = min(self._wait_s * 2, DEPOSED_WAIT_MAX_S)

    async def campaign(self) -> Term:
        """Return once we lead. Store troubles are waited out."""
        silent_since: float | None = None
        while True:
            try:
                record = await self._store.get(keys.LEADER)
                self.trouble = ""
                if record is None:
                    term = await self._take(0)
                else:
                    verdict, silent_since = await self._judge(record, silent_since)
                    term = await self._take(record.mod_revision) if verdict else None
                if term is not None:
                    return term
            except TemporaryError as error:
                log.warning("cannot campaign", why=str(error))
                self.trouble = error.message
            await asyncio.sleep(PROBE_INTERVAL_S)

    async def _judge(self, record: Record, silent_since: float | None) -> tuple[bool, float | None]:
        """(may we take over?, since when it is silent)."""
        seen = await self._probe(record)
        now = asyncio.get_running_loop().time()
        if seen is Probe.ALIVE:
            return False, None
        silent_since = silent_since if silent_since is not None else now
        if now < self._not_before_s:
            return False, silent_since
        return seen is Probe.GONE or now - silent_since >= SILENCE_MAX_S, silent_since

    async def _take(self, seen_mod_revision: int) -> Term | None:
        """Put the key under our own lease if it is still as we saw it."""
        lease = await self._store.grant(LEADER_TTL_S)
        result = None
        try:
            result = await self._store.commit(
                Transaction(
                    compares=(Compare(keys.LEADER, seen_mod_revision),),
                    writes=(Put(keys.LEADER, self._value, lease.lease_id),),
                )
            )
        finally:
            if result is None or not result.succeeded:
                await lease.revoke()
        if not result.succeeded:
            return None
        return Term(Compare(keys.LEADER, result.revision), result.revision, lease)
