"""What the scheduler counts. Names are API."""

from __future__ import annotations

from collections import Counter as Tally
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from raddle.model.incident import Incident, IncidentPhase
from raddle.model.job import Job
from raddle.telemetry.metrics import PHASE_BUCKETS_S


class Metrics:
    """All metrics of one scheduler process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry: dict[str, Any] = {"registry": self.registry}
        self.leader = Gauge("raddle_leader", "1 while this replica leads.", **registry)
        self._events = Counter("raddle_events_total", "Events that the core took in.", **registry)
        self._decisions = Histogram(
            "raddle_decision_cpu_seconds",
            "CPU time of one decision.",
            buckets=PHASE_BUCKETS_S,
            **registry,
        )
        self._writes = Counter("raddle_store_writes_total", "Records written.", **registry)
        self._commits = Histogram(
            "raddle_commit_seconds",
            "Time of one transaction.",
            buckets=PHASE_BUCKETS_S,
            **registry,
        )
        self._jobs = Gauge("raddle_jobs", "Jobs by state.", ["state"], **registry)
        self._phases = Histogram(
            "raddle_incident_phase_seconds",
            "Time of one phase of a recovery.",
            ["phase"],
            buckets=PHASE_BUCKETS_S,
            **registry,
        )
        self._incidents = Counter("raddle_incidents_total", "Incidents closed.", **registry)
        self.records_set_aside = Gauge(
            "raddle_records_set_aside", "Records that could not be read.", **registry
        )
        self.requests = Counter(
            "raddle_requests_total",
            "API calls by method and result.",
            ["method", "code"],
            **registry,
        )
        self.unforeseen = Counter(
            "raddle_unforeseen_errors",
            "Requests that failed by a mistake of the program; each has its line in the log.",
            **registry,
        )
        self._job_states: dict[str, str] = {}

    def decided(self, events: int, cpu_s: float) -> None:
        self._events.inc(events)
        self._decisions.observe(cpu_s)

    def committed(self, writes: int, seconds: float) -> None:
        self._writes.inc(writes)
        self._commits.observe(seconds)

    def record_changed(self, key: str, value: Any, _revision: int) -> None:
        """Follow the mirror: jobs by state, closed incidents with their phases."""
        if key.startswith("jobs/"):
            if isinstance(value, Job):
                self._job_states[key] = value.state
            else:
                self._job_states.pop(key, None)
            tally = Tally(self._job_states.values())
            self._jobs.clear()
            for state, count in tally.items():
                self._jobs.labels(state).set(count)
        elif isinstance(value, Incident) and value.phase is IncidentPhase.CLOSED:
            self._incidents.inc()
            for entry in value.timeline:
                if entry.duration:
                    self._phases.labels(entry.phase).observe(entry.duration)
