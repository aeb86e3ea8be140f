"""A leader and a standby that meet a record of a newer version than their own."""

from __future__ import annotations

import asyncio

import pytest

from raddle.model import keys
from raddle.scheduler.campaign import campaign
from raddle.scheduler.leader import Leader, Outdated
from raddle.store.election import Election, Probe, Term
from raddle.store.memory import MemoryStore
from raddle.store.protocol import Put, Record, Transaction
from raddle.v1 import job_pb2, scheduler_pb2, topology_pb2
from tests.scheduler.conftest import Served, refusal
from tests.support import eventually

NEWER = 99


async def newer_job(served: Served, name: str = "first") -> tuple[str, bytes]:
    """A job's key and its record as a newer version would write it, not yet stored."""
    job = await served.submit(name)
    record = await served.store.get(keys.job(job.uid))
    assert record is not None
    message = job_pb2.Job.FromString(record.value)
    message.schema_version = NEWER
    return record.key, message.SerializeToString()


async def store(served: Served, key: str, value: bytes) -> None:
    await served.store.commit(Transaction(writes=(Put(key, value),)))


async def test_a_leader_that_meets_a_newer_record_ends_its_term(served: Served) -> None:
    """At once, without anything to decide."""
    await store(served, *await newer_job(served))
    with pytest.raises(Outdated, match="newer schema"):
        await asyncio.wait_for(served.leading, 10.0)


async def test_nothing_is_written_beside_a_newer_record(served: Served) -> None:
    """A decision that is made as the record comes is not carried out, whatever it is about."""
    # As the mirror leaves it, but before anybody is woken: the term has not ended yet.
    served.mirror.too_new["jobs/j-newer"] = "of a newer schema"
    request = scheduler_pb2.CordonRequest(subject="sn0/n01", message="")
    await refusal(served.stub().Cordon(request, timeout=10.0))
    with pytest.raises(Outdated, match="not written over"):
        await asyncio.wait_for(served.leading, 10.0)
    assert not [key for key in served.backend.records if key.startswith(keys.HOLDS)]


async def test_a_newer_record_of_an_agent_is_set_aside(served: Served) -> None:
    """The leader never writes it: that node alone is unknown to it, and it leads on."""
    registration = topology_pb2.AgentRegistration(node="sn0/n01", schema_version=NEWER)
    await store(served, keys.registration("sn0/n01"), registration.SerializeToString())
    await eventually(lambda: bool(served.mirror.set_aside), "the record is set aside")
    await served.submit("after")
    assert served.mirror.too_new == {}
    assert not served.leading.done()


async def test_a_standby_does_not_take_the_lead_over_a_newer_record(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stood by before the record was there; the lead that becomes free is not for it."""

    async def probe(_record: Record) -> Probe:
        return Probe.GONE if served.leading.done() else Probe.ALIVE

    async def leads(leader: Leader | None) -> None:
        assert leader is None

    def make(_term: Term) -> Leader:
        raise AssertionError("it took the lead")

    standby = MemoryStore(served.backend)
    election = Election(standby, b"standby", probe)
    waiting = asyncio.create_task(campaign(standby, served.mirror, election, make, leads))
    said: list[str] = []

    def refused() -> bool:
        said.append(capsys.readouterr().out)
        return "must not lead" in "".join(said)

    await store(served, *await newer_job(served))
    await eventually(refused, "the standby refuses to lead")
    with pytest.raises(Outdated):
        await asyncio.wait_for(served.leading, 10.0)
    assert not waiting.done()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
