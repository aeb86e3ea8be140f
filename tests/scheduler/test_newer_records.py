"""A leader that meets a record of a newer version than its own."""

from __future__ import annotations

import asyncio

import pytest

from raddle.model import keys
from raddle.scheduler.leader import Deposed
from raddle.store.protocol import Put, Transaction
from raddle.v1 import job_pb2, scheduler_pb2
from tests.scheduler.conftest import Served, refusal


async def test_a_leader_does_not_write_over_a_newer_record(served: Served) -> None:
    """Its term ends at once, and a change under way leaves the newer record as it is."""
    job = await served.submit("first")
    key = keys.job(job.uid)
    record = await served.store.get(key)
    assert record is not None
    message = job_pb2.Job.FromString(record.value)
    message.schema_version = 99
    newer = message.SerializeToString()
    await served.store.commit(Transaction(writes=(Put(key, newer),)))
    request = scheduler_pb2.CancelJobRequest(job_uid=job.uid)
    await refusal(served.stub().CancelJob(request, timeout=10.0))
    with pytest.raises(Deposed, match="newer schema"):
        await asyncio.wait_for(served.leading, 10.0)
    record = await served.store.get(key)
    assert record is not None
    assert record.value == newer
