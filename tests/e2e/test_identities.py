"""The whole cluster under certificates: it works, and foreign identities change nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest

from raddle.model.errors import Reason
from raddle.telemetry.channels import make_channel
from raddle.telemetry.tls import RANK_NAME, TlsFiles
from raddle.v1 import (
    engine_pb2,
    engine_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
    types_pb2,
)
from raddle.wire.status import error_from
from tests.certificates import Authority
from tests.e2e.served import CLOSED, Served, serving

IDENTITIES = ("scheduler", "client/admin", "client/team", "rank", "frontdoor", "agent/*")


async def refused(call: Any) -> Reason:
    """The reason of a call's refusal."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from(caught.value).reason


def refusals(*logs: Path) -> list[dict[str, Any]]:
    """The lines that tell of a refusal."""
    lines = [line for log in logs for line in log.read_text().splitlines()]
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [line for line in found if line["event"] == "refused"]


def scheduler_stub(served: Served, tls: TlsFiles | None, number: int = 0) -> Any:
    address = served.cluster.addresses[number]
    return scheduler_pb2_grpc.SchedulerStub(make_channel(address, tls=tls))


async def _foreign_identities_are_refused(served: Served, authority: Authority) -> None:
    """At the scheduler: verbs, foreign nodes, no certificate, an expired one, another CA."""
    leader = await served.leader_number()
    team = scheduler_stub(served, authority.files("client-team"), leader)
    cordon = scheduler_pb2.CordonRequest(subject="sn0/n05")
    assert await refused(team.Cordon(cordon, timeout=5.0)) is Reason.PERMISSION_DENIED
    inject = scheduler_pb2.InjectFaultRequest(subject="sn0/n05/npu0/die0", code="80E18005")
    assert await refused(team.InjectFault(inject, timeout=5.0)) is Reason.PERMISSION_DENIED
    agent = scheduler_stub(served, authority.files("agent-sn0-n00"), leader)

    async def reports() -> Any:
        yield scheduler_pb2.ReportStatsRequest(node="sn0/n01", job_uid=served.uid)

    assert await refused(agent.ReportStats(reports())) is Reason.PERMISSION_DENIED
    cancel = scheduler_pb2.CancelJobRequest(job_uid=served.uid)
    assert await refused(agent.CancelJob(cancel, timeout=5.0)) is Reason.PERMISSION_DENIED
    await _front_doors_and_ranks_do_only_their_own(served, authority, leader)
    told = refusals(served.cluster.log_of(f"scheduler-{leader}"))
    for expected in (
        {"identity": "client/team", "verb": "admin", "namespace": ""},
        {"identity": "agent/sn0/n00", "verb": "report", "node": "sn0/n01"},
        {"identity": "agent/sn0/n00", "verb": "write", "namespace": "default"},
        {"identity": "frontdoor", "verb": "write", "namespace": "default"},
        {"identity": "frontdoor", "verb": "report", "namespace": ""},
        {"identity": "rank", "verb": "read", "namespace": ""},
        {"identity": "rank", "verb": "report", "namespace": ""},
        {"identity": "client/team", "verb": "route", "namespace": "default"},
    ):
        assert any(expected.items() <= line.items() for line in told), (expected, told)
    other = Authority(authority.folder.parent / "other").issue("client/admin")
    foreign = TlsFiles(authority.folder / "ca.crt", other.certificate, other.key)
    strangers = [None, authority.files("expired"), foreign]
    for files in strangers:
        stranger = scheduler_stub(served, files, leader)
        status = scheduler_pb2.GetStatusRequest()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stranger.GetStatus(status, timeout=3.0)
        assert caught.value.code() in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )


async def _front_doors_and_ranks_do_only_their_own(
    served: Served, authority: Authority, leader: int
) -> None:
    """A front door submits, ends and lists nothing; a rank may not even ask who leads."""
    drain = scheduler_pb2.CreateMaintenanceRequest(subject="sn0/n05")

    async def reports() -> Any:
        yield scheduler_pb2.ReportStatsRequest(node="sn0/n01")

    for name in ("frontdoor", "rank"):
        stub = scheduler_stub(served, authority.files(name), leader)
        calls = [
            stub.GetStatus(scheduler_pb2.GetStatusRequest(), timeout=5.0),
            stub.ListJobs(scheduler_pb2.ListJobsRequest(), timeout=5.0),
            stub.ListNodes(scheduler_pb2.ListNodesRequest(), timeout=5.0),
            stub.CancelJob(scheduler_pb2.CancelJobRequest(job_uid=served.uid), timeout=5.0),
            stub.SubmitJob(scheduler_pb2.SubmitJobRequest(), timeout=5.0),
            stub.CreateMaintenance(drain, timeout=5.0),
            stub.ReportStats(reports()),
        ]
        for call in calls:
            assert await refused(call) is Reason.PERMISSION_DENIED
    for name in ("client-team", "rank"):
        channel = make_channel(served.cluster.addresses[leader], tls=authority.files(name))
        watch = router_pb2.WatchRoutesRequest(job_uid=served.uid)
        routes = router_pb2_grpc.RouterStub(channel).WatchRoutes(watch, timeout=5.0)
        assert await refused(routes.read()) is Reason.PERMISSION_DENIED
        await channel.close()


def quiesce(job_uid: str, epoch: int) -> engine_pb2.QuiesceRequest:
    return engine_pb2.QuiesceRequest(fence=types_pb2.Fence(job_uid=job_uid, epoch=epoch))


async def _ranks_hear_only_their_own(served: Served, authority: Authority) -> None:
    """At a rank: commands from another node's agent, from a client, and of a forged epoch."""
    members = [r for r in (await served.job()).ranks if r.role == "decode"]
    rank = members[0]
    node = "/".join(rank.die.split("/")[:2])
    forged = quiesce(served.uid, 99)
    foreign = "agent-sn0-n01" if node == "sn0/n00" else "agent-sn0-n00"
    for name in (foreign, "client-team", "scheduler", "rank", "frontdoor"):
        channel = make_channel(
            rank.engine_address, tls=authority.files(name), server_name=RANK_NAME
        )
        engine = engine_pb2_grpc.EngineStub(channel)
        assert await refused(engine.Quiesce(forged, timeout=5.0)) is Reason.PERMISSION_DENIED
        await channel.close()
    own = authority.files(f"agent-{node.replace('/', '-')}")
    channel = make_channel(rank.engine_address, tls=own, server_name=RANK_NAME)
    engine = engine_pb2_grpc.EngineStub(channel)
    old = quiesce(served.uid, 0)
    assert await refused(engine.Quiesce(old, timeout=5.0)) is Reason.STALE_EPOCH
    stranger = quiesce("j-other", 9)
    assert await refused(engine.Quiesce(stranger, timeout=5.0)) is Reason.WRONG_JOB
    await channel.close()
    fence = types_pb2.Fence(job_uid=served.uid, epoch=1)
    generate = reference_pb2.GenerateRequest(fence=fence, prompt_tokens=[1], max_tokens=1)
    has = reference_pb2.HasBlocksRequest(fence=fence)
    for name in (f"agent-{node.replace('/', '-')}", "client-team", "rank"):
        files = authority.files(name)
        channel = make_channel(rank.engine_address, tls=files, server_name=RANK_NAME)
        tokens = reference_pb2_grpc.ReferenceRankStub(channel)
        answer = tokens.Generate(generate, timeout=5.0)
        assert await refused(answer.read()) is Reason.PERMISSION_DENIED
        await channel.close()
    for name in ("frontdoor", "client-team"):
        files = authority.files(name)
        channel = make_channel(rank.engine_address, tls=files, server_name=RANK_NAME)
        pool = reference_pb2_grpc.PoolMemberStub(channel)
        assert await refused(pool.HasBlocks(has, timeout=5.0)) is Reason.PERMISSION_DENIED
        await channel.close()
    await asyncio.to_thread(_expert_traffic_is_refused, rank.data_address, authority)
    told = refusals(*served.cluster.folder.glob("state/*/ranks/*/*/*/rank.log"))
    owner, quiesced = f"agent/{node}", "/raddle.v1.Engine/Quiesce"
    askers = (owner, "client/team", "rank")
    lines: list[dict[str, Any]] = [
        {"identity": foreign.replace("-", "/"), "call": quiesced},
        {"identity": "client/team", "call": quiesced},
        *({"identity": name, "call": quiesced} for name in ("scheduler", "rank", "frontdoor")),
        {"identity": owner, "call": "Quiesce", "reason": "STALE_EPOCH", "epoch": 0},
        {"identity": owner, "call": "Quiesce", "reason": "WRONG_JOB", "job": "j-other"},
        *({"identity": name, "call": "/raddle.v1.ReferenceRank/Generate"} for name in askers),
        {"identity": "frontdoor", "call": "/raddle.v1.PoolMember/HasBlocks"},
        {"identity": "client/team", "call": "expert traffic"},
        {"identity": "frontdoor", "call": "expert traffic"},
        {"identity": "agent/sn0/n00", "call": "expert traffic", "why": "frame of another job"},
    ]
    for expected in lines:
        assert any(expected.items() <= line.items() for line in told), (expected, told)
    # Who shows no certificate has no name: where it called from is told.
    unnamed = [line for line in told if line["call"] == "expert traffic" and not line["identity"]]
    assert all(line["address"].startswith("127.0.0.1:") for line in unnamed)
    assert unnamed


def _answers(connection: socket.socket) -> bool:
    """Does the other side answer a frame with a frame?"""
    try:
        connection.sendall(b"RDXP" + bytes(60))
        return connection.recv(100).startswith(b"RDXP")
    except OSError:
        return False


def _expert_traffic_is_refused(address: str, authority: Authority) -> None:
    """A client's certificate, or none, is no way into the expert traffic."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 5.0) as plain:
        assert not _answers(plain)
    for name in ("client-team", "frontdoor"):
        context = authority.files(name).socket_context(server=False)
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host, int(port)), 5.0) as plain,
            context.wrap_socket(plain, server_hostname=RANK_NAME) as secured,
        ):
            assert not _answers(secured)
    for name in ("agent-sn0-n00", "rank"):
        context = authority.files(name).socket_context(server=False)
        with (
            socket.create_connection((host, int(port)), 5.0) as plain,
            context.wrap_socket(plain, server_hostname=RANK_NAME) as secured,
        ):
            assert _answers(secured), "not even a rank's frame is answered"


@pytest.mark.timeout(180)
async def test_the_cluster_under_certificates(tmp_path: Path) -> None:
    """Under TLS a killed rank costs no token, and nobody does what is another's."""
    authority = Authority(tmp_path / "certificates")
    for identity in IDENTITIES:
        authority.issue(identity)
    for number in range(4):
        authority.issue(f"agent/sn0/n{number:02d}")
    authority.issue("client/admin", expired=True, name="expired")
    async with serving(tmp_path / "cluster", certificates=authority.folder) as served:
        await _foreign_identities_are_refused(served, authority)
        await _ranks_hear_only_their_own(served, authority)
        assert (await served.job()).job.epoch == 1

        async def kill_rank() -> None:
            await served.kill_decode_rank()
            await served.ready_at(2)

        await served.same_tokens_while(kill_rank)
        assert all(incident.phase == CLOSED for incident in await served.incidents())


async def test_a_standby_forwards_calls_and_names_the_leader_to_streams(tmp_path: Path) -> None:
    """Under TLS a standby answers unary calls for their callers; streams learn who leads."""
    authority = Authority(tmp_path / "certificates")
    for identity in IDENTITIES:
        authority.issue(identity)
    for number in range(4):
        authority.issue(f"agent/sn0/n{number:02d}")
    async with serving(tmp_path / "cluster", certificates=authority.folder) as served:
        standby = 1 - await served.leader_number()
        admin = scheduler_stub(served, authority.files("client-admin"), standby)
        hold = await admin.Cordon(scheduler_pb2.CordonRequest(subject="sn0/n03"), timeout=5.0)
        assert hold.hold.created_by == "client/admin"
        team = scheduler_stub(served, authority.files("client-team"), standby)
        uncordon = scheduler_pb2.UncordonRequest(subject="sn0/n03")
        assert await refused(team.Uncordon(uncordon, timeout=5.0)) is Reason.PERMISSION_DENIED
        stream = admin.WatchJobs(scheduler_pb2.WatchJobsRequest(), timeout=5.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        error = error_from(caught.value)
        assert error.reason is Reason.NOT_LEADER
        assert error.details["leader_address"] == served.cluster.addresses[1 - standby]
