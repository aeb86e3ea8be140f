"""The way to the scheduler: calls, and pictures of jobs, nodes, maintenances and incidents.

The pictures come from the API's watches and are never polled. A watch that breaks is begun again
with a snapshot, at the leader that the refusal names or at the next address; what a snapshot does
not have any more is told as a change too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import structlog

from raddle.model.errors import RaddleError, Reason, TemporaryError
from raddle.telemetry.channels import make_channel
from raddle.telemetry.tls import TlsFiles
from raddle.v1 import scheduler_pb2, scheduler_pb2_grpc
from raddle.wire.status import error_from

IDENTITY = "operator"
TIMEOUT_S = 10.0
_RETRY_S_MIN = 0.2
_RETRY_S_MAX = 1.0
log = structlog.get_logger()


class Picture:
    """What one watch told, by name."""

    def __init__(self, field: str, name_field: str) -> None:
        self._field = field
        self._name_field = name_field
        #: Values as messages of the watch.
        self.values: dict[str, Any] = {}
        self.synced = asyncio.Event()
        #: Called with the name of what changed, and of what went; not before all was told once.
        self.listeners: list[Callable[[str], None]] = []
        #: Called when a snapshot is whole.
        self.when_whole: list[Callable[[], None]] = []
        self._fresh: set[str] = set()

    def require_whole(self) -> None:
        """Refuse until the scheduler told all there is; whoever asked is called again then.

        Raises:
            TemporaryError: NO_LEADER.
        """
        if not self.synced.is_set():
            message = f"the scheduler has not told yet of each {self._field} that it knows"
            raise TemporaryError(Reason.NO_LEADER, message)

    def begin(self) -> None:
        """A watch begins: what its snapshot does not name is gone."""
        self._fresh = set()

    def take(self, message: Any) -> None:
        """One message of the watch."""
        name = str(getattr(getattr(message, self._field), self._name_field))
        if message.kind == scheduler_pb2.WATCH_KIND_SYNCED:
            gone = [known for known in self.values if known not in self._fresh]
            for known in gone:
                del self.values[known]
            first = [] if self.synced.is_set() else list(self.values)
            self.synced.set()
            self._tell([*first, *gone])
            for listener in self.when_whole:
                listener()
        elif message.kind in (
            scheduler_pb2.WATCH_KIND_SNAPSHOT,
            scheduler_pb2.WATCH_KIND_CHANGED,
        ):
            self._fresh.add(name)
            self.values[name] = message
            self._tell([name])
        elif message.kind == scheduler_pb2.WATCH_KIND_DELETED:
            self.values.pop(name, None)
            self._tell([name])

    def _tell(self, names: Sequence[str]) -> None:
        for name in names if self.synced.is_set() else ():
            for listener in self.listeners:
                listener(name)


class SchedulerLink:
    """One operator's connection."""

    def __init__(self, schedulers: Sequence[str], tls: TlsFiles | None) -> None:
        self._schedulers = list(schedulers)
        self._tls = tls
        self._next = 0
        self._address = ""
        self._channel: grpc.aio.Channel | None = None
        self.jobs = Picture("job", "uid")
        self.nodes = Picture("node", "node")
        self.maintenances = Picture("maintenance", "id")
        self.incidents = Picture("incident", "id")
        #: Broken watches so far, for metrics.
        self.breaks = 0

    def _stub(self) -> Any:
        if self._channel is None:
            if not self._address:
                self._address = self._schedulers[self._next % len(self._schedulers)]
                self._next += 1
            self._channel = make_channel(
                self._address, identity=IDENTITY, tls=self._tls, follows=True
            )
        return scheduler_pb2_grpc.SchedulerStub(self._channel)

    async def call(self, method: str, request: Any) -> Any:
        """One unary call.

        Raises:
            RaddleError: what the scheduler refused, or why it could not be asked.
        """
        stub, channel = self._stub(), self._channel
        try:
            return await getattr(stub, method)(request, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                await self._leave(channel, "")
            raise error_from(error) from error
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            # Another call found the channel of no use and closed it under this one.
            message = "the way to the scheduler was closed; another one is taken"
            raise TemporaryError(Reason.NO_LEADER, message) from error

    async def _leave(self, channel: grpc.aio.Channel | None, leader: str) -> None:
        """This channel is of no use; the next one goes to the leader, if it is known."""
        if channel is None or channel is not self._channel:
            return
        self._channel, self._address = None, leader
        await channel.close()

    async def run(self) -> None:
        """Follow all watches for ever."""
        follow = self._follow
        async with asyncio.TaskGroup() as group:
            for method, request, picture in (
                ("WatchJobs", scheduler_pb2.WatchJobsRequest(), self.jobs),
                ("WatchNodes", scheduler_pb2.WatchNodesRequest(dies=True), self.nodes),
                (
                    "WatchMaintenances",
                    scheduler_pb2.WatchMaintenancesRequest(),
                    self.maintenances,
                ),
                ("WatchIncidents", scheduler_pb2.WatchIncidentsRequest(), self.incidents),
            ):
                group.create_task(follow(method, request, picture))

    async def _follow(self, method: str, request: Any, picture: Picture) -> None:
        pause_s, was_led = _RETRY_S_MIN, False
        while True:
            stub, channel = self._stub(), self._channel
            picture.begin()
            is_led = False
            try:
                async for message in getattr(stub, method)(request):
                    picture.take(message)
                    pause_s = _RETRY_S_MIN
                why: RaddleError | str = "it ended"
            except grpc.aio.AioRpcError as error:
                failure = error_from(error)
                why = failure
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    leader = failure.details.get("leader_address", "")
                    is_led = bool(leader)
                    await self._leave(channel, leader)
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                # Another watch closed the channel under this one.
                why, is_led = "its channel was closed", True
            self.breaks += 1
            log.info("a watch is begun again", watch=method, why=str(why))
            if is_led and not was_led:
                # Somebody said where to go. Said twice in a row, the leader is just changing.
                was_led = True
                continue
            was_led = False
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RETRY_S_MAX)

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None


def _is_cancelled() -> bool:
    """Is this very task to end?"""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
