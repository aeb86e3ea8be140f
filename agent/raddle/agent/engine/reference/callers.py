"""Who may call a rank, where certificates name the callers.

Its agent commands it, the scheduler asks for a sign of life, front doors send prompts, and ranks
(which show their agents' certificates) read and write the pool.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from fnmatch import fnmatchcase
from typing import Any

import grpc
import structlog

from raddle.model.errors import PermanentError, Reason
from raddle.telemetry.tls import identity_of
from raddle.wire.status import abort

log = structlog.get_logger()


class Callers(grpc.aio.ServerInterceptor):
    """Refuses foreign identities with PERMISSION_DENIED, and logs who asked for what."""

    def __init__(self, node: str) -> None:
        own = f"agent/{node}"
        self._commands = (own,)
        self._by_path = {
            "/raddle.v1.Engine/Ping": (own, "scheduler"),
            "/raddle.v1.Engine/Describe": (own, "scheduler"),
        }
        self._by_service = {
            "raddle.v1.ReferenceRank": ("client/*",),
            "raddle.v1.PoolMember": ("agent/*",),
        }

    def _may(self, identity: str, path: str) -> bool:
        service = path.split("/")[1]
        allowed = self._by_path.get(path) or self._by_service.get(service) or self._commands
        return any(fnmatchcase(identity, pattern) for pattern in allowed)

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
            if not self._may(identity, path):
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
