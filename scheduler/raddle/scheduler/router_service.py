"""The `Router` service: routes to front doors after their commit, sequences back to the core."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from raddle.core.events import FrontDoorLost, SequencesReported
from raddle.model import keys
from raddle.model.routes import Routes, SequenceReport
from raddle.scheduler.interceptor import caller_of, refuse_foreign_front_door
from raddle.scheduler.replica import Replica
from raddle.scheduler.watches import Watches
from raddle.v1 import router_pb2, router_pb2_grpc
from raddle.wire.codec import from_message, to_message
from raddle.wire.parse import require_text

_IDLE_S = 5.0
Context = grpc.aio.ServicerContext[Any, Any]
log = structlog.get_logger()


class RouterService(router_pb2_grpc.RouterServicer):
    """See router.proto."""

    def __init__(self, replica: Replica, watches: Watches) -> None:
        self._replica = replica
        self._watches = watches

    def _matches(self, request: Any, routes: Routes, identity: str) -> bool:
        if not self._replica.policy.allows(identity, routes.namespace, "route"):
            return False
        if request.job_uid:
            return bool(routes.job_uid == request.job_uid)
        return bool(
            routes.namespace == (request.namespace or "default") and routes.name == request.name
        )

    async def WatchRoutes(
        self, request: Any, context: Context
    ) -> AsyncIterator[router_pb2.WatchRoutesResponse]:
        identity = caller_of(context)
        stream = self._watches.follow(keys.ROUTES, _IDLE_S)
        await anext(stream)
        newest: dict[str, int] = {}
        for key, routes in list(self._replica.mirror.under(keys.ROUTES)):
            if self._matches(request, routes, identity):
                newest[key] = self._replica.mirror.mod_revision(key)
                yield _response(routes)
        async for seen in stream:
            # A term that ended must not feed a front door any more.
            self._replica.require_leader()
            if seen is None or seen.value is None:
                continue
            if not self._matches(request, seen.value, identity):
                continue
            if seen.revision > newest.get(seen.key, 0):
                yield _response(seen.value)

    async def AckRoutes(self, request: Any, context: Context) -> router_pb2.AckRoutesResponse:
        refuse_foreign_front_door(context, request.front_door_id)
        log.info(
            "routes acknowledged",
            front_door=request.front_door_id,
            job_uid=request.job_uid,
            epoch=request.epoch,
        )
        return router_pb2.AckRoutesResponse()

    async def ReportSequences(
        self, request_iterator: Any, context: Context
    ) -> router_pb2.ReportSequencesResponse:
        leader = self._replica.require_leader()
        name = ""
        try:
            async for request in request_iterator:
                require_text("front_door_id", request.front_door_id)
                refuse_foreign_front_door(context, request.front_door_id)
                name = request.front_door_id
                reported = SequencesReported(
                    name,
                    request.job_uid,
                    request.snapshot,
                    tuple(from_message(r, SequenceReport) for r in request.updated),
                    tuple(request.removed),
                )
                leader.take_report(reported)
        except asyncio.CancelledError:
            log.info("front door left", front_door=name)
            raise
        finally:
            if name:
                leader.tell(FrontDoorLost(name))
        return router_pb2.ReportSequencesResponse()


def _response(routes: Routes) -> router_pb2.WatchRoutesResponse:
    return router_pb2.WatchRoutesResponse(routes=to_message(routes, router_pb2.Routes))
