"""Which pods hold which dies of a node, as its kubelet says (pod-resources API, v1).

It knows what device plugins gave to whom, whatever pods say of themselves. It does not know whose
pods these are: all are reported, and whoever knows the pods decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import grpc
import structlog

from raddle.kubelet.v1 import pod_resources_pb2 as api
from raddle.model.health import DieHolder, PartIdentity
from raddle.model.names import device_number

#: The API has no watch.
INTERVAL_S = 2.0
_TIMEOUT_S = 5.0
_METHOD = "/v1.PodResourcesLister/List"
# Servers in Go refuse a socket's path as the name of a host.
_OPTIONS = (
    ("grpc.default_authority", "localhost"),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
)
log = structlog.get_logger()


class PodResources:
    """Asks the kubelet at its socket for devices of one extended resource."""

    def __init__(self, socket: str, resource: str) -> None:
        self._socket = socket
        self._resource = resource

    async def follow(
        self, parts: Sequence[PartIdentity]
    ) -> AsyncGenerator[tuple[DieHolder, ...], None]:
        """Who holds which of these parts, after each change; what was known while none answers."""
        told: tuple[DieHolder, ...] = ()
        trouble: str | None = None
        async with grpc.aio.insecure_channel(f"unix:{self._socket}", options=_OPTIONS) as channel:
            ask: Any = channel.unary_unary(
                _METHOD,
                request_serializer=api.ListPodResourcesRequest.SerializeToString,
                response_deserializer=api.ListPodResourcesResponse.FromString,
            )
            while True:
                try:
                    answer = await ask(api.ListPodResourcesRequest(), timeout=_TIMEOUT_S)
                    found, trouble = holders(answer, self._resource, parts), None
                except grpc.aio.AioRpcError as error:
                    found = told
                    if error.details() != trouble:
                        trouble = error.details()
                        log.warning("kubelet does not say who holds dies", why=trouble)
                if found != told:
                    told = found
                    yield found
                await asyncio.sleep(INTERVAL_S)


def holders(
    answer: api.ListPodResourcesResponse, resource: str, parts: Sequence[PartIdentity]
) -> tuple[DieHolder, ...]:
    """The dies among these parts that were given to pods, in order."""
    positions = {part.logic_id: part.position for part in parts}
    found = {
        positions[number]: f"{pod.namespace}/{pod.name}"
        for pod in answer.pod_resources
        for container in pod.containers
        for devices in container.devices
        if devices.resource_name == resource
        for number in map(device_number, devices.device_ids)
        if number in positions
    }
    return tuple(DieHolder(die=die, pod=pod) for die, pod in sorted(found.items()))
