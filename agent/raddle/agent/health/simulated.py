"""Simulated devices of one node: faults from the store's injections, and from a file if given.

They stand for real devices behind the same interface: a fault that is set here travels the whole
way that a real one does.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import structlog

from raddle.model import keys
from raddle.model.errors import RaddleError
from raddle.model.health import ActiveFault, Injections, PartIdentity
from raddle.model.topology import SuperNode
from raddle.store.follow import follow_key
from raddle.store.protocol import Store
from raddle.wire import records as wire

_FILE_INTERVAL_S = 0.2
_RETRY_S = 0.2
log = structlog.get_logger()


class SimulatedSource:
    """Faults of one node; `faults_file` holds a JSON list of faults and may change at any time."""

    def __init__(
        self, node: str, supernode: SuperNode, store: Store, faults_file: Path | None = None
    ) -> None:
        self._node = node
        self._supernode = supernode
        self._store = store
        self._file = faults_file
        self._injected: tuple[ActiveFault, ...] = ()
        self._from_file: tuple[ActiveFault, ...] = ()

    def parts(self) -> tuple[PartIdentity, ...]:
        found = []
        for number, position in enumerate(self._supernode.node_positions(self._node)):
            digest = hashlib.sha256(position.encode()).hexdigest()
            npu = number // self._supernode.dies_per_npu
            address = ipaddress.ip_address("10.64.0.0") + int(digest[:5], 16)
            found.append(
                PartIdentity(
                    position=position,
                    serial=f"SIM{hashlib.sha256(position[:-5].encode()).hexdigest()[:12]}",
                    vdie_id=digest[:16],
                    physical_id=npu,
                    logic_id=number,
                    super_device_id=str(int(digest[:8], 16)),
                    device_ip=str(address),
                )
            )
        return tuple(found)

    async def follow(self) -> AsyncGenerator[tuple[ActiveFault, ...], None]:
        changed = asyncio.Event()
        tasks = [asyncio.create_task(self._follow_injections(changed))]
        if self._file is not None:
            self._from_file = self._read_file()
            tasks.append(asyncio.create_task(self._follow_file(changed)))
        try:
            while True:
                yield (*self._injected, *self._from_file)
                await changed.wait()
                changed.clear()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow_injections(self, changed: asyncio.Event) -> None:
        key = keys.injections(self._node)
        while True:
            try:
                async for data in follow_key(self._store, key):
                    value: Injections | None = wire.decode(key, data) if data else None
                    faults = value.faults if value is not None else ()
                    if faults != self._injected:
                        self._injected = faults
                        changed.set()
            except RaddleError as error:
                log.warning("cannot follow injected faults", node=self._node, why=str(error))
            await asyncio.sleep(_RETRY_S)

    async def _follow_file(self, changed: asyncio.Event) -> None:
        while True:
            await asyncio.sleep(_FILE_INTERVAL_S)
            found = self._read_file()
            if found != self._from_file:
                self._from_file = found
                changed.set()

    def _read_file(self) -> tuple[ActiveFault, ...]:
        """Faults of the file; none while it is absent, the last ones while it is broken."""
        assert self._file is not None
        try:
            return msgspec.json.decode(
                self._file.read_bytes(), type=tuple[ActiveFault, ...], strict=False
            )
        except FileNotFoundError:
            return ()
        except (OSError, msgspec.DecodeError) as error:
            log.warning("the faults file is broken; it is ignored", why=str(error))
            return self._from_file
