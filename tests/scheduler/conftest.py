"""One replica in this process: the real services and leader loop over a memory store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import grpc
import pytest

from raddle.core.events import NodeProbed, RankProbed
from raddle.core.instructions import ProbeNode, ProbeRank
from raddle.core.machine import Machine
from raddle.machines import load_machine
from raddle.model.errors import RaddleError
from raddle.models import config_text
from raddle.scheduler.authorization import LOOPBACK, Policy
from raddle.scheduler.interceptor import Interceptor
from raddle.scheduler.leader import Deposed, Leader
from raddle.scheduler.metrics import Metrics
from raddle.scheduler.mirror import Mirror
from raddle.scheduler.replica import Replica
from raddle.scheduler.router_service import RouterService
from raddle.scheduler.scheduler_service import SchedulerService
from raddle.scheduler.watches import Watches
from raddle.store.election import Election, Probe
from raddle.store.memory import MemoryBackend, MemoryStore
from raddle.telemetry.channels import make_channel
from raddle.v1 import (
    job_pb2,
    router_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
    topology_pb2,
)
from raddle.wire.codec import to_message
from raddle.wire.status import error_from


class Nobody:
    """Answers no probe."""

    async def node(self, probe: ProbeNode) -> NodeProbed:
        return NodeProbed(probe.node, answered=False)

    async def rank(self, probe: ProbeRank) -> RankProbed:
        return RankProbed(probe.job_uid, probe.incarnation, answered=False)


class Served:
    """A leading replica behind a real gRPC server; jobs wait, for there are no agents."""

    def __init__(self, make_machine: Callable[..., Machine]) -> None:
        self.backend = MemoryBackend()
        self.store = MemoryStore(self.backend)
        self.mirror = Mirror(self.store)
        self.watches = Watches(self.mirror)
        self.replica = Replica(
            identity="scheduler-0",
            address="",
            version="test",
            mirror=self.mirror,
            metrics=Metrics(),
            policy=LOOPBACK,
            fault_injection=True,
        )
        self._make_machine = make_machine
        self._interceptor = Interceptor(self.replica)
        self._server = grpc.aio.server(interceptors=(self._interceptor,))
        self._tasks: list[asyncio.Task[Any]] = []
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def start(self) -> None:
        service = SchedulerService(self.replica, self.watches)
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(service, self._server)
        router_pb2_grpc.add_RouterServicer_to_server(
            RouterService(self.replica, self.watches), self._server
        )
        self.replica.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        self._tasks.append(asyncio.create_task(self.mirror.run()))

        async def alive(_record: object) -> Probe:
            return Probe.ALIVE

        term = await Election(self.store, b"", alive).campaign()
        self.leader = Leader(
            self.store,
            self.mirror,
            term,
            Nobody(),
            self.replica.metrics,
            make_machine=self._make_machine,
            decided=self.watches.decided,
        )
        self.replica.leader = self.leader
        self.leading = asyncio.create_task(self.leader.run())
        self._tasks.append(self.leading)
        supernode = to_message(load_machine("nvl72"), topology_pb2.SuperNode)
        request = scheduler_pb2.ApplySuperNodeRequest(supernode=supernode)
        await self.stub().ApplySuperNode(request, wait_for_ready=True)

    async def stop(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        self.watches.stop()
        await self._server.stop(None)
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError, Deposed):
                await task

    def set_policy(self, policy: Policy) -> None:
        self.replica.policy = policy

    def channel(self, identity: str) -> grpc.aio.Channel:
        if identity not in self._channels:
            self._channels[identity] = make_channel(self.replica.address, identity=identity)
        return self._channels[identity]

    def stub(self, identity: str = "client/admin") -> Any:
        return scheduler_pb2_grpc.SchedulerStub(self.channel(identity))

    async def submit(self, name: str, namespace: str = "default") -> job_pb2.Job:
        request = scheduler_pb2.SubmitJobRequest(spec=job_spec(name, namespace))
        job: job_pb2.Job = (await self.stub().SubmitJob(request, timeout=10.0)).job
        return job

    def counted(self, metric: str) -> float:
        return self.replica.metrics.registry.get_sample_value(metric) or 0.0


def job_spec(name: str, namespace: str = "default") -> job_pb2.JobSpec:
    model = job_pb2.ModelSpec(config=config_text("raddle-demo"), kv_block_tokens=16)
    role = job_pb2.RoleSpec(name="decode", kind="decode", ranks=6, slots_per_rank=10)
    role.engine.driver = "simulated"
    return job_pb2.JobSpec(namespace=namespace, name=name, model=model, roles=[role])


async def refusal(call: Any) -> RaddleError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from(caught.value)


@pytest.fixture
def make_machine() -> Callable[..., Machine]:
    """The decision core; tests that break it override this."""
    return Machine


@pytest.fixture
async def served(make_machine: Callable[..., Machine]) -> AsyncIterator[Served]:
    found = Served(make_machine)
    await found.start()
    yield found
    await found.stop()
