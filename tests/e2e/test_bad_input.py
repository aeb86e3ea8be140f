"""Bad input and bad neighbours, over the wire: a clear error, and nothing changes."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from raddle.cli.cluster import LocalCluster
from raddle.cli.session import EXIT_DEADLINE, EXIT_UNAVAILABLE
from raddle.model import keys
from raddle.model.errors import RaddleError, Reason
from raddle.model.health import AgentAcks
from raddle.store.embedded import find_etcd
from raddle.store.etcd.store import EtcdStore
from raddle.store.protocol import Put, Transaction
from raddle.v1 import job_pb2, scheduler_pb2, topology_pb2
from raddle.wire import records
from raddle.wire.codec import to_message
from raddle.wire.parse import job_message
from raddle.wire.status import error_from
from tests.e2e.served import CLOSED, SMALL_MACHINE, serving

JOB = """
name: small
model: {config: raddle-demo, kv_block_tokens: 16}
roles:
  - {name: decode, kind: decode, ranks: 6, slots_per_rank: 10, engine: {driver: simulated}}
"""


class Simulated:
    """A cluster of simulated nodes and its store."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.store = EtcdStore([cluster.etcd_endpoints], "default", operation_key="operations/test")

    @property
    def stub(self) -> Any:
        return self.cluster.stub

    def spec(self) -> job_pb2.JobSpec:
        return job_message(JOB, self.cluster.folder)

    async def submit(self, spec: job_pb2.JobSpec, **more: Any) -> Any:
        request = scheduler_pb2.SubmitJobRequest(spec=spec, **more)
        return (await self.stub.SubmitJob(request, timeout=10.0)).job

    async def content(self) -> dict[str, bytes]:
        """What the store holds, but for what agents and the leader say of themselves."""
        records = (await self.store.list("")).records
        own = (keys.AGENTS, keys.OPERATIONS, keys.LEADER)
        return {r.key: r.value for r in records if not r.key.startswith(own)}

    async def ready(self, uid: str) -> None:
        async def is_ready() -> bool:
            job = await self.stub.GetJob(scheduler_pb2.GetJobRequest(job_uid=uid), timeout=5.0)
            return bool(job.job.state == job_pb2.JOB_STATE_READY)

        await self.cluster.until(is_ready, "the job is ready")


@pytest.fixture
async def simulated(tmp_path: Path) -> AsyncIterator[Simulated]:
    cluster = LocalCluster(tmp_path, machine=SMALL_MACHINE, etcd_quota_bytes=16 * 1024**2)
    try:
        await cluster.start()
        found = Simulated(cluster)
        yield found
        await found.store.close()
    finally:
        await cluster.stop()


async def refusal(call: Any) -> tuple[grpc.StatusCode, Reason, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = error_from(caught.value)
    return caught.value.code(), error.reason, error.message


REFUSALS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
)
Change = Callable[[job_pb2.JobSpec], None]


def _set(path: str, value: Any) -> Change:
    """Set a field of the spec, or of its first role (`role.ranks`)."""

    def change(spec: job_pb2.JobSpec) -> None:
        target: Any = spec
        *parts, last = path.split(".")
        for part in parts:
            target = spec.roles[0] if part == "role" else getattr(target, part)
        setattr(target, last, value)

    return change


def _set_config(**values: Any) -> Change:
    """Set fields of the model's config."""

    def change(spec: job_pb2.JobSpec) -> None:
        spec.model.config = json.dumps(json.loads(spec.model.config) | values)

    return change


BAD_SPECS: dict[str, tuple[Change, Reason, str]] = {
    "no name": (_set("name", ""), Reason.INVALID_NAME, "name"),
    "a path as name": (_set("name", "../x"), Reason.INVALID_NAME, "name"),
    "a slash in the name": (_set("name", "a/b"), Reason.INVALID_NAME, "name"),
    "control characters": (_set("name", "a\x1b[2J"), Reason.INVALID_ARGUMENT, "name"),
    "a newline in the queue": (_set("queue", "q\nq"), Reason.INVALID_ARGUMENT, "queue"),
    "a bad namespace": (_set("namespace", "A_B"), Reason.INVALID_NAME, "namespace"),
    "zero ranks": (_set("role.ranks", 0), Reason.INVALID_ARGUMENT, "ranks"),
    "negative ranks": (_set("role.ranks", -4), Reason.INVALID_ARGUMENT, "ranks"),
    "negative instances": (_set("role.instances", -1), Reason.INVALID_ARGUMENT, "instances"),
    "more ranks than dies": (_set("role.ranks", 512), Reason.DOES_NOT_FIT, "ranks"),
    "slots below experts": (_set("role.slots_per_rank", 1), Reason.DOES_NOT_FIT, "slots"),
    "no model": (_set("model.config", ""), Reason.INVALID_ARGUMENT, "model.config"),
    "a model that is no JSON": (_set("model.config", "{"), Reason.INVALID_ARGUMENT, "config"),
    "a model of no shape": (_set("model.config", "{}"), Reason.INVALID_ARGUMENT, "config"),
    "a negative pause": (
        lambda spec: spec.recovery.max_pause.FromSeconds(-5),
        Reason.INVALID_ARGUMENT,
        "max_pause",
    ),
    "a running rank": (
        _set("role.engine.attach", True),
        Reason.ENGINE_UNSUPPORTED,
        "attach",
    ),
    "masking": (
        _set("recovery.allow_masking", True),
        Reason.ENGINE_UNSUPPORTED,
        "allow_masking",
    ),
    "negative layers": (_set("model.mtp_layers", -5), Reason.INVALID_ARGUMENT, "mtp_layers"),
    "an unknown driver": (
        _set("role.engine.driver", "magic"),
        Reason.INVALID_ARGUMENT,
        "driver",
    ),
}


async def test_bad_specs_change_nothing(simulated: Simulated) -> None:
    """Each bad spec gets a reason and names its field; the store is as before."""
    before = await simulated.content()
    for name, (change, reason, word) in BAD_SPECS.items():
        spec = simulated.spec()
        change(spec)
        code, got, message = await refusal(simulated.submit(spec))
        assert got is reason, (name, got, message)
        assert code in REFUSALS, name
        assert word in message, (name, message)
    dense = simulated.spec()
    config = json.loads(dense.model.config)
    dense.model.config = json.dumps({k: v for k, v in config.items() if "expert" not in k})
    _, got, message = await refusal(simulated.submit(dense))
    assert got is Reason.INVALID_ARGUMENT
    assert "expert" in message
    assert await simulated.content() == before


POISONED_SPECS: dict[str, Change] = {
    "a config nested without end": _set("model.config", "[" * 100_000),
    "layers without end": _set_config(
        num_hidden_layers=10_000_000, mlp_only_layers=[-1] * 30_000, n_routed_experts=8
    ),
    "a pause beyond what can be written": _set("recovery.max_pause.seconds", 2**63 - 1),
    "a pause beyond what can be shown": _set("recovery.max_pause.seconds", 2**62),
}


async def test_no_request_ends_the_scheduler(simulated: Simulated) -> None:
    """What once killed or stalled the leader is refused by name; the same process answers on."""
    stub, leader = simulated.stub, simulated.cluster.children["scheduler-0"].process.pid
    before = await simulated.content()
    for name, change in POISONED_SPECS.items():
        spec = simulated.spec()
        change(spec)
        for dry_run in (True, False):
            code, reason, message = await refusal(simulated.submit(spec, dry_run=dry_run))
            assert (code, reason) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                Reason.INVALID_ARGUMENT,
            ), (name, message)
    drain = scheduler_pb2.CreateMaintenanceRequest(subject="sn0/n00")
    for seconds in (2**63 - 1, 2**62, -5):
        drain.timeout.seconds = seconds
        _, reason, message = await refusal(stub.CreateMaintenance(drain, timeout=5.0))
        assert reason is Reason.INVALID_ARGUMENT, message
        assert "timeout" in message
    huge = scheduler_pb2.ApplySuperNodeRequest(
        supernode=to_message(simulated.cluster.supernode, topology_pb2.SuperNode)
    )
    huge.supernode.name, huge.supernode.machine = "sn1", "a\x1b[31m\n" + "x" * 3_000
    _, reason, message = await refusal(stub.ApplySuperNode(huge, timeout=5.0))
    assert reason is Reason.INVALID_ARGUMENT, message
    assert await simulated.content() == before
    await simulated.ready((await simulated.submit(simulated.spec())).uid)
    simulated.cluster.check_children()
    assert simulated.cluster.children["scheduler-0"].process.pid == leader


async def test_bad_calls_change_nothing(simulated: Simulated) -> None:
    """Duplicates, stale generations, immutable fields, foreign owners, messages too big."""
    stub = simulated.stub
    job = await simulated.submit(simulated.spec(), idempotency_key="k")
    await simulated.ready(job.uid)
    again = await simulated.submit(simulated.spec(), idempotency_key="k")
    assert again.uid == job.uid
    owned = simulated.spec()
    owned.name = "owned"
    owner = await simulated.submit(owned, managed_by="operator")
    await simulated.ready(owner.uid)
    before = await simulated.content()
    other = simulated.spec()
    other.priority = 7
    nameless = simulated.spec()
    nameless.roles[0].kind = ""
    calls: list[tuple[Any, Reason]] = [
        (simulated.submit(simulated.spec()), Reason.ALREADY_EXISTS),
        (simulated.submit(other, idempotency_key="k"), Reason.IDEMPOTENCY_KEY_REUSED),
        (_scale(stub, job.uid, ranks=8, expected_generation=9), Reason.STALE_GENERATION),
        (_scale(stub, job.uid, ranks=-1), Reason.INVALID_ARGUMENT),
        (_scale(stub, job.uid, ranks=8, instances=2), Reason.INVALID_ARGUMENT),
        (_scale(stub, job.uid, role="nobody", ranks=8), Reason.NOT_FOUND),
        (_scale(stub, "j-nobody", ranks=8), Reason.NOT_FOUND),
        (_update(stub, job.uid, other, "model"), Reason.IMMUTABLE_FIELD),
        (_update(stub, job.uid, nameless, "priority"), Reason.INVALID_ARGUMENT),
        (_update(stub, owner.uid, other, "priority"), Reason.MANAGED_BY_OTHER),
        (stub.Cordon(scheduler_pb2.CordonRequest(subject="../x")), Reason.INVALID_ARGUMENT),
        (stub.Cordon(scheduler_pb2.CordonRequest(subject="sn0/n99")), Reason.NOT_FOUND),
        (stub.Uncordon(scheduler_pb2.UncordonRequest(subject="sn0/n01")), Reason.NOT_FOUND),
        (stub.GetIncident(scheduler_pb2.GetIncidentRequest(id="i-9")), Reason.NOT_FOUND),
        (stub.DeleteJob(scheduler_pb2.DeleteJobRequest(job_uid=job.uid)), Reason.NOT_ENDED),
    ]
    for call, reason in calls:
        _, got, message = await refusal(call)
        assert got is reason, (got, message)
    huge = simulated.spec()
    huge.model.config = " " * (20 * 1024 * 1024)
    code, _, _ = await refusal(simulated.submit(huge))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await simulated.content() == before


def _scale(stub: Any, uid: str, role: str = "decode", **more: Any) -> Any:
    request = scheduler_pb2.ScaleJobRequest(job_uid=uid, role=role, **more)
    return stub.ScaleJob(request, timeout=5.0)


def _update(stub: Any, uid: str, spec: job_pb2.JobSpec, path: str) -> Any:
    request = scheduler_pb2.UpdateJobRequest(job_uid=uid, spec=spec)
    request.update_mask.paths.append(path)
    return stub.UpdateJob(request, timeout=5.0)


async def test_corrupted_records_are_set_aside(simulated: Simulated) -> None:
    """Garbage in the store is counted and told; the leader goes on, and so does the next one."""
    job = await simulated.submit(simulated.spec())
    await simulated.ready(job.uid)
    # Said under the name of one node, of another one's ranks and another job.
    foreign = AgentAcks(node="sn0/n02", job_uid=job.uid)
    foreign_key = keys.acks("sn0/n01", "j-foreign")
    garbage = (
        Put(foreign_key, records.encode(foreign_key, foreign)),
        Put(keys.job("j-broken"), b"\xff\xfe\x00garbage"),
        Put(keys.incident("i-000077"), b"{}"),
        Put(keys.acks("sn0/n01", "j-broken"), b"\xff\xff\xff"),
        Put("nonsense/key", b"\x01"),
    )
    await simulated.store.commit(Transaction(writes=garbage))

    async def told() -> bool:
        request = scheduler_pb2.GetStatusRequest()
        return bool((await simulated.stub.GetStatus(request)).records_set_aside == len(garbage))

    await simulated.cluster.until(told, "the garbage is counted")
    child = simulated.cluster.children.pop("scheduler-0")
    child.process.kill()
    child.process.wait()
    simulated.cluster.start_scheduler(0)
    await simulated.cluster.until(told, "the next leader counts it too")
    second = simulated.spec()
    second.name = "second"
    await simulated.ready((await simulated.submit(second)).uid)
    await simulated.ready(job.uid)
    log = (simulated.cluster.folder / "logs" / "scheduler-0.log").read_text()
    assert "record set aside" in log
    assert "j-broken" in log
    assert f"{foreign_key} speaks of {keys.acks('sn0/n02', job.uid)}" in log
    request = scheduler_pb2.GetJobRequest(job_uid=job.uid)
    assert (await simulated.stub.GetJob(request, timeout=5.0)).job.epoch == 1


async def test_a_record_of_a_newer_schema_is_not_led_over(simulated: Simulated) -> None:
    """A replica that would drop fields of a newer record refuses to lead, and says which."""
    job = await simulated.submit(simulated.spec())
    record = await simulated.store.get(keys.job(job.uid))
    assert record is not None
    message = job_pb2.Job.FromString(record.value)
    message.schema_version = 99
    await simulated.store.commit(
        Transaction(writes=(Put(record.key, message.SerializeToString()),))
    )
    child = simulated.cluster.children.pop("scheduler-0")
    child.process.kill()
    child.process.wait()
    simulated.cluster.start_scheduler(0)
    log = simulated.cluster.folder / "logs" / "scheduler-0.log"

    async def refused() -> bool:
        return "must not lead" in log.read_text()

    await simulated.cluster.until(refused, "the replica refuses to lead")
    assert keys.job(job.uid) in log.read_text()


def raddle(cluster: LocalCluster, *arguments: str, timeout: str = "2") -> Any:
    """Run the command line."""
    command = [sys.executable, "-m", "raddle.cli.main", "--server", cluster.addresses[0]]
    return subprocess.run(
        [*command, "--timeout", timeout, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_a_dead_etcd_is_waited_for_and_told(simulated: Simulated) -> None:
    """With etcd stopped a command waits until its deadline and says so; later it is done once."""
    etcd = simulated.cluster.etcds[0].process
    assert etcd is not None
    path = simulated.cluster.folder / "job.yaml"
    path.write_text(JOB)
    etcd.send_signal(signal.SIGSTOP)
    try:
        submit = ("submit", str(path), "--idempotency-key", "k")
        done = await asyncio.to_thread(raddle, simulated.cluster, *submit)
        assert done.returncode in (EXIT_DEADLINE, EXIT_UNAVAILABLE), done
        assert "store" in done.stderr, done.stderr
        assert done.stdout == ""
    finally:
        etcd.send_signal(signal.SIGCONT)
    again = await asyncio.to_thread(raddle, simulated.cluster, *submit, timeout="20")
    assert again.returncode == 0, again.stderr
    jobs = (await simulated.stub.ListJobs(scheduler_pb2.ListJobsRequest())).jobs
    assert len(jobs) == 1


async def test_a_full_etcd_is_told(simulated: Simulated) -> None:
    """An etcd out of space refuses new jobs with STORE_FULL and what to do; what runs goes on."""
    job = await simulated.submit(simulated.spec())
    await simulated.ready(job.uid)
    block = b"x" * 1_000_000

    async def fill() -> None:
        for number in range(64):
            await simulated.store.commit(Transaction(writes=(Put(f"ballast/{number}", block),)))

    with pytest.raises(RaddleError) as caught:
        await fill()
    assert caught.value.reason is Reason.STORE_FULL
    second = simulated.spec()
    second.name = "second"
    _, got, message = await refusal(simulated.submit(second))
    assert got is Reason.STORE_FULL, message
    assert "space" in message
    await simulated.ready(job.uid)
    status = await simulated.stub.GetStatus(scheduler_pb2.GetStatusRequest(), timeout=5.0)
    assert status.leader_identity == "scheduler-0"


def etcdctl(endpoint: str, *arguments: str) -> None:
    """What an operator does to etcd, with the tool that comes with it."""
    program = find_etcd().path.parent / "etcdctl"
    command = [str(program), "--endpoints", endpoint, *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


async def test_a_rank_that_dies_while_etcd_is_full_is_recovered_later(tmp_path: Path) -> None:
    """Nothing can be decided; once there is room the rank is recovered, and no token is lost."""
    async with serving(tmp_path, etcd_quota_bytes=16 * 1024**2) as served:
        (endpoint,) = served.cluster.etcd_endpoints.split(",")
        store = EtcdStore([endpoint], "default", operation_key="operations/test")

        async def fill() -> None:
            while True:
                await store.commit(Transaction(writes=(Put("ballast", b"x" * 1_000_000),)))

        async def refused() -> bool:
            logs = (served.cluster.folder / "logs").glob("agent-*.log")
            return any("STORE_FULL" in log.read_text() for log in logs)

        async def kill_while_full() -> None:
            with pytest.raises(RaddleError) as caught:
                await fill()
            assert caught.value.reason is Reason.STORE_FULL
            await served.kill_decode_rank()
            await served.cluster.until(refused, "an agent cannot tell that its rank is dead")
            assert (await served.job()).job.epoch == 1
            revision = (await store.list("ballast")).revision
            for step in (("compaction", str(revision)), ("defrag",), ("alarm", "disarm")):
                await asyncio.to_thread(etcdctl, endpoint, *step)
            await served.ready_at(2)

        await served.same_tokens_while(kill_while_full)
        assert all(incident.phase == CLOSED for incident in await served.incidents())
        await store.close()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """The state folder of the first real agent, on a file system of 64 KiB."""
    state = tmp_path / "state" / "agent-sn0-n00"
    state.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(state)]
    subprocess.run(mount, check=True, timeout=10)
    yield state
    subprocess.run(["umount", "-l", str(state)], check=True, timeout=10)


async def test_a_full_disk_under_an_agent_is_told(tmp_path: Path, tiny_disk: Path) -> None:
    """Ranks that cannot be started for want of space are told with the reason; nothing crashes."""
    cluster = LocalCluster(tmp_path, machine=SMALL_MACHINE, real_nodes=1)
    try:
        await cluster.start()
        spec = job_message(JOB.replace("simulated", "reference"), tmp_path)
        answer = await cluster.stub.SubmitJob(
            scheduler_pb2.SubmitJobRequest(spec=spec), timeout=10.0
        )
        uid = answer.job.uid

        async def told() -> bool:
            request = scheduler_pb2.GetJobRequest(job_uid=uid)
            job = await cluster.stub.GetJob(request, timeout=5.0)
            words = [job.job.why.message, *(rank.message for rank in job.ranks)]
            return any("No space left" in text for text in words)

        await cluster.until(told, "the job says that the disk is full")
        cluster.check_children()
    finally:
        await cluster.stop()
