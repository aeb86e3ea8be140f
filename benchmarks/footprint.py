"""What an idle agent and a scheduler with many jobs take of a host."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.cluster import say
from benchmarks.figures import figure
from raddle.cli.cluster import LocalCluster
from raddle.v1 import scheduler_pb2
from raddle.wire.parse import job_message

WINDOWS = 6
WINDOW_S = 5.0
JOBS = 1_000
GANG = """
name: gang-%d
model: {config: raddle-demo, kv_block_tokens: 16}
roles:
  - {name: decode, kind: decode, ranks: 8, slots_per_rank: 4, engine: {driver: simulated}}
"""


def cpu_s(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"process {pid} has no VmRSS")


async def measure() -> dict[str, Any]:
    """`agent_cpu_percent`, `agent_rss_mib`, `scheduler_rss_mib`."""
    with TemporaryDirectory(prefix="raddle-bench-") as folder:
        cluster = LocalCluster(Path(folder), real_nodes=1, forks=False)
        try:
            await cluster.start()
            agent = next(c for n, c in cluster.children.items() if n.startswith("agent-sn0"))
            pid = agent.process.pid
            percents, sizes = [], []
            for _ in range(WINDOWS):
                before = cpu_s(pid)
                await asyncio.sleep(WINDOW_S)
                percents.append((cpu_s(pid) - before) / WINDOW_S * 100)
                sizes.append(rss_mib(pid))
            say(f"agent_cpu_percent: {percents[-1]:.1f}, agent_rss_mib: {sizes[-1]:.0f}")
            for number in range(JOBS):
                spec = job_message(GANG % number, Path(folder))
                request = scheduler_pb2.SubmitJobRequest(spec=spec)
                await cluster.stub.SubmitJob(request, timeout=30.0)
            scheduler = cluster.children["scheduler-0"].process.pid
            held = []
            for _ in range(WINDOWS):
                await asyncio.sleep(1.0)
                held.append(rss_mib(scheduler))
        finally:
            await cluster.stop()
    return {
        "agent_cpu_percent": figure(percents),
        "agent_rss_mib": figure(sizes, digits=1),
        "scheduler_rss_mib": figure(held, digits=1, dies=768, jobs=JOBS),
    }
