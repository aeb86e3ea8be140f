"""Which pods hold dies, as an agent hears it from a kubelet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from raddle.agent.health import pod_resources
from raddle.agent.health.pod_resources import PodResources, holders
from raddle.agent.health.relay import relay
from raddle.agent.node import NodeAgent, NodeFacts
from raddle.kubelet.v1 import pod_resources_pb2 as api
from raddle.model import keys
from raddle.model.health import ActiveFault, DieHolder, PartIdentity
from raddle.store.memory import MemoryBackend, MemoryStore
from raddle.wire import records as wire
from tests.support import eventually

RESOURCE = "huawei.com/Ascend910"
PARTS = tuple(
    PartIdentity(position=f"sn0/n00/npu{n // 2}/die{n % 2}", logic_id=n) for n in range(4)
)


def pods(*given: tuple[str, str, str]) -> api.ListPodResourcesResponse:
    """Pods, each with the resource and the name of one device."""
    answer = api.ListPodResourcesResponse()
    for name, resource, device in given:
        container = answer.pod_resources.add(name=name, namespace="a").containers.add(name="c")
        container.devices.add(resource_name=resource, device_ids=[device])
    return answer


class Kubelet:
    """Speaks the pod-resources API at a socket."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.answer = pods()
        self._server: grpc.aio.Server | None = None

    async def _list(self, _request: Any, _context: Any) -> api.ListPodResourcesResponse:
        return self.answer

    async def start(self) -> None:
        methods = {
            "List": grpc.unary_unary_rpc_method_handler(
                self._list,
                request_deserializer=api.ListPodResourcesRequest.FromString,
                response_serializer=api.ListPodResourcesResponse.SerializeToString,
            )
        }
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("v1.PodResourcesLister", methods),)
        )
        self._server.add_insecure_port(f"unix:{self.socket}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)


@pytest.fixture
async def kubelet(tmp_path: Path) -> AsyncIterator[Kubelet]:
    found = Kubelet(tmp_path / "kubelet.sock")
    await found.start()
    yield found
    await found.stop()


@asynccontextmanager
async def following(
    kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[], Any]]:
    """The next change of what an agent knows."""
    monkeypatch.setattr(pod_resources, "INTERVAL_S", 0.02)
    found = PodResources(str(kubelet.socket), RESOURCE).follow(PARTS)
    yield lambda: asyncio.wait_for(anext(found), 20.0)
    with suppress(RuntimeError):
        await found.aclose()


def test_only_devices_of_the_resource_on_this_node_are_dies() -> None:
    """Other resources, names without a number and dies of no part hold nothing here."""
    answer = pods(
        ("one", RESOURCE, "Ascend910-3"),
        ("virtual", RESOURCE, "Ascend910-1-2c.12c"),
        ("other", "example.com/gpu", "gpu-0"),
        ("far", RESOURCE, "Ascend910-17"),
        ("odd", RESOURCE, "?"),
    )
    assert holders(answer, RESOURCE, PARTS) == (
        DieHolder(die="sn0/n00/npu0/die1", pod="a/virtual"),
        DieHolder(die="sn0/n00/npu1/die1", pod="a/one"),
    )


async def test_a_pod_that_gets_a_die_and_one_that_ends_are_heard_of(
    kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every change is told, once."""
    kubelet.answer = pods(("one", RESOURCE, "Ascend910-0"))
    async with following(kubelet, monkeypatch) as change:
        assert [held.pod for held in await change()] == ["a/one"]
        kubelet.answer = pods(("one", RESOURCE, "Ascend910-0"), ("two", RESOURCE, "Ascend910-1"))
        assert [held.pod for held in await change()] == ["a/one", "a/two"]
        kubelet.answer = pods()
        assert await change() == ()


async def test_dies_stay_held_while_kubelet_is_away(
    kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kubelet that restarts says nothing, and that is told once; its pods run on."""
    kubelet.answer = pods(("one", RESOURCE, "Ascend910-0"))
    async with following(kubelet, monkeypatch) as change:
        await change()
        await kubelet.stop()
        with capture_logs() as logs:
            waiting = asyncio.ensure_future(change())
            await eventually(lambda: bool(logs), "it is told")
            kubelet.answer = pods(("two", RESOURCE, "Ascend910-1"))
            await kubelet.start()
            assert [held.pod for held in await waiting] == ["a/two"]
        assert {line["event"] for line in logs} == {"kubelet does not say who holds dies"}


async def test_an_agent_without_rights_asks_through_a_relay(
    kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay gives the same answers at a socket of its own, from each kubelet that comes."""
    stop, behind = asyncio.Event(), kubelet.socket
    own = behind.with_name("own.sock")
    relaying = asyncio.create_task(relay(behind, own, stop))
    await eventually(own.exists, "the relay serves")
    kubelet.answer = pods(("one", RESOURCE, "Ascend910-0"))
    kubelet.socket = own
    async with following(kubelet, monkeypatch) as change:
        assert [held.pod for held in await change()] == ["a/one"]
        kubelet.socket = behind
        await kubelet.stop()
        kubelet.answer = pods(("two", RESOURCE, "Ascend910-1"))
        await kubelet.start()
        assert [held.pod for held in await change()] == ["a/two"]
    stop.set()
    await relaying


class Devices:
    """Parts that come with a fault."""

    def parts(self) -> tuple[PartIdentity, ...]:
        return PARTS

    async def follow(self) -> AsyncGenerator[tuple[ActiveFault, ...], None]:
        yield (ActiveFault(code="x", subject_kind="die", subject=PARTS[0].position),)
        await asyncio.Event().wait()


class Silence:
    """A way to the leader on which nothing is said."""

    async def run(self) -> None:
        await asyncio.Event().wait()


async def test_holders_are_in_the_nodes_report(
    kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are told as they change, beside the faults."""
    monkeypatch.setattr(pod_resources, "INTERVAL_S", 0.02)
    store = MemoryStore(MemoryBackend())
    facts = NodeFacts(name="sn0/n00", version="1", host_memory_bytes=1, boot_id="b")
    asked = PodResources(str(kubelet.socket), RESOURCE)
    agent = NodeAgent(facts, store, Devices(), Silence(), lambda _: [], pod_resources=asked)
    running = asyncio.create_task(agent.run())

    async def reported(*pods: str) -> bool:
        record = await store.get(keys.health("sn0/n00"))
        report = wire.decode(record.key, record.value) if record is not None else None
        if report is None or len(report.active_faults) != 1:
            return False
        return tuple(held.pod for held in report.holders) == pods

    await eventually(reported, "the first report")
    kubelet.answer = pods(("one", RESOURCE, "Ascend910-0"))
    await eventually(lambda: reported("a/one"), "who holds a die")
    kubelet.answer = pods()
    await eventually(reported, "it is free")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
