"""What one caller may see of the records: those of jobs in namespaces that it may read.

The machine (nodes, dies, holds, maintenance) is everybody's to read. What speaks of a job that is
gone has no namespace any more: only those who may read all namespaces see it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

from raddle.model import keys
from raddle.model.incident import Event, Incident
from raddle.scheduler.authorization import Policy

_JOB_UID = re.compile(r"j-[0-9a-f]{12}\Z")


class Records(Protocol):
    """Decoded records by key."""

    def get(self, key: str) -> Any:
        """The record, or None."""

    def under(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """(key, record) under a prefix, by key."""


class View:
    """The records as one identity may read them."""

    def __init__(self, records: Records, policy: Policy, identity: str) -> None:
        self._records = records
        self._policy = policy
        self._identity = identity
        self._known: dict[str, bool] = {}

    def shows(self, namespace: str) -> bool:
        """May the caller read this namespace? The empty one stands for all."""
        if namespace not in self._known:
            self._known[namespace] = self._policy.allows(self._identity, namespace, "read")
        return self._known[namespace]

    def get(self, key: str) -> Any:
        return self.shown(key, self._records.get(key))

    def under(self, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in self._records.under(prefix):
            seen = self.shown(key, value)
            if seen is not None:
                yield key, seen

    def shown(self, key: str, value: Any) -> Any:
        """A version of a record, the part of it that the caller may see, or None."""
        if value is None or self.shows(""):
            return value
        if key.startswith(keys.JOBS):
            return value if self.shows(value.spec.namespace) else None
        if isinstance(value, Incident):
            return self._incident(value)
        if isinstance(value, Event):
            return value if self._shows_subject(value.subject) else None
        return value

    def _shows_job(self, job_uid: str) -> bool:
        job = self._records.get(keys.job(job_uid))
        return self.shows(job.spec.namespace if job is not None else "")

    def _shows_subject(self, subject: str) -> bool:
        """Is this a part of the machine, or a job that the caller may see?"""
        is_job = _JOB_UID.match(subject) or self._records.get(keys.job(subject)) is not None
        return not is_job or self._shows_job(subject)

    def _incident(self, incident: Incident) -> Incident | None:
        """What it says of the caller's jobs; None if it is about others' jobs alone."""
        plans = tuple(p for p in incident.plans if self._shows_job(p.job_uid))
        faults = tuple(f for f in incident.faults if not f.job_uid or self._shows_job(f.job_uid))
        if (incident.plans and not plans) or (incident.faults and not faults):
            return None
        return replace(incident, plans=plans, faults=faults)
