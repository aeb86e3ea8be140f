"""Log lines of both daemons in one recovery: each says which job, epoch and incident."""

from __future__ import annotations

import asyncio
import io
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from raddle.machines import load_machine
from raddle.model import keys
from raddle.sim.clock import VirtualClockLoop
from raddle.sim.cluster import SimulatedCluster
from raddle.sim.ranks import KILLED
from raddle.sim.rest import not_at_rest
from raddle.sim.users import Users
from raddle.telemetry.logging import configure_logging

UID = "j-0"


@pytest.fixture(scope="module")
def lines() -> Iterator[list[dict[str, Any]]]:
    """What was logged, as a process writes it, from the loss of a rank to the end."""
    output = io.StringIO()
    configure_logging("both", json_lines=True, stream=output)
    try:
        with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
            runner.run(_lose_a_rank(output))
        yield [json.loads(line) for line in output.getvalue().splitlines()]
    finally:
        structlog.contextvars.clear_contextvars()
        structlog.reset_defaults()


async def _lose_a_rank(output: io.StringIO) -> None:
    cluster = SimulatedCluster(load_machine("nvl72"), random.Random(1))

    def at_rest() -> bool:
        return not not_at_rest(cluster.backend, cluster.hosts, cluster.machine)

    try:
        await cluster.start()
        await Users(cluster, random.Random(1)).submit()
        await cluster.until(at_rest, "the job runs")
        output.truncate(0)
        output.seek(0)
        decode = [rank for rank in cluster.hosts.all() if rank.key.role == "decode"]
        cluster.hosts.end(decode[0], KILLED)
        await cluster.until(lambda: bool(cluster.backend.incidents()), "an incident")
        await cluster.until(at_rest, "the job runs again")
        assert cluster.backend.value(keys.job(UID)).epoch == 2
    finally:
        await cluster.stop()


def test_commits_name_jobs_epochs_and_incidents(lines: list[dict[str, Any]]) -> None:
    """The plan's commit names the job at its new epoch and the incident; so do those after it."""
    commits = [line for line in lines if line["event"] == "committed"]
    assert {"jobs": {UID: 2}, "incidents": ["i-000001"]}.items() <= commits[0].items()
    assert all(line.get("jobs", {UID: 2}) == {UID: 2} for line in commits)
    assert all(line.get("incidents") or line.get("jobs") for line in commits)
    assert all(line["revision"] > 0 for line in commits)


def test_an_agents_lines_about_ranks_name_job_epoch_and_incident(
    lines: list[dict[str, Any]],
) -> None:
    """The end of a rank, and every command to ranks, says of which job, epoch and incident."""
    (ended,) = [line for line in lines if line["event"] == "rank ended"]
    assert (ended["job_uid"], ended["epoch"], ended["rank"][:7]) == (UID, 1, "decode/")
    commands = [line for line in lines if line["event"] == "ranks commanded"]
    assert {line["command"] for line in commands} >= {"prepare", "live"}
    for line in commands:
        told = (line["job_uid"], line["epoch"], line["incident_id"])
        assert told == (UID, 2, "i-000001")
        assert line["ranks"]


def test_a_peers_word_names_who_lost_whom(lines: list[dict[str, Any]]) -> None:
    """A rank that lost a peer is named with its job and the peer's process."""
    lost = [line for line in lines if line["event"] == "rank lost a peer"]
    assert lost
    assert {line["job_uid"] for line in lost} == {UID}
    assert {line["reason"] for line in lost} == {"CONNECTION_BROKEN"}
    assert len({line["peer"] for line in lost}) == 1
