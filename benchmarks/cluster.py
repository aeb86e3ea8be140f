"""A cluster whose schedulers and simulated agents say when faults and assignments reached them."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import timed_scheduler
from benchmarks.moments import SchedulerTimes
from raddle.cli.cluster import Child, LocalCluster
from raddle.scheduler import main as scheduler_main
from raddle.v1 import job_pb2, scheduler_pb2
from raddle.wire.parse import job_message

AGENT_PROCESSES = 8


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@dataclass(frozen=True, slots=True)
class Delivered:
    """When an assignment's bytes were at its agent, and when they were decoded: nanoseconds."""

    arrived: int
    decoded: int


@dataclass(slots=True)
class TimedCluster(LocalCluster):
    """All nodes are simulated and spread over `agent_processes` processes of `timed_agents`."""

    agent_processes: int = AGENT_PROCESSES
    #: When each fault was handed to its agent, nanoseconds.
    faults: dict[str, int] = field(default_factory=dict)
    #: (job uid, epoch) -> node -> its first assignment of that epoch.
    delivered: dict[tuple[str, int], dict[str, Delivered]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    _readers: list[asyncio.Task[None]] = field(default_factory=list)
    _inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def times(self) -> SchedulerTimes:
        return SchedulerTimes(self.folder / "times")

    def spawn(self, name: str, *command: str) -> Child:
        """Start a daemon; schedulers are those that write down their times."""
        module, *arguments = command
        if module == scheduler_main.__name__:
            module = timed_scheduler.__name__
            self._environment[timed_scheduler.VARIABLE] = str(self.folder / "times")
        # Without arguments `super` does not find its class in one with slots.
        return LocalCluster.spawn(self, name, module, *arguments)

    def _start_simulated_agents(self) -> None:
        names = list(self.supernode.node_names())
        for number in range(self.agent_processes):
            share = names[number :: self.agent_processes]
            if share:
                self._readers.append(asyncio.create_task(self._run_agents(number, share)))

    async def _run_agents(self, number: int, nodes: list[str]) -> None:
        name = f"agents-{number}"
        log = self.log_of(name)
        command = [sys.executable, "-m", "benchmarks.timed_agents", "--nodes", ",".join(nodes)]
        command += ["--machine", self.machine, "--etcd", self.etcd_endpoints]
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                limit=1 << 24,
            )
        handle = _Handle(process)
        self.children[name] = Child(name, handle, log)  # type: ignore[arg-type]
        for node in nodes:
            self._inputs[node] = process.stdin
        assert process.stdout is not None
        async for line in process.stdout:
            self._heard(json.loads(line))

    def _heard(self, said: dict[str, Any]) -> None:
        if "fault" in said:
            self.faults[said["fault"]] = said["t"]
        else:
            for uid, epoch, _stage in said["jobs"]:
                told = Delivered(said["arrived"], said["t"])
                self.delivered[uid, epoch].setdefault(said["node"], told)
        moved, self.moved = self.moved, asyncio.Event()
        moved.set()

    async def set_fault(self, die: str, *, present: bool) -> None:
        """Hand a fault to the die's agent, or take it back."""
        await self._order(die, present=present)

    async def end_rank(self, die: str) -> None:
        """Have the agent learn that the process of the die's rank was killed."""
        await self._order(die, ended=True)

    async def _order(self, die: str, **what: bool) -> None:
        writer = self._inputs["/".join(die.split("/")[:2])]
        writer.write(json.dumps({"die": die} | what).encode() + b"\n")
        await writer.drain()

    async def until_heard(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait for something that agents say."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await self.moved.wait()

    async def _answer(self, call: Callable[[], Any], what: str) -> Any:
        """What a scheduler answers; asked again while the lead changes."""
        found: list[Any] = []

        async def answered() -> bool:
            found.append(await call())
            return True

        await self.until(answered, what)
        return found[0]

    async def submit(self, text: str) -> str:
        key = secrets.token_hex(8)
        spec = job_message(text, self.folder)
        request = scheduler_pb2.SubmitJobRequest(spec=spec, idempotency_key=key)
        answer = await self._answer(
            lambda: self.stub.SubmitJob(request, timeout=10.0), "the job is accepted"
        )
        return str(answer.job.uid)

    async def job(self, uid: str) -> Any:
        request = scheduler_pb2.GetJobRequest(job_uid=uid)
        return await self._answer(
            lambda: self.stub.GetJob(request, timeout=5.0), "a scheduler answers"
        )

    async def kv_status(self, uid: str) -> Any:
        request = scheduler_pb2.GetKvStatusRequest(job_uid=uid)
        return await self._answer(
            lambda: self.stub.GetKvStatus(request, timeout=5.0), "a scheduler answers"
        )

    async def ready(self, uid: str, epoch: int = 1) -> None:
        async def reached() -> bool:
            job = (await self.job(uid)).job
            return bool(job.state == job_pb2.JOB_STATE_READY and job.live_epoch >= epoch)

        await self.until(reached, f"job {uid} is ready at epoch {epoch}")

    async def remove(self, uid: str) -> None:
        """Cancel a job, wait for its end, delete it."""
        request = scheduler_pb2.CancelJobRequest(job_uid=uid)
        await self._answer(
            lambda: self.stub.CancelJob(request, timeout=10.0), "the job is cancelled"
        )

        async def deleted() -> bool:
            await self.stub.DeleteJob(scheduler_pb2.DeleteJobRequest(job_uid=uid), timeout=5.0)
            return True

        await self.until(deleted, f"job {uid} has ended")


class _Handle:
    """An asyncio process with the few methods of `subprocess.Popen` that a cluster needs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.returncode

    def terminate(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    def wait(self, timeout: float | None = None) -> None:
        """The event loop reaps it."""


@asynccontextmanager
async def timed_cluster(**options: Any) -> AsyncIterator[TimedCluster]:
    """A running cluster in a folder of its own."""
    with TemporaryDirectory(prefix="raddle-bench-") as folder:
        cluster = TimedCluster(Path(folder), forks=False, **options)
        try:
            await cluster.start()
            yield cluster
        finally:
            await cluster.stop()
            for reader in cluster._readers:
                reader.cancel()
            await asyncio.gather(*cluster._readers, return_exceptions=True)
