"""What a transaction of the leader is about, for its log lines: jobs with epochs, and incidents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from raddle.core.instructions import Write
from raddle.model import keys
from raddle.model.incident import Incident
from raddle.model.job import Assignment, Job, JobExpertMaps, Placement
from raddle.model.routes import Routes
from raddle.scheduler.mirror import Mirror

_EPOCHS = (Placement, Routes, JobExpertMaps)


def subjects(writes: Iterable[Write], mirror: Mirror) -> dict[str, Any]:
    """`jobs` (uid -> epoch) and `incidents` (ids), in the order of the writes; empty ones left out.

    `mirror` is of before the writes: it says what is deleted, and which jobs of a node change.
    """
    jobs: dict[str, int] = {}
    incidents: dict[str, None] = {}
    for write in writes:
        old = mirror.get(write.key)
        value = write.value if write.value is not None else old
        if isinstance(value, Job):
            jobs[value.uid] = max(value.epoch, jobs.get(value.uid, 0))
        elif isinstance(value, _EPOCHS):
            jobs[value.job_uid] = max(value.epoch, jobs.get(value.job_uid, 0))
        elif isinstance(value, Incident):
            incidents[value.id] = None
        elif write.key.startswith(keys.ASSIGNMENTS):
            for uid, epoch in _assigned(old, value):
                jobs[uid] = max(epoch, jobs.get(uid, 0))
    found: dict[str, Any] = {"jobs": jobs, "incidents": list(incidents)}
    return {name: value for name, value in found.items() if value}


def _assigned(old: Assignment | None, new: Assignment) -> list[tuple[str, int]]:
    """Jobs of a node that are told something new, and those that end there."""
    before = {item.job_uid: item for item in old.jobs} if old is not None else {}
    after = {item.job_uid: item for item in new.jobs}
    return [
        (uid, after.get(uid, before.get(uid)).epoch)  # type: ignore[union-attr]
        for uid in sorted({*before, *after})
        if before.get(uid) != after.get(uid)
    ]
