"""Real agents of some simulated nodes in one process; they print when what reached them.

Lines on stdin set faults: {"die": "sn0/n00/npu0/die0", "present": true}. Lines on stdout, times of
the host's monotonic clock in nanoseconds: {"fault": die, "t": ns} as the source hands a fault to
its agent, {"node": node, "jobs": [[uid, epoch, stage]], "t": ns} as an assignment is decoded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from raddle.agent.core.events import AssignmentChanged, Event
from raddle.agent.engine.driver import EngineDriver
from raddle.agent.engine.simulated import SimulatedDriver
from raddle.agent.health.simulated import SimulatedSource
from raddle.agent.leader_link import LeaderAddress, StatsStream
from raddle.agent.node import NodeAgent, NodeFacts, new_boot_id
from raddle.machines import load_machine
from raddle.model import keys
from raddle.sim.nodes import Devices
from raddle.store.etcd.store import EtcdStore
from raddle.telemetry.logging import configure_logging


def tell(**what: Any) -> None:
    sys.stdout.write(json.dumps(what | {"t": time.monotonic_ns()}) + "\n")
    sys.stdout.flush()


class TimedAgent(NodeAgent):
    """Says when an assignment was decoded."""

    def tell(self, event: Event) -> None:
        if isinstance(event, AssignmentChanged):
            jobs = [[job.job_uid, job.epoch, job.stage] for job in event.assignment.jobs]
            tell(node=self._facts.name, jobs=jobs)
        super().tell(event)


def drivers(tell_agent: Callable[[Event], None]) -> list[EngineDriver]:
    return [SimulatedDriver(tell_agent)]


async def run(nodes: list[str], machine: str, etcd: list[str]) -> None:
    """Until stdin ends."""
    supernode = load_machine(machine)

    def store(node: str) -> EtcdStore:
        return EtcdStore(etcd, "default", operation_key=keys.agent_operation(node))

    leader = LeaderAddress(store(nodes[0]))
    devices: dict[str, Devices] = {}
    tasks = [asyncio.create_task(leader.run())]
    for node in nodes:
        own = store(node)
        devices[node] = Devices(SimulatedSource(node, supernode, own))
        facts = NodeFacts(node, "bench", supernode.host_memory_bytes, new_boot_id())
        stream = StatsStream(node, leader, None)
        agent = TimedAgent(facts, own, devices[node], stream, drivers)
        tasks.append(asyncio.create_task(agent.run()))
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        order = json.loads(line)
        die = order["die"]
        if order["present"]:
            tell(fault=die)
        devices["/".join(die.split("/")[:2])].set_faults([die], present=order["present"])
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
