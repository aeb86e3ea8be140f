"""Real agents of some simulated nodes in one process; they print when what reached them.

Lines on stdin set faults: {"die": "sn0/n00/npu0/die0", "present": true}, or end the rank of a die:
{"die": "sn0/n00/npu0/die0", "ended": true}. Lines on stdout, times of the host's monotonic clock in
nanoseconds: {"fault": die, "t": ns} as the source hands a fault to its agent or the driver the end
of a rank, {"node": node, "jobs": [[uid, epoch, stage]], "arrived": ns, "t": ns} as an assignment
came from the store and as it is decoded.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from raddle.agent.core.events import AssignmentChanged, Event, RankExited, StartRank
from raddle.agent.engine.driver import EngineDriver
from raddle.agent.engine.simulated import SimulatedDriver
from raddle.agent.health.simulated import SimulatedSource
from raddle.agent.leader_link import LeaderAddress, StatsStream
from raddle.agent.node import NodeAgent, NodeFacts, new_boot_id
from raddle.machines import load_machine
from raddle.model import keys
from raddle.model.kinds import RoleKind
from raddle.model.kv import KvEventKind, KvTier
from raddle.model.stats import KvEvent, RankStats
from raddle.model.types import RankKey
from raddle.sim.nodes import Devices
from raddle.store.etcd.store import EtcdStore
from raddle.store.protocol import Record
from raddle.telemetry.logging import configure_logging

SEQUENCES = 16
BLOCKS_A_SEQUENCE = 32


def tell(**what: Any) -> None:
    sys.stdout.write(json.dumps(what | {"t": time.monotonic_ns()}) + "\n")
    sys.stdout.flush()


def block_hashes(sequence: int) -> tuple[str, ...]:
    """Hashes of the full KV blocks of a sequence that is reported to run on this decode rank."""
    names = (f"{sequence}-{block}" for block in range(BLOCKS_A_SEQUENCE))
    return tuple(hashlib.sha256(name.encode()).hexdigest()[:32] for name in names)


class TimedAgent(NodeAgent):
    """Says when an assignment came and was decoded."""

    _arrived = 0

    def _assigned(self, key: str, records: tuple[Record, ...]) -> None:
        self._arrived = time.monotonic_ns()
        super()._assigned(key, records)

    def tell(self, event: Event) -> None:
        if isinstance(event, AssignmentChanged):
            jobs = [[job.job_uid, job.epoch, job.stage] for job in event.assignment.jobs]
            tell(node=self._facts.name, jobs=jobs, arrived=self._arrived)
        super().tell(event)


class TimedDriver(SimulatedDriver):
    """Its ranks can end like killed processes; cache ranks hold the blocks of all sequences."""

    def __init__(
        self, tell_agent: Callable[[Event], None], report: Callable[[str, RankStats], None]
    ) -> None:
        super().__init__(tell_agent)
        self._report_blocks = report
        self._on: dict[str, StartRank] = {}

    async def start(self, instruction: StartRank) -> None:
        await super().start(instruction)
        rank = instruction.rank
        if rank.kind is RoleKind.CACHE:
            self._report_blocks(instruction.job.job_uid, _stored(rank.rank, instruction.job.epoch))
        else:
            self._on[rank.die] = instruction

    def end(self, die: str) -> None:
        """The rank's process is gone: what the driver of real processes would tell its agent."""
        started = self._on[die]
        key = started.rank.rank
        self._alive.pop((started.job.job_uid, key), None)
        tell(fault=die)
        count, code = started.rank.start_count, -signal.SIGKILL
        self._tell(RankExited(started.job.job_uid, key, count, code, "killed"))


def _stored(rank: RankKey, epoch: int) -> RankStats:
    hashes = [block for number in range(SEQUENCES) for block in block_hashes(number)]
    stored = KvEvent(
        kind=KvEventKind.STORED, block_hashes=tuple(hashes), sequence=0, tier=KvTier.DRAM
    )
    return RankStats(rank=rank, incarnation="bench", epoch=epoch, kv_events=(stored,))


async def run(nodes: list[str], machine: str, etcd: list[str]) -> None:
    """Until stdin ends."""
    supernode = load_machine(machine)

    def store(node: str) -> EtcdStore:
        return EtcdStore(etcd, "default", operation_key=keys.agent_operation(node))

    leader = LeaderAddress(store(nodes[0]))
    devices: dict[str, Devices] = {}
    drivers: dict[str, TimedDriver] = {}
    tasks = [asyncio.create_task(leader.run())]
    for node in nodes:
        own = store(node)
        devices[node] = Devices(SimulatedSource(node, supernode, own))
        facts = NodeFacts(node, "bench", supernode.host_memory_bytes, new_boot_id())
        stream = StatsStream(node, leader, None)

        def make_drivers(
            tell_agent: Callable[[Event], None], node: str = node, stream: StatsStream = stream
        ) -> list[EngineDriver]:
            drivers[node] = TimedDriver(tell_agent, stream.report)
            return [drivers[node]]

        agent = TimedAgent(facts, own, devices[node], stream, make_drivers)
        tasks.append(asyncio.create_task(agent.run()))
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        order = json.loads(line)
        die = order["die"]
        node = "/".join(die.split("/")[:2])
        if "ended" in order:
            drivers[node].end(die)
            continue
        if order["present"]:
            tell(fault=die)
        devices[node].set_faults([die], present=order["present"])
    for task in tasks:
        task.cancel()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser("timed_agents", description=__doc__)
    parser.add_argument("--nodes", required=True)
    parser.add_argument("--machine", required=True)
    parser.add_argument("--etcd", required=True)
    found = parser.parse_args()
    configure_logging("agent")
    asyncio.run(run(found.nodes.split(","), found.machine, found.etcd.split(",")))


if __name__ == "__main__":
    main()
