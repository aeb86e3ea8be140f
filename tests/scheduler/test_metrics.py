"""What a scheduler counts, as Prometheus reads it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from prometheus_client import generate_latest

from raddle.model import keys
from raddle.model.incident import Incident, IncidentPhase, InstancePlan, JobPlan
from raddle.model.kinds import HoldKind, RecoveryKind
from raddle.scheduler.metrics import Metrics
from raddle.scheduler.mirror import Mirror
from raddle.store.memory import MemoryBackend, MemoryStore
from raddle.store.protocol import Delete, Put, Transaction
from tests.support import eventually


async def test_records_that_cannot_be_read_are_counted() -> None:
    """The gauge follows records that are set aside, and those that are mended or deleted."""
    backend, metrics = MemoryBackend(), Metrics()
    mirror = Mirror(MemoryStore(backend))
    metrics.follow(mirror)

    def shows(count: int) -> bool:
        line = f"raddle_records_set_aside {count:.1f}"
        return line in generate_latest(metrics.registry).decode().splitlines()

    following = asyncio.create_task(mirror.run())
    try:
        assert shows(0)
        names = [keys.hold(f"sn0/n0{number}", HoldKind.CORDON) for number in range(2)]
        backend.commit(Transaction(writes=tuple(Put(name, b"\xff\xff") for name in names)))
        await eventually(lambda: shows(2), "two are set aside")
        backend.commit(Transaction(writes=(Delete(names[0]),)))
        await eventually(lambda: shows(1), "one is left")
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


def value(metrics: Metrics, name: str) -> float:
    """One line of what Prometheus reads."""
    lines = generate_latest(metrics.registry).decode().splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} "))


def test_an_incident_counts_once_when_it_closes_and_once_when_its_sequences_are_back() -> None:
    """Its record changes again after it closed: no number is counted twice."""
    metrics, key = Metrics(), keys.incident("i-1")
    part = InstancePlan(
        option=RecoveryKind.REMAP,
        sequences_restored=1,
        kv_tokens_restored=90,
        kv_median_predicted=0.1,
        kv_last_predicted=0.25,
    )
    for phase, back_s in (("REPAIR", 0.0), ("CLOSED", 0.0), ("CLOSED", 0.5), ("CLOSED", 0.5)):
        seen = replace(part, kv_median_actual=back_s, kv_last_actual=back_s)
        plan = JobPlan(job_uid="j", epoch=2, instances=(seen,))
        incident = Incident(id="i-1", phase=IncidentPhase(phase), plans=(plan,))
        metrics.record_changed(key, incident, 1)
    assert value(metrics, "raddle_incidents_total") == 1
    assert value(metrics, 'raddle_incident_kv_tokens_sum{way="restored"}') == 90
    times = {
        (of, time): value(
            metrics, f'raddle_incident_kv_back_seconds_sum{{of="{of}",time="{time}"}}'
        )
        for of in ("median", "last")
        for time in ("predicted", "actual")
    }
    assert times == {
        ("median", "predicted"): 0.1,
        ("median", "actual"): 0.5,
        ("last", "predicted"): 0.25,
        ("last", "actual"): 0.5,
    }
    metrics.record_changed(key, None, 2)


def test_a_pool_is_measured_by_name() -> None:
    """Each figure has a gauge of the job; a leader that is deposed shows none."""
    metrics = Metrics()
    metrics.kv_measured("j", {"protection_ratio": 0.5, "repair_copies_left": 7})
    assert value(metrics, 'raddle_kv_protection_ratio{job_uid="j"}') == 0.5
    assert value(metrics, 'raddle_kv_repair_copies_left{job_uid="j"}') == 7
    metrics.kv_refused(3)
    assert value(metrics, "raddle_kv_events_refused") == 3
    metrics.clear_kv()
    assert value(metrics, "raddle_kv_events_refused") == 0
    assert b'raddle_kv_repair_copies_left{job_uid="j"}' not in generate_latest(metrics.registry)
