"""Parts that cannot reach each other, and nodes that fall silent together."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from raddle.cli.cluster import LocalCluster
from raddle.core.detection import UNKNOWN_LOST_S
from raddle.store.election import DEPOSED_WAIT_S
from raddle.telemetry.channels import make_channel
from raddle.v1 import job_pb2, scheduler_pb2, scheduler_pb2_grpc
from raddle.wire.parse import job_message
from tests.e2e.history import assert_one_writer
from tests.e2e.served import Served, serving
from tests.support import CuttingProxy, stopped

pytestmark = pytest.mark.timeout(180)

# Longer than it takes to come back as a leader that was deposed, and to be deposed again.
CUT_S = 28.0
# Beyond both windows of the storm brake: two lease times, and the patience with unknown agents.
HELD_S = UNKNOWN_LOST_S + 2.0
SIXTEEN = str(Path(__file__).parent / "sixteen_nodes.yaml")
JOB = """
name: wide
model: {config: raddle-demo, kv_block_tokens: 16}
roles:
  - {name: decode, kind: decode, ranks: 32, slots_per_rank: 2, spread_nodes: 16,
     engine: {driver: simulated}}
"""


class Proxies:
    """A proxy before each scheduler, and one between each scheduler and etcd."""

    def __init__(self) -> None:
        self.front = [CuttingProxy(), CuttingProxy()]
        self.etcd = [CuttingProxy(), CuttingProxy()]
        self._addresses: dict[int, str] = {}
        self.cluster: LocalCluster | None = None

    async def start(self) -> None:
        for proxy in (*self.front, *self.etcd):
            self._addresses[id(proxy)] = await proxy.start()

    async def stop(self) -> None:
        for proxy in (*self.front, *self.etcd):
            await proxy.stop()

    def flags(self, name: str) -> list[str]:
        """Flags of a scheduler: it is reached, and reaches etcd, through its proxies."""
        if not name.startswith("scheduler-"):
            return []
        assert self.cluster is not None
        number = int(name.rsplit("-", 1)[1])
        front, etcd = self.front[number], self.etcd[number]
        front.target = self.cluster.addresses[number]
        etcd.target = self.cluster.etcd_endpoints
        advertise = self._addresses[id(front)]
        return ["--advertise", advertise, "--etcd", self._addresses[id(etcd)]]


@asynccontextmanager
async def partitioned(folder: Path, **options: Any) -> AsyncIterator[tuple[Served, Proxies]]:
    proxies = Proxies()
    await proxies.start()

    def adopt(cluster: LocalCluster) -> None:
        proxies.cluster = cluster

    try:
        async with serving(folder, on_made=adopt, more_flags=proxies.flags, **options) as served:
            yield served, proxies
    finally:
        await proxies.stop()


@asynccontextmanager
async def decisions(served: Served) -> AsyncIterator[None]:
    """Something to decide, twice a second, at each scheduler that believes that it leads.

    A leader learns that it is none when it decides: without this, a duel would not show.
    """
    addresses = served.cluster.addresses
    channels = [make_channel(address, identity="client/admin") for address in addresses]

    async def ask(channel: grpc.aio.Channel) -> None:
        stub: Any = scheduler_pb2_grpc.SchedulerStub(channel)
        while True:
            for call, request in (
                (stub.Cordon, scheduler_pb2.CordonRequest(subject="sn0/n03")),
                (stub.Uncordon, scheduler_pb2.UncordonRequest(subject="sn0/n03")),
            ):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await call(request, timeout=0.5)
                await asyncio.sleep(0.5)  # the pace of decisions

    asking = [asyncio.create_task(ask(channel)) for channel in channels]
    try:
        yield
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        for channel in channels:
            await channel.close()


async def test_schedulers_that_cannot_reach_each_other_do_not_duel(tmp_path: Path) -> None:
    """Both reach etcd, neither the other, for long: ever fewer take-overs, never two writers."""
    async with partitioned(tmp_path) as (served, proxies):
        leader = await served.leader_number()
        for proxy in proxies.front:
            proxy.freeze()
        async with decisions(served):
            await served.same_tokens_for(CUT_S)
        terms = await assert_one_writer(served.cluster.etcd_endpoints)
        # Taken over after 2.5 s, and back 10 s later, by each once: a duel needs 3 s a term.
        takeovers = CUT_S / DEPOSED_WAIT_S + 1
        assert 2 <= len(terms) <= 1 + takeovers, terms
        assert f"scheduler-{1 - leader}" in terms
        for proxy in proxies.front:
            proxy.thaw()
        await served.same_tokens_while(lambda: recovered(served))
        after = await assert_one_writer(served.cluster.etcd_endpoints)
        assert len(after) <= len(terms) + 1, after


async def recovered(served: Served) -> None:
    """A rank dies and is recovered."""
    epoch = (await served.job()).job.epoch
    await served.kill_decode_rank()
    await served.ready_at(epoch + 1)


async def test_a_leader_cut_off_from_etcd_alone_is_followed(tmp_path: Path) -> None:
    """A leader that lost etcd stops deciding before its lease ends; the standby goes on."""
    async with partitioned(tmp_path) as (served, proxies):

        async def cut() -> None:
            leader = await served.leader_number()
            await served.cluster.connect(1 - leader)
            proxies.etcd[leader].freeze()
            await served.kill_decode_rank()
            await served.ready_at(2)
            proxies.etcd[leader].thaw()

        await served.same_tokens_while(cut)
        terms = await assert_one_writer(served.cluster.etcd_endpoints)
        assert len(terms) == 2, terms


async def test_a_leader_whose_streams_of_agents_are_cut_goes_on(tmp_path: Path) -> None:
    """Streams of agents are silent, then closed; leases live: nothing moves until a rank dies."""
    async with partitioned(tmp_path, schedulers=1) as (served, proxies):
        # Agents go where the leader's record says; front door and users know the server itself.
        proxy = proxies.front[0]
        assert proxy.connections >= 4

        async def cut() -> None:
            for close in (proxy.freeze, proxy.cut):
                close()
                await served.tokens_flow()
                assert await served.lost_ranks() == []
            epoch = (await served.job()).job.epoch
            await served.kill_decode_rank()
            await served.ready_at(epoch + 1)
            proxy.thaw()

        await served.same_tokens_while(cut)
        (lost,) = await served.lost_ranks()
        assert lost.kind in ("RANK_EXITED", "PEER_REPORTS")


# --- the storm brake -----------------------------------------------------------------------------


class Wide:
    """Sixteen simulated nodes in two agent processes, with a job over all of them."""

    def __init__(self, cluster: LocalCluster, uid: str) -> None:
        self.cluster = cluster
        self.uid = uid

    async def job(self) -> Any:
        request = scheduler_pb2.GetJobRequest(job_uid=self.uid)
        return (await self.cluster.stub.GetJob(request, timeout=5.0)).job

    async def seats(self) -> dict[str, str]:
        """Which die each rank has."""
        request = scheduler_pb2.GetJobRequest(job_uid=self.uid)
        placement = (await self.cluster.stub.GetJob(request, timeout=5.0)).placement
        return {
            f"{part.role}/{part.instance}/{seat.rank}": seat.die
            for part in placement.instances
            for seat in part.ranks
            if seat.state == "ACTIVE"
        }

    async def hold(self, **expected: int) -> None:
        """The node states stay for longer than any window of the storm brake; no rank moves."""
        await self.until_states(**expected)
        before = await self.seats()
        end_s = asyncio.get_running_loop().time() + HELD_S
        while asyncio.get_running_loop().time() < end_s:
            assert await self.states() == expected
            assert (await self.job()).epoch == 1
            await asyncio.sleep(0.2)  # the pause between two looks
        assert await self.seats() == before

    async def states(self) -> dict[str, int]:
        nodes = (await self.cluster.stub.ListNodes(scheduler_pb2.ListNodesRequest())).nodes
        found = [str(node.state) for node in nodes]
        return {state: found.count(state) for state in found}

    async def until_states(self, **expected: int) -> None:
        async def reached() -> bool:
            return await self.states() == expected

        await self.cluster.until(reached, f"nodes are {expected}")


@asynccontextmanager
async def wide(folder: Path, **options: Any) -> AsyncIterator[Wide]:
    cluster = LocalCluster(folder, machine=SIXTEEN, **options)
    try:
        await cluster.start()
        request = scheduler_pb2.SubmitJobRequest(spec=job_message(JOB, folder))
        uid = (await cluster.stub.SubmitJob(request, timeout=10.0)).job.uid
        found = Wide(cluster, uid)

        async def ready() -> bool:
            return bool((await found.job()).state == job_pb2.JOB_STATE_READY)

        await cluster.until(ready, "the job is ready")
        yield found
    finally:
        await cluster.stop()


async def test_eight_leases_that_lapse_together_move_nothing(tmp_path: Path) -> None:
    """More than a rack falls silent in one window: unknown, nothing moves, and all come back."""
    async with wide(tmp_path) as found:
        seats = await found.seats()
        agent = found.cluster.children["agent-simulated-0"].process.pid
        with stopped(agent):
            await found.hold(UNKNOWN=8, READY=8)
        await found.until_states(READY=16)
        assert (await found.job()).epoch == 1
        assert await found.seats() == seats


async def test_leases_that_lapse_after_an_etcd_election_move_nothing(tmp_path: Path) -> None:
    """Eight leases end within one TTL of a new etcd leader: the same."""
    async with wide(tmp_path, etcd_members=3) as found:
        served = Served(found.cluster, found.uid, "")
        seats = await found.seats()
        agent = found.cluster.children["agent-simulated-1"].process.pid
        with stopped(agent):
            member = found.cluster.etcds[await served.etcd_leader()].process
            assert member is not None
            member.kill()
            await found.hold(UNKNOWN=8, READY=8)
        await found.until_states(READY=16)
        assert (await found.job()).epoch == 1
        assert await found.seats() == seats


async def test_an_operator_judges_an_unknown_node(tmp_path: Path) -> None:
    """Behind the storm brake a node that is declared lost is recovered from; the others stay."""
    async with wide(tmp_path) as found:
        before = await found.seats()
        agent = found.cluster.children["agent-simulated-0"].process.pid
        with stopped(agent):
            await found.until_states(UNKNOWN=8, READY=8)
            request = scheduler_pb2.DeclareNodeLostRequest(node="sn0/n00", message="no power")
            await found.cluster.stub.DeclareNodeLost(request, timeout=5.0)
            await found.until_states(UNKNOWN=7, LOST=1, READY=8)

            async def decided() -> bool:
                return bool((await found.job()).epoch >= 2)

            await found.cluster.until(decided, "the job moved on")
        await found.until_states(READY=16)

        async def ready() -> bool:
            job = await found.job()
            return bool(job.state == job_pb2.JOB_STATE_READY and job.live_epoch == job.epoch)

        await found.cluster.until(ready, "the job is ready again")
        after = await found.seats()
        moved = {rank for rank, die in before.items() if after.get(rank) != die}
        assert moved == {rank for rank, die in before.items() if die.startswith("sn0/n00/")}
        assert moved


# --- disks ---------------------------------------------------------------------------------------


@pytest.fixture
def tiny_logs(tmp_path: Path) -> Iterator[Path]:
    """The logs' folder on a file system of 256 KiB."""
    logs = tmp_path / "logs"
    logs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(logs)]
    subprocess.run(mount, check=True, timeout=10)
    yield logs
    subprocess.run(["umount", "-l", str(logs)], check=True, timeout=10)


def append_for_ever(file: Path) -> None:
    with file.open("ab", buffering=0) as output:
        while True:
            output.write(b"\n" * 4096)


def fill(folder: Path) -> Path:
    """Leave no room for another byte; gives the file that takes it."""
    ballast = folder / "ballast"
    # The last page of each log has room when the disk has none.
    for file in (ballast, *folder.glob("*.log")):
        with pytest.raises(OSError, match="No space left"):
            append_for_ever(file)
    return ballast


def sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.glob("*.log")}


async def test_a_full_disk_under_the_logs_costs_lines_only(tmp_path: Path, tiny_logs: Path) -> None:
    """Daemons whose logs cannot be written go on: a rank dies and is recovered, untold."""
    async with serving(tmp_path) as served:
        ballast = fill(tiny_logs)
        full = sizes(tiny_logs)
        await served.same_tokens_while(lambda: recovered(served))
        assert sizes(tiny_logs) == full
        await asyncio.to_thread(ballast.unlink)
        await served.same_tokens_while(lambda: recovered(served))
        # Of two schedulers one leads, and tells.
        assert max(
            sizes(tiny_logs)[f"scheduler-{n}.log"] - full[f"scheduler-{n}.log"] for n in (0, 1)
        )
