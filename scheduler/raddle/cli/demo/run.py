"""The demonstration: serve, kill a rank, kill a node, and compare every token.

Undisturbed first, then the same requests again while a decode rank and later a whole node are
killed with SIGKILL. Exit code 1 if any token differs or a request is lost.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from raddle import traces
from raddle.cli.cluster import LocalCluster
from raddle.cli.demo import jobs
from raddle.cli.demo.client import Answers, get_text, send_all
from raddle.cli.demo.report import document, print_incident, show_result
from raddle.cli.session import EXIT_FAILED, EXIT_OK, say
from raddle.model.errors import RaddleError
from raddle.traces import TraceRequest
from raddle.v1 import incident_pb2, job_pb2, scheduler_pb2

CONCURRENCY = 12
# Shares of all tokens after which the rank and the node are killed.
RANK_KILL_AT = 0.15
NODE_KILL_AT = 0.45


@dataclass(slots=True)
class Demo:
    """What the demonstration knows while it runs."""

    cluster: LocalCluster
    requests: list[TraceRequest]
    output: str
    began_s: float = field(default_factory=time.monotonic)
    uids: dict[str, str] = field(default_factory=dict)
    address: str = ""
    undisturbed: Answers = field(default_factory=Answers)
    disturbed: Answers = field(default_factory=Answers)
    kv: dict[str, int] = field(default_factory=dict)
    incidents: list[Any] = field(default_factory=list)
    jobs: list[Any] = field(default_factory=list)

    def say(self, text: str) -> None:
        say(f"[{time.monotonic() - self.began_s:5.1f} s] {text}")


async def run_demo(*, output: str, requests: int, keep: bool) -> int:
    """Run it all; gives the exit code."""
    folder = Path(tempfile.mkdtemp(prefix="raddle-demo-"))
    cluster = LocalCluster(folder, real_nodes=jobs.REAL_NODES)
    demo = Demo(cluster, traces.load_requests(requests), output)
    cluster.tell = demo.say
    succeeded = False
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await _play(demo)
        succeeded = _judge(demo)
    except RaddleError as error:
        say(f"raddle demo: {error}")
    finally:
        await cluster.stop()
        if keep or not succeeded:
            say(f"data and logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return EXIT_OK if succeeded else EXIT_FAILED


async def _play(demo: Demo) -> None:
    await demo.cluster.start()
    demo.say(f"{demo.cluster.supernode.dies} dies of 48 nodes are ready; submitting two jobs")
    for name in (jobs.LARGE, jobs.SMALL):
        request = scheduler_pb2.SubmitJobRequest(spec=jobs.job(name), idempotency_key=name)
        answer = await demo.cluster.stub.SubmitJob(request, timeout=10.0)
        demo.uids[name] = answer.job.uid
    for name in (jobs.LARGE, jobs.SMALL):
        await demo.cluster.until(partial(_is_ready, demo, name), f"{name} is ready")
        answer = await _get(demo, name)
        demo.say(f"{answer.job.spec.name} is ready: {answer.placement.why.message}")
    demo.address = demo.cluster.start_front_door("default/small", jobs.SMALL_MODEL)
    await demo.cluster.until(lambda: _front_door_live(demo), "the front door has routes")
    demo.say(f"undisturbed run of {len(demo.requests)} requests")
    await send_all(demo.address, demo.requests, demo.undisturbed, CONCURRENCY)
    demo.say(f"{demo.undisturbed.count} tokens; the same again, with faults")
    sending = asyncio.create_task(
        send_all(demo.address, demo.requests, demo.disturbed, CONCURRENCY)
    )
    try:
        await _kill_rank(demo)
        await _kill_node(demo)
        await sending
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    await _collect(demo)


async def _get(demo: Demo, name: str) -> Any:
    request = scheduler_pb2.GetJobRequest(job_uid=demo.uids[name])
    return await demo.cluster.stub.GetJob(request, timeout=5.0)


async def _is_ready(demo: Demo, name: str) -> bool:
    return bool((await _get(demo, name)).job.state == job_pb2.JOB_STATE_READY)


async def _front_door_live(demo: Demo) -> bool:
    try:
        status, _ = await get_text(demo.address, "/health")
    except OSError:
        return False
    return status == 200  # noqa: PLR2004


async def _wait_tokens(demo: Demo, share: float) -> None:
    wanted = demo.undisturbed.count * share

    async def enough() -> bool:
        return demo.disturbed.count >= wanted

    await demo.cluster.until(enough, f"{wanted:.0f} tokens came")


async def _wait_incident(demo: Demo, count: int) -> None:
    """Until so many incidents are closed; the newest one is printed."""

    async def closed() -> bool:
        incidents = await _incidents(demo)
        done = [i for i in incidents if i.phase == incident_pb2.INCIDENT_PHASE_CLOSED]
        return len(done) >= count and len(done) == len(incidents)

    await demo.cluster.until(closed, f"incident {count} is closed")
    newest = (await _incidents(demo))[0]
    if demo.output == "table":
        print_incident(newest)


async def _incidents(demo: Demo) -> list[Any]:
    request = scheduler_pb2.ListIncidentsRequest(job_uid=demo.uids[jobs.SMALL])
    return list((await demo.cluster.stub.ListIncidents(request, timeout=5.0)).incidents)


async def _kill_rank(demo: Demo) -> None:
    await _wait_tokens(demo, RANK_KILL_AT)
    answer = await _get(demo, jobs.SMALL)
    processes = demo.cluster.rank_processes()
    victim = next(r for r in answer.ranks if r.role == "decode" and r.incarnation in processes)
    demo.say(f"kill -9 decode rank {victim.rank} on {victim.die}, in mid stream")
    os.kill(processes[victim.incarnation], signal.SIGKILL)
    await _wait_incident(demo, 1)


async def _kill_node(demo: Demo) -> None:
    await _wait_tokens(demo, NODE_KILL_AT)
    answer = await _get(demo, jobs.SMALL)
    decode = [r.die for r in answer.ranks if r.role == "decode" and r.stage < _EXITED]
    node = max(
        demo.cluster.real_node_names(),
        key=lambda name: (sum(die.startswith(f"{name}/") for die in decode), name),
    )
    killed = demo.cluster.kill_node(node)
    demo.say(f"kill -9 node {node}: its agent and {killed} ranks, in mid stream")
    await _wait_incident(demo, 2)


_EXITED = 5


async def _collect(demo: Demo) -> None:
    _, text = await get_text(demo.address, "/metrics")
    for line in text.splitlines():
        name, value = line.rsplit(" ", 1)
        demo.kv[name] = int(float(value))
    demo.incidents = await _incidents(demo)
    demo.jobs = [(await _get(demo, name)).job for name in (jobs.LARGE, jobs.SMALL)]


def _judge(demo: Demo) -> bool:
    """Print the result; is every token the same and no request lost?"""
    result = document(demo)
    show_result(result, demo.output)
    failures = demo.undisturbed.failures | demo.disturbed.failures
    for number, why in sorted(failures.items()):
        say(f"request {number} was lost: {why}")
    whole = result["requests_finished"] == result["requests_sent"] and not failures
    return bool(whole and result["tokens_different"] == 0 and result["tokens_compared"] > 0)
