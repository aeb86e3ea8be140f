"""Ranks as pods over a network that is no loopback, under certificates."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from raddle.cli.demo.client import get_text
from raddle.v1 import scheduler_pb2
from tests.certificates import Authority
from tests.e2e.history import assert_one_writer
from tests.e2e.hosts import PROBE_PORT, Deployer, Hosts, network
from tests.e2e.served import CLOSED, SMALL_MACHINE, Served, serving_on

pytestmark = pytest.mark.timeout(600)
# Streams are given up after some ten seconds of silence; then each window must pass.
CUT_S = 40.0


def _may_make_hosts() -> bool:
    command = ["unshare", "--net", "--pid", "--mount", "--fork", "--mount-proc", "ip"]
    command += ["link", "add", "rdl0", "type", "bridge"]
    try:
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0
    except FileNotFoundError:
        return False


class ServedByPods(Served):
    """The small job with its ranks in pods."""

    def __init__(self, cluster: Hosts, deployer: Deployer, served: Served) -> None:
        super().__init__(cluster, served.uid, served.address)
        self.hosts = cluster
        self.deployer = deployer
        self.expected = served.expected

    def a_decode_pod(self) -> str:
        """The folder of a decode rank's pod."""
        pods = sorted(self.deployer.pods.items())
        return next(f for f, pod in pods if "/decode-" in f and pod.process.poll() is None)

    async def incarnations(self) -> list[str]:
        return sorted(rank.incarnation for rank in (await self.job()).ranks)

    async def probe(self, name: str, path: str) -> int:
        try:
            return (await get_text(f"{self.hosts.hosts[name]}:{PROBE_PORT}", path))[0]
        except OSError:
            return 0


@contextlib.asynccontextmanager
async def serving_pods(folder: Path) -> AsyncIterator[ServedByPods]:
    authority = Authority(folder / "certificates")
    identities = ["scheduler", "client/admin", "rank", "frontdoor"]
    for identity in (*identities, *(f"agent/sn0/n{number:02d}" for number in range(4))):
        authority.issue(identity)
    mounted = folder / "mounted"
    await asyncio.to_thread(_copy, authority.folder, mounted)
    with network() as bridge:
        cluster = Hosts(
            folder,
            machine=SMALL_MACHINE,
            real_nodes=4,
            schedulers=2,
            certificates=authority.folder,
            network=bridge,
            forks=False,
        )
        cluster.prepare()
        deployer = Deployer(cluster, mounted)
        deploying = asyncio.create_task(deployer.run())
        try:
            async with serving_on(cluster) as served:
                yield ServedByPods(cluster, deployer, served)
        finally:
            deploying.cancel()
            await asyncio.gather(deploying, return_exceptions=True)
            deployer.close()


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


@pytest.mark.skipif(not _may_make_hosts(), reason="needs root, network and process namespaces")
async def test_ranks_in_pods_on_a_network(tmp_path: Path) -> None:
    """Ranks die and hang, an agent is replaced, a node and the leader are lost: same tokens."""
    async with serving_pods(tmp_path) as served:
        await _a_killed_rank(served)
        await _a_replaced_agent(served)
        await _a_rank_that_hangs(served)
        await _a_lost_node(served)
        await _a_lost_leader(served)
        assert all(incident.phase == CLOSED for incident in await served.incidents())


@contextlib.asynccontextmanager
async def states_seen(served: Served) -> AsyncIterator[set[str]]:
    """The states that any node has in the leader's eyes during the block."""
    seen: set[str] = set()

    async def look() -> None:
        while True:
            seen.update((await node_states(served)).values())
            await asyncio.sleep(0.2)  # the pause between two looks

    looking = asyncio.create_task(look())
    try:
        yield seen
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


async def node_states(served: Served) -> dict[str, str]:
    request = scheduler_pb2.ListNodesRequest()
    nodes = (await served.cluster.stub.ListNodes(request, timeout=10.0)).nodes
    return {node.node: node.state for node in nodes}


@pytest.mark.skipif(not _may_make_hosts(), reason="needs root, network and process namespaces")
async def test_a_leader_cut_off_from_agents_and_ranks_alone_loses_nothing(tmp_path: Path) -> None:
    """It reaches etcd and the standby, leases live: suspect nodes, nothing moves, same tokens."""
    async with serving_pods(tmp_path) as served:
        leader = await served.leader_number()
        await served.cluster.connect(leader)
        name = f"scheduler-{leader}"
        agents = [a for host, a in served.hosts.hosts.items() if host.startswith("agent-")]
        cut = [*agents, *(pod.address for pod in served.deployer.pods.values())]
        before = (await served.job()).job.epoch, await served.incarnations()
        served.hosts.cut_off(name, cut)
        async with states_seen(served) as seen:
            await served.same_tokens_for(CUT_S)
            assert set((await node_states(served)).values()) == {"SUSPECT"}
        assert seen <= {"READY", "SUSPECT"}
        assert ((await served.job()).job.epoch, await served.incarnations()) == before
        assert await served.leader_number() == leader
        served.hosts.mend(name, cut)

        async def ready() -> bool:
            return set((await node_states(served)).values()) == {"READY"}

        await served.cluster.until(ready, "all nodes are ready again")
        await _a_killed_rank(served)
        assert await assert_one_writer(served.cluster.etcd_endpoints) == [name]


async def _a_killed_rank(served: ServedByPods) -> None:
    """The agent sees the end of a process that has no number where it lives."""

    async def kill_rank() -> None:
        served.deployer.kill(served.a_decode_pod(), signal.SIGKILL)
        await served.ready_at(2)

    await served.same_tokens_while(kill_rank)


async def _a_replaced_agent(served: ServedByPods) -> None:
    """Ranks outlive their agent's host, and the next one, behind another address, adopts them."""
    before = (await served.job()).job.epoch, await served.incarnations()
    node = served.deployer.pods[served.a_decode_pod()].node
    name = f"agent-{node.replace('/', '-')}"

    async def replace_agent() -> None:
        served.hosts.lose(name)
        served.hosts.start_real_agent(node)

        async def ready_again() -> bool:
            request = scheduler_pb2.ListNodesRequest()
            nodes = (await served.cluster.stub.ListNodes(request, timeout=10.0)).nodes
            probes = [await served.probe(name, path) for path in ("/live", "/ready")]
            return probes == [200, 200] and all(n.state == "READY" for n in nodes)

        await served.cluster.until(ready_again, "the node is ready again")

    await served.same_tokens_while(replace_agent)
    assert ((await served.job()).job.epoch, await served.incarnations()) == before


async def _a_rank_that_hangs(served: ServedByPods) -> None:
    """Nobody but the one who started a stopped rank can end it, and nothing waits for that."""
    epoch = (await served.job()).job.epoch
    folder = served.a_decode_pod()

    async def stop_rank() -> None:
        served.deployer.kill(folder, signal.SIGSTOP)
        await served.ready_at(epoch + 1)

    await served.same_tokens_while(stop_rank)

    async def deleted() -> bool:
        return folder not in served.deployer.pods

    await served.cluster.until(deleted, "the pod is deleted")


async def _a_lost_leader(served: ServedByPods) -> None:
    """The leader's host falls silent, then a rank dies: whoever knew the leader finds the other."""
    epoch = (await served.job()).job.epoch

    async def lose_leader() -> None:
        leader = await served.leader_number()
        served.hosts.lose(f"scheduler-{leader}")
        await served.cluster.connect(1 - leader)
        served.deployer.kill(served.a_decode_pod(), signal.SIGKILL)
        await served.ready_at(epoch + 1)

    await served.same_tokens_while(lose_leader)


async def _a_lost_node(served: ServedByPods) -> None:
    """The agent and the pods of a node, and all that they would say, are gone at once."""
    epoch = (await served.job()).job.epoch

    async def lose_node() -> None:
        served.deployer.lose(served.deployer.pods[served.a_decode_pod()].node)
        await served.ready_at(epoch + 1)

    await served.same_tokens_while(lose_node)
