"""Which of several operators acts: the holder of a Lease in the API server.

The client library's own election ends at the first broken connection, measures with the wall
clock, and gives nothing back; this one waits troubles out, stops before its time is over by the
loop's monotonic clock, and lets go in the end, so that the next one need not wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import structlog

from raddle.model.errors import ConflictError, RaddleError
from raddle.operator.cluster import Cluster

DURATION_S = 15
#: Without a renewal for so long the holder stops; others may take over after DURATION_S.
DEADLINE_S = 10.0
RENEW_S = 2.0
log = structlog.get_logger()


class Lease:
    """One candidate."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, identity: str) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._name = name
        self._identity = identity
        #: What was seen last, and when: another's lease ends when it stood still for long enough.
        self._seen: tuple[str, str] = ("", "")
        self._seen_at_s = 0.0
        #: When the newest renewal that succeeded was asked for: others count from later on.
        self._renewed_at_s = 0.0
        self.held = False

    async def lead(self, work: Callable[[], Awaitable[None]], stop: asyncio.Event) -> None:
        """Work while this process holds the Lease; return when told to stop.

        Work that ends by itself is begun again with the next term.
        """
        while not stop.is_set():
            if not await self._tried():
                await _pause(stop, RENEW_S)
                continue
            log.info("this operator leads", lease=self._name)
            self.held = True
            try:
                await self._hold(work, stop)
            finally:
                self.held = False
                await self._release()
            log.info("this operator leads no more", lease=self._name)

    async def _hold(self, work: Callable[[], Awaitable[None]], stop: asyncio.Event) -> None:
        working = asyncio.ensure_future(work())
        renewing = asyncio.create_task(self._renew())
        stopping = asyncio.create_task(stop.wait())
        parts: set[asyncio.Future[Any]] = {working, renewing, stopping}
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _renew(self) -> None:
        """Until the Lease cannot be renewed in time, though an attempt is still under way."""
        while True:
            try:
                async with asyncio.timeout_at(self._renewed_at_s + DEADLINE_S):
                    await asyncio.sleep(RENEW_S)
                    if not await self._tried() and self._seen[0] not in ("", self._identity):
                        return
            except TimeoutError:
                return

    async def _tried(self) -> bool:
        """Is the Lease ours after this attempt?"""
        try:
            return await self._try()
        except ConflictError:
            return False
        except RaddleError as error:
            log.warning("the Lease cannot be reached", lease=self._name, why=str(error))
            return False

    async def _try(self) -> bool:
        lease = await self._cluster.get("Lease", self._namespace, self._name)
        if lease is None:
            asked_at_s = _now_s()
            made = self._renewed({"metadata": {}, "spec": {}}, takes_over=True)
            if await self._cluster.create(made) is None:
                return False
            self._renewed_at_s = asked_at_s
            return True
        spec = lease.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        seen = (holder, spec.get("renewTime") or "")
        if seen != self._seen:
            self._seen, self._seen_at_s = seen, _now_s()
        duration_s = float(spec.get("leaseDurationSeconds") or DURATION_S)
        if holder not in ("", self._identity) and _now_s() < self._seen_at_s + duration_s:
            return False
        asked_at_s = _now_s()
        await self._cluster.replace(self._renewed(lease, takes_over=holder != self._identity))
        self._renewed_at_s = asked_at_s
        return True

    def _renewed(self, lease: dict[str, Any], *, takes_over: bool) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = dict(lease.get("spec") or {})
        spec |= {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": DURATION_S,
            "renewTime": now,
        }
        if takes_over:
            spec |= {"acquireTime": now, "leaseTransitions": spec.get("leaseTransitions", -1) + 1}
        about = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
        metadata = {**lease["metadata"], "name": self._name, "namespace": self._namespace}
        return {**about, "metadata": metadata, "spec": spec}

    async def _release(self) -> None:
        """Say that nobody holds it, if it is still ours."""
        try:
            lease = await self._cluster.get("Lease", self._namespace, self._name)
            if lease is not None and lease["spec"].get("holderIdentity") == self._identity:
                free = self._renewed(lease, takes_over=False)
                free["spec"]["holderIdentity"] = ""
                await self._cluster.replace(free)
        except RaddleError as error:
            log.info("the Lease is left to run out", lease=self._name, why=str(error))


def _now_s() -> float:
    return asyncio.get_running_loop().time()


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
