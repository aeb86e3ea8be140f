"""What the scheduler counts. Names are API."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from raddle.core.experts.maps import coverage_margin
from raddle.model import keys
from raddle.model.incident import Incident, IncidentPhase
from raddle.model.job import Job, JobExpertMaps
from raddle.scheduler.mirror import Mirror
from raddle.telemetry.metrics import PHASE_BUCKETS_S

TOKENS_BUCKETS = (0, 10**3, 10**4, 10**5, 10**6, 10**7, 10**8)


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
        self._set_aside = Gauge(
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
        self._make_kv(registry)
        #: Incidents that were counted as closed, and those whose sequences are known to be back.
        self._closed: dict[str, None] = {}
        self._back: dict[str, None] = {}
        self._job_states: dict[str, str] = {}
        self._map_epochs: dict[str, int] = {}
        self._margin = Gauge(
            "raddle_job_coverage_margin_dies",
            "Dies that a job may lose in the worst case before an expert has no copy.",
            ["job_uid"],
            **registry,
        )

    def _make_kv(self, registry: dict[str, Any]) -> None:
        """What is measured of pools, and of the sequences of incidents."""
        self._kv_gauges = {
            name: Gauge(f"raddle_kv_{name}", text, ["job_uid"], **registry)
            for name, text in (
                ("hit_ratio", "Share of prompt tokens found in the pool, by job."),
                ("protection_ratio", "Share of pooled blocks with all their copies, by job."),
                ("blocks", "Blocks in the pool, by job."),
                ("blocks_below", "Pooled blocks that lack copies, by job."),
                ("time_to_protection_seconds", "Time that repair needs at its budget, by job."),
                ("repair_copies_made", "Copies that live pool members made again, by job."),
                ("repair_copies_left", "Copies that pool members have queued, by job."),
                ("repair_bytes_made", "Bytes of the copies made, by job."),
                ("repair_bytes_left", "Bytes of the copies queued, by job."),
            )
        }
        self._kv_refused = Gauge(
            "raddle_kv_events_refused",
            "KV events that this leader did not take: a wrong hash, or blocks of another size.",
            **registry,
        )
        self._kv_tokens = Histogram(
            "raddle_incident_kv_tokens",
            "KV tokens of lost sequences of one incident: restored or recomputed.",
            ["way"],
            buckets=TOKENS_BUCKETS,
            **registry,
        )
        self._kv_back = Histogram(
            "raddle_incident_kv_back_seconds",
            "Time until half (median) or all (last) lost sequences of one incident made tokens"
            " again: predicted and actual.",
            ["of", "time"],
            buckets=PHASE_BUCKETS_S,
            **registry,
        )

    def follow(self, mirror: Mirror) -> None:
        """Count what a mirror holds, and what it had to set aside."""
        mirror.listen(self.record_changed)
        self._set_aside.set_function(lambda: len(mirror.set_aside) + len(mirror.too_new))

    def decided(self, events: int, cpu_s: float) -> None:
        self._events.inc(events)
        self._decisions.observe(cpu_s)

    def committed(self, writes: int, seconds: float) -> None:
        self._writes.inc(writes)
        self._commits.observe(seconds)

    def clear_kv(self) -> None:
        """Pools are told of by the leader only."""
        for gauge in self._kv_gauges.values():
            gauge.clear()
        self._kv_refused.set(0)

    def kv_refused(self, events: int) -> None:
        self._kv_refused.set(events)

    def kv_measured(self, job_uid: str, values: Mapping[str, float]) -> None:
        """By name without the prefix `raddle_kv_`."""
        for name, value in values.items():
            self._kv_gauges[name].labels(job_uid).set(value)

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
        elif key.startswith(keys.EXPERT_MAPS):
            self._expert_maps_changed(key, value)
        elif key.startswith(keys.INCIDENTS):
            self._incident_changed(key, value)

    def _incident_changed(self, key: str, value: Any) -> None:
        """Count an incident once when it closes, and once when its sequences are back."""
        if not isinstance(value, Incident):
            self._closed.pop(key, None)
            self._back.pop(key, None)
            return
        parts = [part for plan in value.plans for part in plan.instances]
        if value.phase is IncidentPhase.CLOSED and key not in self._closed:
            self._closed[key] = None
            self._incidents.inc()
            if any(part.sequences_restored for part in parts):
                restored = sum(part.kv_tokens_restored for part in parts)
                self._kv_tokens.labels("restored").observe(restored)
                recomputed = sum(part.kv_tokens_recomputed for part in parts)
                self._kv_tokens.labels("recomputed").observe(recomputed)
            for entry in value.timeline:
                if entry.duration:
                    self._phases.labels(entry.phase).observe(entry.duration)
        back = max(parts, key=lambda part: part.kv_last_actual, default=None)
        if back is not None and back.kv_last_actual and key not in self._back:
            self._back[key] = None
            self._kv_back.labels("median", "predicted").observe(back.kv_median_predicted)
            self._kv_back.labels("median", "actual").observe(back.kv_median_actual)
            self._kv_back.labels("last", "predicted").observe(back.kv_last_predicted)
            self._kv_back.labels("last", "actual").observe(back.kv_last_actual)

    def _expert_maps_changed(self, key: str, value: Any) -> None:
        """Follow the margin of the newest map; a job that has none any more has no metric."""
        job_uid = key.removeprefix(keys.EXPERT_MAPS).partition("/")[0]
        if isinstance(value, JobExpertMaps):
            if value.epoch >= self._map_epochs.get(job_uid, 0) and value.instances:
                self._map_epochs[job_uid] = value.epoch
                margin = min(coverage_margin(m.expert_map) for m in value.instances)
                self._margin.labels(job_uid).set(margin)
        elif key == keys.expert_maps(job_uid, self._map_epochs.get(job_uid, 0)):
            del self._map_epochs[job_uid]
            self._margin.remove(job_uid)
