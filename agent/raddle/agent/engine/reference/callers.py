"""Who may call a rank, where certificates name the callers.

Its agent commands it, the scheduler asks for a sign of life, front doors send prompts, and ranks
read and write the pool.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog

from raddle.model.errors import PermanentError, Reason
from raddle.telemetry.tls import identity_of, is_agent_of, is_front_door, is_rank
from raddle.wire.status import abort

_BY_SERVICE = {"raddle.v1.ReferenceRank": is_front_door, "raddle.v1.PoolMember": is_rank}
# What the scheduler asks for a sign of life.
_SIGNS = ("/raddle.v1.Engine/Ping", "/raddle.v1.Engine/Describe")
log = structlog.get_logger()


class Callers(grpc.aio.ServerInterceptor):
    """Refuses foreign identities with PERMISSION_DENIED, and logs who asked for what."""

    def __init__(self, node: str) -> None:
        self._node = node

    def may(self, identity: str, path: str) -> bool:
        """May the caller call `/<service>/<method>`?"""
        service = path.split("/")[1]
        if service in _BY_SERVICE:
            return _BY_SERVICE[service](identity)
        return is_agent_of(self._node, identity) or (identity == "scheduler" and path in _SIGNS)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        path = handler_call_details.method

        async def check(context: Any) -> None:
            identity = identity_of(context)
            if not self.may(identity, path):
                log.warning("refused", identity=identity, call=path)
                message = f"{identity or 'an unnamed caller'} may not call {path} of this rank."
                await abort(context, PermanentError(Reason.PERMISSION_DENIED, message))

        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_stream is not None:

            async def stream(request: Any, context: Any) -> Any:
                await check(context)
                async for message in handler.unary_stream(request, context):
                    yield message

            return grpc.unary_stream_rpc_method_handler(stream, **coders)

        async def unary(request: Any, context: Any) -> Any:
            await check(context)
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(unary, **coders)
