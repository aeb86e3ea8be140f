"""The one door of the decision core: events in, instructions out.

The shell reads all events that are pending and calls `handle` once; the machine takes them in,
decides once, and returns what is to be done, in order. It knows no clock, no wire and no store:
`now` is an argument, records come decoded, and a failed commit means a new machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import singledispatchmethod
from typing import Any

from raddle.core import (
    detection,
    lifecycle,
    pools,
    rebalancing,
    recover,
    restarts,
    resume,
    sequences,
    timeline,
)
from raddle.core.admission import model_shape
from raddle.core.cluster import Cluster
from raddle.core.context import (
    Context,
    active_ranks,
    active_seats,
    note,
    ranks_under,
    set_why,
    status_of,
)
from raddle.core.detection import Loss
from raddle.core.events import (
    AgentStreamBroken,
    AgentStreamOpened,
    Committed,
    Event,
    FrontDoorLost,
    NodeProbed,
    RankProbed,
    RecordChanged,
    RequestReceived,
    SequencesReported,
    StatsReported,
    StoreLeaderChanged,
    Woken,
)
from raddle.core.expert_loads import LOOK_EVERY_S, ExpertLoads
from raddle.core.handlers import answer
from raddle.core.holds import lift_drain
from raddle.core.instructions import Instruction, ProbeNode, ProbeRank, Reply, WakeAt
from raddle.core.invariants import check
from raddle.core.nodes import NodeTracker
from raddle.core.state import State
from raddle.model import keys
from raddle.model.errors import RaddleError
from raddle.model.health import AgentAcks, AgentHealth, AgentRegistration, FaultLedger
from raddle.model.incident import Maintenance, MaintenanceState
from raddle.model.job import Job, JobState
from raddle.model.kinds import NodeState
from raddle.model.reasons import Decision
from raddle.model.stats import RankStats
from raddle.model.types import Why

RECORD_SET_ASIDE = "RECORD_SET_ASIDE"
_LEDGER_MAX = 1_024


class Machine:
    """Decisions of one leader's term over decoded records (`raddle.model` values by key)."""

    def __init__(
        self,
        records: Mapping[str, Any],
        *,
        now: float,
        term: int = 0,
        rebalance_every_s: float = LOOK_EVERY_S,
    ) -> None:
        state = State(records)
        self.context = Context(
            state=state,
            cluster=Cluster(state.supernodes()),
            nodes=NodeTracker(now=now),
            now=now,
            term=term,
            expert_loads=ExpertLoads(rebalance_every_s),
        )
        self._first_loss_s: float | None = None
        self._wake_s: float | None = None
        self._begin_term()

    def _begin_term(self) -> None:
        """Rebuild what is derived: dies, nodes, holds; look at every job once."""
        context = self.context
        context.rebuild_cluster()
        for key, value in context.state.records.items():
            if isinstance(value, AgentRegistration):
                self._meet(value)
                self._registered(value)
            elif isinstance(value, AgentHealth):
                context.cluster.set_faults(value.node, value.active_faults)
            elif key.startswith(keys.JOBS):
                context.touched[value.uid] = None
        for key in context.state.set_aside:
            self._tell_set_aside(key)
        context.drains_dirty = True
        resume.resume(context)

    # --- the door ------------------------------------------------------------------------------

    def handle(self, events: Sequence[Event], *, now: float) -> list[Instruction]:
        """Take in all events, decide once, and say what is to be done, in order."""
        context = self.context
        context.now = now
        out: list[Instruction] = []
        for event in events:
            self._take(event)
        out += self._decide()
        out += context.state.flush()
        wake = self._next_wake()
        out += self._probes()
        if wake is not None:
            out.append(WakeAt(wake))
        return out

    def remember(self, other: Machine) -> None:
        """Take over what another machine of this term was told and no record holds."""
        self.context.state.take_reports(other.context.state)
        self.context.nodes.remember(other.context.nodes)
        self.context.waits |= other.context.waits
        self.context.pod_words |= other.context.pod_words

    def validate(self) -> None:
        """Assert the invariants that hold between any two events."""
        check(self.context)

    # --- taking in -----------------------------------------------------------------------------

    @singledispatchmethod
    def _take(self, event: Any) -> None:
        raise TypeError(f"no machine takes {event!r}")

    @_take.register
    def _(self, event: RecordChanged) -> None:
        node = keys.node_of_agent_key(event.key)
        old = self.context.state.records.get(event.key)
        self.context.state.observe(event.key, event.value)
        if event.key.endswith("/health"):
            self._health_changed(node, old, event.value)
        elif isinstance(event.value, AgentRegistration):
            self._registered(event.value)
        else:
            acks = event.value or old
            if isinstance(acks, AgentAcks):
                self.context.touched[acks.job_uid] = None
        if event.key in self.context.state.set_aside:
            self._tell_set_aside(event.key)

    def _tell_set_aside(self, key: str) -> None:
        why = self.context.state.set_aside[key]
        note(self.context, RECORD_SET_ASIDE, keys.node_of_agent_key(key), f"{key}: {why}")

    @_take.register
    def _(self, event: RequestReceived) -> None:
        try:
            value = answer(event.request, self.context, event.identity)
        except RaddleError as error:
            self.context.state.reply(Reply(event.request_id, error=error))
            return
        self.context.state.reply(Reply(event.request_id, value=value))

    @_take.register
    def _(self, event: AgentStreamOpened) -> None:
        self.context.nodes.stream_opened(event.node)

    @_take.register
    def _(self, event: AgentStreamBroken) -> None:
        self.context.nodes.stream_broken(event.node, now=self.context.now)

    @_take.register
    def _(self, event: NodeProbed) -> None:
        self.context.nodes.probed(
            event.node,
            answered=event.answered,
            quiet_nodes=event.quiet_nodes,
            now=self.context.now,
        )

    @_take.register
    def _(self, event: RankProbed) -> None:
        job = self.context.state.job(event.job_uid)
        if job is not None and job.state in recover.RECOVERABLE:
            detection.rank_probed(self.context, job, event.incarnation, answered=event.answered)

    @_take.register
    def _(self, event: StatsReported) -> None:
        sequences.take_stats(self.context, event)
        if self.context.draining and any(report.kv_repair for report in event.reports):
            # A member that hands its blocks on may have come further, or to the end.
            self.context.touched[event.job_uid] = None
            self.context.drains_dirty = True
        job = self.context.state.job(event.job_uid)
        for report in event.reports:
            if report.expert_loads and job is not None and report.epoch == job.epoch:
                self._take_loads(job, report)

    def _take_loads(self, job: Job, report: RankStats) -> None:
        """Loads of the epoch in service; what a rank counted at an older one is old."""
        context, shape = self.context, model_shape(job.spec.model)
        known = any(role.name == report.rank.role for role in job.spec.roles)
        if not known or job.uid not in context.state.stages:
            return
        layers = (shape.moe_layers, shape.experts)
        context.expert_loads.take(job.uid, report.rank, report.expert_loads, layers, context.now)
        context.loads_reported[job.uid] = None

    @_take.register
    def _(self, event: SequencesReported) -> None:
        sequences.take_sequences(self.context, event)

    @_take.register
    def _(self, event: FrontDoorLost) -> None:
        for doors in self.context.state.sequences.values():
            doors.pop(event.front_door_id, None)

    @_take.register
    def _(self, _event: StoreLeaderChanged) -> None:
        self.context.nodes.store_leader_changed(now=self.context.now)

    @_take.register
    def _(self, event: Committed) -> None:
        for name in event.stimulus:
            timeline.committed(self.context, name)

    @_take.register
    def _(self, _event: Woken) -> None:
        self._wake_s = None
        context = self.context
        for job_uid in [uid for uid, due in context.control_due.items() if due <= context.now]:
            del context.control_due[job_uid]
            context.touched[job_uid] = None

    def _meet(self, value: AgentRegistration) -> None:
        """A node that this term has not seen before."""
        context = self.context
        has_lease = context.state.health(value.node) is not None
        context.nodes.registered(value.node, has_lease=has_lease, now=context.now)

    def _registered(self, value: AgentRegistration) -> None:
        context = self.context
        if value.node not in context.nodes.nodes:
            self._meet(value)
        context.nodes.node(value.node).host = value.host
        self._sync_node(value.node)

    def _health_changed(self, node: str, old: Any, value: Any) -> None:
        context = self.context
        if value is None:
            context.nodes.lease_ended(node, now=context.now)
            return
        context.nodes.lease_seen(node)
        self._fold_occurrences(value)
        if old is None or old.active_faults != value.active_faults:
            context.cluster.set_faults(node, value.active_faults)
            context.queue_dirty = True
            self._touch_jobs_on(node)

    def _fold_occurrences(self, health: AgentHealth) -> None:
        """Keep what frequency rules count, beyond the agent's own window and lease."""
        state = self.context.state
        key = keys.fault_ledger(health.node)
        ledger = state.records.get(key) or FaultLedger(node=health.node)
        same_boot = ledger.boot_id == health.boot_id
        last = ledger.last_sequence if same_boot else 0
        new = tuple(o for o in health.occurrences if o.sequence > last)
        if not new:
            return
        occurrences = (*ledger.occurrences, *new)[-_LEDGER_MAX:]
        folded = FaultLedger(
            node=health.node,
            boot_id=health.boot_id,
            last_sequence=new[-1].sequence,
            occurrences=occurrences,
        )
        state.put(key, folded)

    # --- deciding ------------------------------------------------------------------------------

    def _decide(self) -> list[Instruction]:
        context = self.context
        for node in context.nodes.take_changed():
            self._sync_node(node)
            self._touch_jobs_on(node)
        if context.queue_dirty and context.drain_blocked:
            context.drain_blocked.clear()
            context.drains_dirty = True
        if context.drains_dirty:
            self._look_at_drains()
        out: list[Instruction] = list(self._recover_and_advance())
        if context.queue_dirty:
            context.queue_dirty = lifecycle.schedule(context)
        self._rebalance()
        return out

    def _rebalance(self) -> None:
        """Look at jobs whose loads were reported; those with a loss are recovered first."""
        context = self.context
        reported, context.loads_reported = list(context.loads_reported), {}
        for job_uid in reported:
            if job_uid not in context.touched:
                rebalancing.look_at(context, job_uid)

    def _recover_and_advance(self) -> list[ProbeRank]:
        context = self.context
        probes: list[ProbeRank] = []
        losses: list[Loss] = []
        touched, context.touched = list(context.touched), {}
        for job_uid in touched:
            job = context.state.job(job_uid)
            if job is None:
                continue
            placement = context.state.placement(job_uid)
            if placement is not None and job.state in recover.RECOVERABLE:
                ranks = active_ranks(context, job, placement)
                lost = detection.losses_of(context, job, ranks)
                losses += lost
                if lost:
                    # Looked at again when the plan is made, and until then at every call.
                    context.touched[job_uid] = None
                    continue
                probes += detection.probes_for(context, job, ranks)
                self._watch_over(job, ranks)
            lifecycle.advance(context, job)
        self._plan(losses)
        for job_uid in context.take_to_tell():
            job = context.state.job(job_uid)
            if job is not None and job_uid not in context.touched:
                recover.tell_drain(context, job)
        for job_uid, incarnation in context.take_reconnects():
            job = context.state.job(job_uid)
            if job is not None and job_uid not in context.touched:
                recover.reconnect(context, job, incarnation)
        return probes

    def _watch_over(self, job: Job, ranks: detection.Ranks) -> None:
        """What is wrong without a loss: an agent waited for, a store set back, a drain untold."""
        context = self.context
        if job.state is JobState.READY and pools.is_untold(context, job):
            context.to_tell[job.uid] = None
        ahead = detection.rank_ahead(context, job, ranks)
        if ahead:
            context.to_reconnect[job.uid] = ahead
        due = detection.control_due(context, job)
        if due is None:
            context.control_due.pop(job.uid, None)
        else:
            context.control_due[job.uid] = due

    def _plan(self, losses: list[Loss]) -> None:
        """Gather for a moment, then decide everything that is lost at once."""
        context = self.context
        losses = self._within_budget(losses)
        if not losses:
            self._first_loss_s = None
            return
        if self._first_loss_s is None:
            self._first_loss_s = context.now
        if context.now < self._first_loss_s + recover.GATHER_S:
            return
        recover.recover(context, losses, self._first_loss_s)
        self._first_loss_s = None
        for loss in losses:
            context.touched.pop(loss.job_uid, None)
        context.drains_dirty = bool(context.draining)

    def _within_budget(self, losses: list[Loss]) -> list[Loss]:
        """Losses that are dealt with now: not those of jobs whose processes keep ending."""
        context = self.context
        by_job: dict[str, list[Loss]] = {}
        for loss in losses:
            by_job.setdefault(loss.job_uid, []).append(loss)
        context.restart_due = {u: t for u, t in context.restart_due.items() if u in by_job}
        found: list[Loss] = []
        for job_uid, lost in by_job.items():
            job = context.state.require_job(job_uid)
            spent = restarts.exhausted(context, lost)
            due_s = restarts.due_s(context, lost)
            if spent is not None:
                context.touched.pop(job_uid, None)
                lifecycle.stop(context, job, spent)
            elif due_s <= context.now:
                context.restart_due.pop(job_uid, None)
                found += lost
            elif context.restart_due.get(job_uid) != due_s:
                context.restart_due[job_uid] = due_s
                set_why(context, job, restarts.waits(context, lost, due_s))
        return found

    def _look_at_drains(self) -> None:
        context = self.context
        context.drains_dirty = False
        before = context.draining
        context.draining = {
            m.subject: m.id
            for m in context.state.maintenances()
            if m.state is MaintenanceState.DRAINING
        }
        for record in context.state.maintenances():
            if record.state is MaintenanceState.DRAINING:
                self._advance_drain(record)
        for subject in before:
            if subject not in context.draining:
                # Pool members there may take blocks again.
                context.touched |= dict.fromkeys(ranks_under(context, subject))

    def _advance_drain(self, record: Maintenance) -> None:
        context = self.context
        ranks = ranks_under(context, record.subject)
        context.touched |= dict.fromkeys(ranks)
        here = sum(ranks.values())
        blocked = sum(count for uid, count in ranks.items() if uid in context.drain_blocked)
        total = max(record.ranks_total, here)
        new = replace(record, ranks_total=total, ranks_moved=total - here)
        if here == 0:
            why = Why(
                reason=Decision.DRAINED, message=f"{total} ranks moved away; nothing runs here"
            )
            new = replace(new, state=MaintenanceState.DRAINED, why=why)
            context.draining.pop(record.subject, None)
        elif self._drain_left_s(record) <= 0:
            why = Why(reason=Decision.EXPIRED, message=f"{here} of {total} ranks are still here")
            new = replace(new, state=MaintenanceState.EXPIRED, why=why)
            context.draining.pop(record.subject, None)
        elif blocked:
            message = (
                f"{blocked} of {total} ranks have nowhere to go: free dies or cancel the drain"
            )
            new = replace(new, why=Why(reason=Decision.NO_ROOM, message=message))
        elif (copies := pools.copies_to_hand_on(context, record.subject, list(ranks))) is not None:
            message = f"pool members hand their blocks on before they end: {copies} copies are left"
            new = replace(new, why=Why(reason=Decision.HANDING_ON, message=message))
        if new.state is not MaintenanceState.DRAINING:
            context.seen_since.pop(record.id, None)
        context.state.put(keys.maintenance(record.id), new)
        if new.state is MaintenanceState.EXPIRED:
            lift_drain(context, record.subject)

    def _drain_left_s(self, record: Maintenance) -> float:
        """Of the drain's time; counted anew by each leader, on its own clock."""
        return record.deadline - record.create_time - self.context.seen_for_s(record.id)

    # --- nodes and dies ------------------------------------------------------------------------

    def _sync_node(self, name: str) -> None:
        context = self.context
        registration = context.state.registration(name)
        if registration is None or not context.cluster.has_node(name):
            return
        context.cluster.set_node(
            name,
            ready=context.nodes.node(name).state is NodeState.READY,
            drivers=registration.drivers,
            host_memory_bytes=registration.host_memory_bytes,
        )
        context.queue_dirty = True

    def _touch_jobs_on(self, node: str) -> None:
        for item in self.context.state.assignment(node).jobs:
            self.context.touched[item.job_uid] = None
        for job_uid, by_node in self.context.state.acks.items():
            if node in by_node:
                self.context.touched[job_uid] = None

    def _probes(self) -> list[ProbeNode]:
        found: list[ProbeNode] = []
        for node in self.context.nodes.take_probes():
            ranks: list[tuple[str, str]] = []
            for item in self.context.state.assignment(node).jobs:
                ranks += self._rank_addresses(item.job_uid, node)
            found.append(ProbeNode(node, tuple(ranks)))
        return found

    def _rank_addresses(self, job_uid: str, node: str) -> list[tuple[str, str]]:
        context = self.context
        job, placement = context.state.job(job_uid), context.state.placement(job_uid)
        if job is None or placement is None:
            return []
        found: list[tuple[str, str]] = []
        for seat in active_seats(context, job, placement):
            status = status_of(context, job, seat) if seat.placement.node == node else None
            if status is not None and status.engine_address:
                found.append((status.engine_address, status.incarnation))
        return found

    def _next_wake(self) -> float | None:
        """The earliest time at which something is due without an event; None if unchanged."""
        context = self.context
        due = [self._first_loss_s + recover.GATHER_S] if self._first_loss_s is not None else []
        nodes_due = context.nodes.wake(now=context.now)
        if nodes_due is not None:
            due.append(nodes_due)
        if context.queue_dirty:
            due.append(context.now)
        due += context.control_due.values()
        due += context.restart_due.values()
        due += [
            context.now + self._drain_left_s(m)
            for m in context.state.maintenances()
            if m.state is MaintenanceState.DRAINING
        ]
        if any(m <= context.now for m in due if m) and context.draining:
            context.drains_dirty = True
        if not due:
            return None
        wake = min(due)
        if self._wake_s is not None and self._wake_s <= wake:
            return None
        self._wake_s = wake
        return wake
