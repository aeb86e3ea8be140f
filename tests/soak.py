"""A soak: faults drawn from a printed seed against the demonstration's cluster under load.

`make soak MINUTES=10` or `python -m tests.soak --minutes 10 --seed 7`. Requests run all the time;
every token of every round is compared. At the end everything must be at rest. One JSON object on
stdout says what was done; exit code 1 with the folder of data and logs if anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from raddle import traces
from raddle.cli.cluster import LocalCluster
from raddle.cli.demo import jobs
from raddle.cli.demo.client import Answers, get_text, send_all
from raddle.store.etcd.connection import Connection
from raddle.v1 import incident_pb2, job_pb2, scheduler_pb2
from tests.e2e.history import assert_one_writer

REQUESTS = 32
SCHEDULERS = 3
ETCD_MEMBERS = 3
# Share of faults after which the next one comes at once, in the middle of the recovery.
BURST_SHARE = 0.3
RECOVERY_MAX_S = 90.0


class Soak:
    """One run against one cluster."""

    def __init__(self, cluster: LocalCluster, rng: random.Random) -> None:
        self.cluster = cluster
        self._rng = rng
        self._requests = traces.load_requests(REQUESTS)
        self._expected = Answers()
        self._uids: dict[str, str] = {}
        self._address = ""
        self._waking: set[asyncio.Task[None]] = set()
        self._down_member: int | None = None
        self.faults: Counter[str] = Counter()
        self.rounds = 0
        self.tokens = 0
        self.wrong: list[str] = []
        self._kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "kill rank": self._kill_rank,
            "stop rank": self._stop_rank,
            "kill npu": self._kill_npu,
            "kill node": self._kill_node,
            "kill agent": self._kill_agent,
            "stop agent": self._stop_agent,
            "kill leader": self._kill_leader,
            "stop leader": self._stop_leader,
            "kill etcd member": self._kill_member,
            "stop etcd member": self._stop_member,
            "stop front door": self._stop_front_door,
        }

    def say(self, text: str) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    async def start(self) -> None:
        await self.cluster.start()
        for name in (jobs.LARGE, jobs.SMALL):
            request = scheduler_pb2.SubmitJobRequest(spec=jobs.job(name), idempotency_key=name)
            answer = await self.cluster.stub.SubmitJob(request, timeout=10.0)
            self._uids[name] = answer.job.uid
        await self.at_rest()
        self._address = self.cluster.start_front_door("default/small", jobs.SMALL_MODEL)

        async def live() -> bool:
            with contextlib.suppress(OSError):
                return (await get_text(self._address, "/health"))[0] == 200
            return False

        await self.cluster.until(live, "the front door has routes")
        await send_all(self._address, self._requests, self._expected, 8)
        assert not self._expected.failures, self._expected.failures

    async def serve(self, end: asyncio.Event) -> None:
        """Rounds of requests without a pause, each compared with the undisturbed one."""
        while not end.is_set():
            answers = Answers()
            await send_all(self._address, self._requests, answers, 8)
            self.rounds += 1
            self.tokens += answers.count
            self.wrong += [
                f"round {self.rounds}: request {n}: {w}" for n, w in answers.failures.items()
            ]
            for number, tokens in answers.tokens.items():
                if tokens != self._expected.tokens[number] and number not in answers.failures:
                    self.wrong.append(f"round {self.rounds}: tokens of request {number} differ")

    async def strike(self, seconds: float, serving: asyncio.Task[None]) -> None:
        """Draw faults until the time is over; give up at the first thing that is wrong.

        Raises whatever ended the load: faults without load find little.
        """
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and not self.wrong:
            if serving.done():
                serving.result()
            kind = self._rng.choice(list(self._kinds))
            self.say(f"{kind}; {self.rounds} rounds, {self.tokens} tokens so far")
            await self._kinds[kind]()
            self.faults[kind] += 1
            if self._rng.random() < BURST_SHARE:
                await asyncio.sleep(self._rng.uniform(0.0, 0.3))
            else:
                await self.at_rest()

    async def at_rest(self) -> None:
        """Both jobs ready, all incidents closed, whoever leads.

        Raises:
            AssertionError: with what was seen last.
        """
        end_s = time.monotonic() + RECOVERY_MAX_S
        while True:
            try:
                seen = await self._unrest()
            except grpc.aio.AioRpcError as error:
                seen = f"{error.code().name}: {error.details()}"
            if not seen:
                return
            assert time.monotonic() < end_s, f"not at rest within {RECOVERY_MAX_S:g} s: {seen}"
            self.cluster.check_children()
            await asyncio.sleep(0.05)

    async def _unrest(self) -> str:
        """What is not at rest; empty if all is."""
        stub = self.cluster.stub
        for uid in self._uids.values():
            job = (await stub.GetJob(scheduler_pb2.GetJobRequest(job_uid=uid), timeout=5.0)).job
            if job.state != job_pb2.JOB_STATE_READY or job.live_epoch != job.epoch:
                return f"job {uid} at epoch {job.epoch}: {job.why.message}"
        found = await stub.ListIncidents(scheduler_pb2.ListIncidentsRequest(), timeout=5.0)
        for incident in found.incidents:
            if incident.phase != incident_pb2.INCIDENT_PHASE_CLOSED:
                return f"incident {incident.id}: {incident.why.message}"
        return ""

    async def serve_on(self, serving: asyncio.Task[None]) -> None:
        """Wait for a whole round after the last fault.

        Raises:
            AssertionError: none came in time; or whatever ended the load.
        """
        await asyncio.gather(*self._waking)
        # The round that is under way began before.
        enough = self.rounds + 2
        end_s = time.monotonic() + RECOVERY_MAX_S
        while self.rounds < enough and not self.wrong:
            if serving.done():
                serving.result()
            assert time.monotonic() < end_s, f"no round ends after the last fault: {self.rounds}"
            await asyncio.sleep(0.05)

    async def finish(self) -> None:
        await asyncio.gather(*self._waking)
        await self._member_returns()
        await self.at_rest()
        await assert_one_writer(self.cluster.etcd_endpoints)
        _, text = await get_text(self._address, "/metrics")
        if "raddle_frontdoor_sequences_running 0" not in text:
            self.wrong.append("the front door still has sequences")

    # --- one fault each ------------------------------------------------------------------------

    def _wake_later(self, pid: int, seconds: float) -> None:
        async def wake() -> None:
            await asyncio.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        task = asyncio.create_task(wake())
        self._waking.add(task)
        task.add_done_callback(self._waking.discard)

    def _stop(self, pid: int, longest_s: float) -> None:
        os.kill(pid, signal.SIGSTOP)
        self._wake_later(pid, self._rng.uniform(0.5, longest_s))

    def _some_rank(self) -> tuple[str, int] | None:
        ranks = sorted(self.cluster.rank_processes().items())
        return self._rng.choice(ranks) if ranks else None

    async def _kill_rank(self) -> None:
        rank = self._some_rank()
        if rank is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank[1], signal.SIGKILL)

    async def _stop_rank(self) -> None:
        rank = self._some_rank()
        if rank is not None:
            with contextlib.suppress(ProcessLookupError):
                self._stop(rank[1], 6.0)

    async def _kill_npu(self) -> None:
        request = scheduler_pb2.GetJobRequest(job_uid=self._uids[jobs.SMALL])
        with_dies: dict[str, list[int]] = {}
        processes = self.cluster.rank_processes()
        answer: list[Any] = []

        async def read() -> bool:
            answer.append(await self.cluster.stub.GetJob(request, timeout=5.0))
            return True

        await self.cluster.until(read, "a scheduler answers")
        for rank in answer[0].ranks:
            if rank.die and rank.incarnation in processes:
                npu = rank.die.rsplit("/", 1)[0]
                with_dies.setdefault(npu, []).append(processes[rank.incarnation])
        for pid in self._rng.choice(list(with_dies.values()) or [[]]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _some_agent(self) -> str:
        return self._rng.choice(self.cluster.real_node_names())

    async def _kill_node(self) -> None:
        node = self._some_agent()
        self.cluster.kill_node(node)
        await asyncio.sleep(self._rng.uniform(0.5, 3.0))
        self.cluster.start_real_agent(node)

    async def _kill_agent(self) -> None:
        node = self._some_agent()
        self._kill_child(f"agent-{node.replace('/', '-')}")
        self.cluster.start_real_agent(node)

    async def _stop_agent(self) -> None:
        name = f"agent-{self._some_agent().replace('/', '-')}"
        self._stop(self.cluster.children[name].process.pid, 8.0)

    def _kill_child(self, name: str) -> None:
        child = self.cluster.children.pop(name)
        child.process.kill()
        child.process.wait()

    async def _leader(self) -> int:
        number: list[int] = []

        async def known() -> bool:
            status = await self.cluster.stub.GetStatus(
                scheduler_pb2.GetStatusRequest(), timeout=5.0
            )
            if status.leader_identity:
                number.append(int(status.leader_identity.rsplit("-", 1)[1]))
            return bool(number)

        await self.cluster.until(known, "somebody leads")
        return number[0]

    async def _kill_leader(self) -> None:
        number = await self._leader()
        await self.cluster.connect((number + 1) % SCHEDULERS)
        self._kill_child(f"scheduler-{number}")
        self.cluster.start_scheduler(number)

    async def _stop_leader(self) -> None:
        number = await self._leader()
        await self.cluster.connect((number + 1) % SCHEDULERS)
        self._stop(self.cluster.children[f"scheduler-{number}"].process.pid, 8.0)

    async def _kill_member(self) -> None:
        await self._member_returns()
        number = self._rng.randrange(ETCD_MEMBERS)
        member = self.cluster.etcds[number]
        assert member.process is not None
        member.process.kill()
        member.process.wait()
        self._down_member = number

    async def _stop_member(self) -> None:
        await self._member_returns()
        process = self.cluster.etcds[self._rng.randrange(ETCD_MEMBERS)].process
        assert process is not None
        self._stop(process.pid, 4.0)
        # A second member must not go while this one is away.
        await asyncio.gather(*self._waking)

    async def _member_returns(self) -> None:
        """Quorum first: a member that was killed is up again before the next one goes."""
        if self._down_member is None:
            return
        member = self.cluster.etcds[self._down_member]
        self._down_member = None
        member.launch()
        await member.wait_ready()

        async def knows_a_leader() -> bool:
            connection = Connection([member.endpoint])
            status = await connection.status()
            await connection.close()
            return status.leader != 0

        await self.cluster.until(knows_a_leader, "the etcd member is back")

    async def _stop_front_door(self) -> None:
        self._stop(self.cluster.children["frontdoor"].process.pid, 3.0)


async def soak(minutes: float, seed: int) -> int:
    """Run it all; gives the exit code."""
    folder = Path(tempfile.mkdtemp(prefix="raddle-soak-"))
    cluster = LocalCluster(
        folder, real_nodes=jobs.REAL_NODES, schedulers=SCHEDULERS, etcd_members=ETCD_MEMBERS
    )
    run = Soak(cluster, random.Random(seed))
    run.say(f"seed {seed}, {minutes:g} minutes, data and logs in {folder}")
    try:
        await run.start()
        end = asyncio.Event()
        serving = asyncio.create_task(run.serve(end))
        try:
            await run.strike(minutes * 60, serving)
            await run.serve_on(serving)
        finally:
            end.set()
            await asyncio.wait({serving})
        serving.result()
        await run.finish()
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is the finding
        run.wrong.append(f"{type(error).__name__}: {error}")
    finally:
        await cluster.stop()
    result = {
        "seed": seed,
        "minutes": minutes,
        "faults": dict(sorted(run.faults.items())),
        "rounds": run.rounds,
        "tokens_compared": run.tokens,
        "wrong": run.wrong,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    if run.wrong:
        run.say(f"WRONG: {run.wrong[0]}; data and logs are in {folder}")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser("soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    found = parser.parse_args()
    sys.exit(asyncio.run(soak(found.minutes, found.seed)))


if __name__ == "__main__":
    main()
