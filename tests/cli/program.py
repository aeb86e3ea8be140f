"""The real `raddle` program as a child process, and a small cluster for it to talk to."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from raddle.cli.cluster import LocalCluster
from raddle.cli.session import EXIT_CODES, EXIT_NOT_FOUND, EXIT_OK, EXIT_USAGE
from raddle.model import keys
from raddle.model.errors import Reason
from raddle.store.etcd.store import EtcdStore
from raddle.v1 import health_pb2, incident_pb2, job_pb2, scheduler_pb2
from raddle.wire import records as codec
from tests.e2e.served import SMALL_MACHINE
from tests.support import eventually

PROGRAM = [sys.executable, "-m", "raddle.cli.main"]
CALL_TIMEOUT_S = 60.0
#: Calls that run at once: each is mostly the start of an interpreter.
CALLS_MAX = 4
ENDED = (job_pb2.JOB_STATE_CANCELLED, job_pb2.JOB_STATE_FAILED)
#: What a refused command might have changed; agents and the leader write the rest by themselves.
CHANGED_BY_COMMANDS = (
    keys.TOPOLOGY,
    keys.JOBS,
    keys.NAMES,
    keys.PLACEMENTS,
    keys.INCIDENTS,
    keys.HOLDS,
    keys.MAINTENANCE,
    keys.INJECTIONS,
    keys.AUDIT,
)


def job_text(name: str, ranks: int = 4, slots: int = 16) -> str:
    """A job file for simulated nodes."""
    return (
        f"name: {name}\n"
        "model: {config: raddle-demo, kv_block_tokens: 16}\n"
        "roles:\n"
        f"  - {{name: decode, kind: decode, ranks: {ranks}, slots_per_rank: {slots},"
        " engine: {driver: simulated}}\n"
    )


@dataclass(frozen=True, slots=True)
class Done:
    """How one call ended."""

    arguments: tuple[str, ...]
    code: int
    out: str
    err: str

    def plain(self) -> str:
        """What was printed by a call that went well and had nothing to say besides."""
        assert self.code == EXIT_OK, self
        assert self.err == "", self
        return self.out

    def told(self) -> str:
        """What a call that has no data said to the user."""
        assert self.code == EXIT_OK, self
        assert self.out == "", self
        return self.err

    def json(self) -> Any:
        """All of stdout as one JSON document."""
        return json.loads(self.plain())

    def yaml(self) -> Any:
        """All of stdout as one YAML document, which is no JSON."""
        text = self.plain()
        assert not text.startswith("{"), self
        return yaml.safe_load(text)

    def refused(self, code: int, *words: str) -> None:
        """One message on stderr with its reason and these words; nothing on stdout."""
        assert code in EXIT_CODES
        assert self.code == code, self
        assert self.out == "", self
        assert "Traceback" not in self.err, self
        assert all(c.isprintable() or c == "\n" for c in self.err), self
        first, _, reason = self.err.strip().rpartition(" ")
        assert first.startswith("raddle: "), self
        assert reason.strip("[]") in [str(known) for known in Reason], self
        for word in words:
            assert word in self.err, (word, self)

    def misused(self, *words: str) -> None:
        """A wrong command line: how to use it on stderr, exit code 2."""
        assert self.code == 2, self
        assert self.out == "", self
        assert "Traceback" not in self.err, self
        assert "--help" in self.err, self
        for word in words:
            assert word in self.err, (word, self)


@dataclass(slots=True)
class Program:
    """Calls `raddle` with a home and a configuration of its own."""

    home: Path
    server: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.home / "config.yaml"

    def variables(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if "RADDLE" not in k}
        own = {"HOME": str(self.home), "RADDLE_CONFIG": str(self.config)}
        if self.server:
            own["RADDLE_SERVER"] = self.server
        return kept | own | self.environment

    def having(self, **environment: str) -> Program:
        """The same with other variables; an empty one is as good as none."""
        return replace(self, environment=self.environment | environment)

    async def __call__(self, *arguments: str, stdin: str = "") -> Done:
        result = await asyncio.to_thread(
            subprocess.run,
            [*PROGRAM, *arguments],
            input=stdin.encode(),
            capture_output=True,
            cwd=self.home,
            env=self.variables(),
            timeout=CALL_TIMEOUT_S,
            check=False,
        )
        return Done(arguments, result.returncode, result.stdout.decode(), result.stderr.decode())

    async def all(self, *calls: tuple[str, ...]) -> list[Done]:
        """Independent calls, some at once; their ends in the order of the calls."""
        free = asyncio.Semaphore(CALLS_MAX)

        async def one(arguments: tuple[str, ...]) -> Done:
            async with free:
                return await self(*arguments)

        return list(await asyncio.gather(*(one(arguments) for arguments in calls)))

    def file(self, name: str, text: str | bytes) -> str:
        """Write a file into the folder where the program runs; gives its name."""
        data = text.encode() if isinstance(text, str) else text
        (self.home / name).write_bytes(data)
        return name


class Small:
    """The small machine with simulated nodes only, running, and its store."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.store = EtcdStore([cluster.etcd_endpoints], "default", operation_key="operations/test")

    @property
    def stub(self) -> Any:
        return self.cluster.stub

    @property
    def address(self) -> str:
        return self.cluster.addresses[0]

    async def content(self) -> dict[str, bytes]:
        """What commands can change."""
        found = (await self.store.list("")).records
        return {r.key: r.value for r in found if r.key.startswith(CHANGED_BY_COMMANDS)}

    async def records(self, prefix: str) -> list[Any]:
        found = (await self.store.list(prefix)).records
        return [codec.decode(r.key, r.value) for r in found]

    async def jobs(self) -> list[Any]:
        request = scheduler_pb2.ListJobsRequest()
        return list((await self.stub.ListJobs(request, timeout=10.0)).jobs)

    async def state_is(self, uid: str, *states: int) -> None:
        """Wait until the job is in one of the states."""

        async def reached() -> bool:
            return any(job.uid == uid and job.state in states for job in await self.jobs())

        await eventually(reached, f"job {uid} reaches one of {states}")

    async def tidy(self) -> None:
        """Take back what a test did: faults, drains, cordons and jobs."""
        set_ones = [f for node in await self.records(keys.INJECTIONS) for f in node.faults]
        for fault in set_ones:
            gone = scheduler_pb2.InjectFaultRequest(
                subject=fault.subject,
                code=fault.code,
                level=health_pb2.FAULT_LEVEL_SEPARATE_NPU,
                clear=True,
            )
            await self.stub.InjectFault(gone, timeout=10.0)
        for record in await self.records(keys.MAINTENANCE):
            cancel = scheduler_pb2.CancelMaintenanceRequest(id=record.id)
            await self.stub.CancelMaintenance(cancel, timeout=10.0)
        for hold in await self.records(keys.HOLDS):
            lifted = scheduler_pb2.UncordonRequest(subject=hold.subject)
            await self.stub.Uncordon(lifted, timeout=10.0)
        for job in await self.jobs():
            await self.stub.CancelJob(scheduler_pb2.CancelJobRequest(job_uid=job.uid), timeout=10.0)
            await self.state_is(job.uid, *ENDED)
            await self.stub.DeleteJob(scheduler_pb2.DeleteJobRequest(job_uid=job.uid), timeout=10.0)
        await eventually(self._is_quiet, "all incidents are closed, all dies healthy and free")

    async def incidents(self) -> list[Any]:
        request = scheduler_pb2.ListIncidentsRequest()
        return list((await self.stub.ListIncidents(request, timeout=10.0)).incidents)

    async def closed_incidents(self, subject: str) -> list[Any]:
        closed = incident_pb2.INCIDENT_PHASE_CLOSED
        return [i for i in await self.incidents() if (i.subject, i.phase) == (subject, closed)]

    async def _dies(self) -> list[Any]:
        request = scheduler_pb2.ListDiesRequest()
        return list((await self.stub.ListDies(request, timeout=10.0)).dies)

    async def is_healthy(self) -> bool:
        return not any(die.health or die.faults for die in await self._dies())

    async def _is_quiet(self) -> bool:
        closed = incident_pb2.INCIDENT_PHASE_CLOSED
        if any(incident.phase != closed for incident in await self.incidents()):
            return False
        free = not any(die.hold or die.job_uid for die in await self._dies())
        return free and await self.is_healthy()


@asynccontextmanager
async def small_cluster(folder: Path) -> AsyncIterator[Small]:
    """Start the small machine; everything that was started ends with the block."""
    cluster = LocalCluster(folder, machine=SMALL_MACHINE, real_nodes=0)
    try:
        await cluster.start()
        small = Small(cluster)
        yield small
        await small.store.close()
    finally:
        await cluster.stop()


def refused_somehow(done: Done) -> None:
    """A reason and one of the codes for a wrong call, never a traceback or an escape."""
    assert done.code in (EXIT_USAGE, EXIT_NOT_FOUND), done
    assert done.out == "", done
    assert "Traceback" not in done.err, done
    assert all(c.isprintable() or c == "\n" for c in done.err), done
