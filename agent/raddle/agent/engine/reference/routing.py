"""The front door's picture of one job: live ranks, who serves what, and the way to tell the leader.

In go routes from the leader, out come choices of ranks and reports of sequences. Only the newest
epoch counts; a rank that the routes leave out is lost, whatever it still sends.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import grpc
import structlog

from raddle.agent.engine.reference.blocks import block_hashes, cache_key
from raddle.model.errors import Reason, TemporaryError
from raddle.model.kinds import RoleKind
from raddle.model.reasons import Decision
from raddle.model.routes import Routes, RouteState, SequenceReport
from raddle.model.types import Member
from raddle.telemetry.channels import make_channel, send_stream
from raddle.telemetry.tls import RANK_NAME, TlsFiles
from raddle.v1 import router_pb2, router_pb2_grpc
from raddle.wire.codec import from_message, to_message
from raddle.wire.status import error_from

_RETRY_S = 0.05
_REPORT_INTERVAL_S = 0.05
# Only the routes of a job that was live once are fenced.
_LIVE_ONCE = (RouteState.LIVE, RouteState.FENCED)
T = TypeVar("T")
log = structlog.get_logger()


class Routing:
    """Routes of one job and the sequences placed on its ranks."""

    def __init__(
        self,
        identity: str,
        schedulers: list[str],
        namespace: str,
        name: str,
        model_digest: str,
        tls: TlsFiles | None = None,
    ) -> None:
        self._identity = identity
        # Front doors of one identity are told apart.
        self._id = f"{identity}/{secrets.token_hex(3)}"
        self._schedulers = schedulers
        self._namespace = namespace
        self._name = name
        self._tls = tls
        self._cache_key = cache_key(model_digest)
        self._routes: Routes | None = None
        #: The job that is or was live: another one of the same name has to become so first.
        self._live_job_uid = ""
        self._changed = asyncio.Event()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._lost: dict[str, asyncio.Event] = {}
        self._placed: dict[str, Member] = {}
        self._prefills: dict[str, int] = {}
        self._states: dict[str, Any] = {}
        self._dirty: dict[str, None] = {}
        self._report_wanted = asyncio.Event()
        self.leader = ""

    # --- routes --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow the leader for ever: its routes in, our sequences out."""
        at = 0
        while True:
            address = self.leader or self._schedulers[at % len(self._schedulers)]
            at += 1
            channel = make_channel(address, identity=self._identity, tls=self._tls, follows=True)
            try:
                await self._follow(channel)
            except grpc.aio.AioRpcError as error:
                failure = error_from(error)
                self.leader = getattr(failure, "details", {}).get("leader_address", "")
                log.info("routes are looked for elsewhere", address=address, why=failure.message)
            finally:
                await channel.close()
            await asyncio.sleep(_RETRY_S)

    async def _follow(self, channel: grpc.aio.Channel) -> None:
        stub: Any = router_pb2_grpc.RouterStub(channel)
        reporting: asyncio.Task[Any] | None = None
        try:
            request = router_pb2.WatchRoutesRequest(
                front_door_id=self._id, namespace=self._namespace, name=self._name
            )
            async for message in stub.WatchRoutes(request):
                routes = from_message(message.routes, Routes)
                self._take(routes)
                if reporting is None:
                    reporting = asyncio.create_task(self._report(stub))
                await stub.AckRoutes(
                    router_pb2.AckRoutesRequest(
                        front_door_id=self._id, job_uid=routes.job_uid, epoch=routes.epoch
                    ),
                    timeout=2.0,
                )
        finally:
            if reporting is not None:
                reporting.cancel()
                await asyncio.gather(reporting, return_exceptions=True)

    def _take(self, routes: Routes) -> None:
        old = self._routes
        if old is not None and routes.job_uid == old.job_uid and routes.epoch < old.epoch:
            log.warning("older routes are refused", epoch=routes.epoch, known=old.epoch)
            return
        self._routes = routes
        if routes.state in _LIVE_ONCE:
            self._live_job_uid = routes.job_uid
        present = {member.incarnation for member in routes.members}
        for incarnation in [i for i in self._lost if i not in present]:
            self._lost.pop(incarnation).set()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        log.info("routes", epoch=routes.epoch, state=routes.state, ranks=len(routes.members))

    async def wait_live(self, timeout_s: float) -> Routes:
        """Routes that may be used.

        Raises:
            TemporaryError: DEADLINE_EXCEEDED when there are none in time.
        """
        deadline = time.monotonic() + timeout_s
        while self._routes is None or self._routes.state is not RouteState.LIVE:
            left = deadline - time.monotonic()
            try:
                await asyncio.wait_for(self._changed.wait(), max(0.0, left))
            except TimeoutError as error:
                raise TemporaryError(
                    Reason.DEADLINE_EXCEEDED, "no rank of the job was live in time."
                ) from error
        return self._routes

    @property
    def is_live(self) -> bool:
        return self._routes is not None and self._routes.state is RouteState.LIVE

    @property
    def takes_requests(self) -> bool:
        """Is the job live, or was it and will be again? What comes in between is held."""
        routes = self._routes
        if routes is None or routes.state is RouteState.ENDED:
            return False
        return routes.job_uid == self._live_job_uid

    def channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = make_channel(
                address, identity=self._identity, tls=self._tls, server_name=RANK_NAME
            )
        return self._channels[address]

    def when_lost(self, member: Member) -> asyncio.Event:
        """Set when newer routes leave this process out."""
        event = self._lost.setdefault(member.incarnation, asyncio.Event())
        routes = self._routes
        if routes is None or all(m.incarnation != member.incarnation for m in routes.members):
            event.set()
        return event

    async def guard(self, call: Awaitable[T], member: Member) -> T:
        """A call's result, or cancellation as soon as its rank is lost."""
        waiting = asyncio.ensure_future(self.when_lost(member).wait())
        calling = asyncio.ensure_future(call)
        try:
            await asyncio.wait({waiting, calling}, return_when=asyncio.FIRST_COMPLETED)
            if calling.done():
                return calling.result()
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE,
                grpc.aio.Metadata(),
                grpc.aio.Metadata(),
                "the routes left its rank",
            )
        finally:
            waiting.cancel()
            calling.cancel()

    # --- choices -------------------------------------------------------------------------------

    def prefill_rank(self, routes: Routes) -> Member | None:
        """The prefill rank with the fewest prompts, lowest first; None if there is none."""
        ranks = [m for m in routes.members if m.kind is RoleKind.PREFILL]
        if not ranks:
            return None
        best = min(ranks, key=lambda m: self._prefills.get(m.incarnation, 0))
        self._prefills[best.incarnation] = self._prefills.get(best.incarnation, 0) + 1
        return best

    def prefill_done(self, member: Member) -> None:
        self._prefills[member.incarnation] -= 1

    def given_up(self, routes: Routes, sequence_id: str) -> str:
        """Why the recovery plan gave the sequence up; empty if it did not."""
        for restore in routes.restores:
            if restore.sequence_id == sequence_id and restore.why.says(Decision.GIVE_UP):
                return restore.why.message
        return ""

    def decode_rank(self, routes: Routes, sequence_id: str) -> Member | None:
        """Where the recovery plan puts the sequence, else where it was, else the least loaded."""
        ranks = {m.rank: m for m in routes.members if m.kind is RoleKind.DECODE}
        for restore in routes.restores:
            if restore.sequence_id == sequence_id and restore.target in ranks:
                return ranks[restore.target]
        was = self._placed.get(sequence_id)
        if was is not None and any(m.incarnation == was.incarnation for m in ranks.values()):
            return was
        counts: dict[str, int] = {}
        for member in self._placed.values():
            counts[member.incarnation] = counts.get(member.incarnation, 0) + 1
        return min(ranks.values(), key=lambda m: counts.get(m.incarnation, 0), default=None)

    # --- sequences -----------------------------------------------------------------------------

    def sequence_began(self, state: Any) -> None:
        self._states[state.sequence_id] = state

    def sequence_placed(self, sequence_id: str, member: Member) -> None:
        self._placed[sequence_id] = member
        self._tell(sequence_id)

    def served_by(self, sequence_id: str) -> str:
        """The process that decodes a sequence now, by its incarnation."""
        member = self._placed.get(sequence_id)
        return member.incarnation if member is not None else ""

    def sequence_grew(self, sequence_id: str) -> None:
        self._tell(sequence_id)

    def sequence_ended(self, sequence_id: str) -> None:
        self._placed.pop(sequence_id, None)
        self._states.pop(sequence_id, None)
        self._tell(sequence_id)

    def _tell(self, sequence_id: str) -> None:
        self._dirty[sequence_id] = None
        self._report_wanted.set()

    async def _report(self, stub: Any) -> None:
        while True:
            try:
                await send_stream(stub.ReportSequences, self._reports())
            except grpc.aio.AioRpcError as error:
                log.info("sequence reports broke off", why=error.details())
            await asyncio.sleep(_RETRY_S)

    async def _reports(self) -> AsyncIterator[router_pb2.ReportSequencesRequest]:
        """All sequences first, then what changed, at most every few milliseconds."""
        self._dirty = {}
        yield self._request(list(self._states), snapshot=True)
        while True:
            await self._report_wanted.wait()
            self._report_wanted.clear()
            dirty, self._dirty = list(self._dirty), {}
            yield self._request(dirty, snapshot=False)
            await asyncio.sleep(_REPORT_INTERVAL_S)

    def _request(self, names: list[str], *, snapshot: bool) -> router_pb2.ReportSequencesRequest:
        job_uid = self._routes.job_uid if self._routes is not None else ""
        message = router_pb2.ReportSequencesRequest(
            front_door_id=self._id, job_uid=job_uid, snapshot=snapshot
        )
        for name in names:
            state, member = self._states.get(name), self._placed.get(name)
            if state is None:
                message.removed.append(name)
            elif member is not None:
                message.updated.append(to_message(self._row(state, member), _REPORT))
        return message

    def _row(self, state: Any, member: Member) -> SequenceReport:
        tokens = self._routes.kv_block_tokens if self._routes is not None else 1
        known = [*state.prompt, *state.sent][:-1]
        return SequenceReport(
            sequence_id=state.sequence_id,
            rank=member.rank,
            prompt_tokens=len(state.prompt),
            sent_tokens=len(state.sent),
            block_hashes=tuple(block_hashes(self._cache_key, known, tokens)),
            left=max(0.001, state.left_s),
        )

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()


_REPORT = router_pb2.SequenceReport
