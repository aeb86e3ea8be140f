"""A simulated device plugin: a kubelet gives its devices to pods, and nothing is behind them.

It speaks the part of kubelet's device plugin API (v1beta1) that a kubelet asks of every plugin. All
of its messages here hold texts and messages of less than 128 bytes, so they are written by hand.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

#: As a node has it.
FOLDER = "var/lib/kubelet/device-plugins"
_VERSION = "v1beta1"
_SOCKET = "simulated.sock"
# Servers in Go refuse a socket's path as the name of a host.
_OPTIONS = (("grpc.default_authority", "localhost"),)


def field(number: int, content: bytes) -> bytes:
    """A field of a message that is a text or another message."""
    assert len(content) < 128, "its length takes one byte"
    return bytes([number << 3 | 2, len(content)]) + content


class DevicePlugin:
    """Offers devices of one extended resource to the kubelet of a node, for the time of a block."""

    def __init__(self, root: Path, resource: str, devices: Sequence[str]) -> None:
        """`root` is the node's file system."""
        self._folder = root / FOLDER
        self._resource = resource
        self._devices = devices
        self._server = grpc.aio.server()

    async def __aenter__(self) -> Self:
        methods: dict[str, Any] = {
            "GetDevicePluginOptions": grpc.unary_unary_rpc_method_handler(self._options),
            "ListAndWatch": grpc.unary_stream_rpc_method_handler(self._list),
            "Allocate": grpc.unary_unary_rpc_method_handler(self._allocate),
        }
        handler = grpc.method_handlers_generic_handler(f"{_VERSION}.DevicePlugin", methods)
        self._server.add_generic_rpc_handlers((handler,))
        self._server.add_insecure_port(f"unix:{self._folder / _SOCKET}")
        await self._server.start()
        texts = (_VERSION, _SOCKET, self._resource)
        request = b"".join(field(n, text.encode()) for n, text in enumerate(texts, 1))
        kubelet = f"unix:{self._folder / 'kubelet.sock'}"
        async with grpc.aio.insecure_channel(kubelet, options=_OPTIONS) as channel:
            register: Any = channel.unary_unary(f"/{_VERSION}.Registration/Register")
            await register(request, timeout=30.0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._server.stop(None)

    async def _options(self, _request: bytes, _context: Any) -> bytes:
        """Nothing beyond what every plugin does."""
        return b""

    async def _list(self, _request: bytes, _context: Any) -> AsyncGenerator[bytes, None]:
        """All devices once, healthy; the stream stays."""
        devices = (field(1, device.encode()) + field(2, b"Healthy") for device in self._devices)
        yield b"".join(field(1, device) for device in devices)
        await asyncio.Event().wait()

    async def _allocate(self, _request: bytes, _context: Any) -> bytes:
        """For the one container of a pod, which gets no file and no variable."""
        return field(1, b"")
