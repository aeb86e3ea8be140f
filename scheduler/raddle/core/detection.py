"""From signs to losses: which active ranks of a job cannot go on, and why we say so.

In go the records of agents, the node states and the probes of suspected ranks; out come `Loss`
values and probes. Level-triggered: a loss is seen again at each look until a plan deals with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from raddle.core import pools
from raddle.core.context import Context, Seat, Wait, has_done, is_ahead
from raddle.core.instructions import ProbeRank
from raddle.core.nodes import STORM_WINDOW_S
from raddle.model.health import EXIT_CODE_UNKNOWN, RankStage, RankStatus
from raddle.model.job import Job, JobState
from raddle.model.kinds import FaultKind, NodeState
from raddle.model.types import RankKey

# A recovery needs every agent. One that is silent while its ranks answer is waited for this long,
# more than a restart takes; then its ranks are left behind: fenced, they can do no harm.
CONTROL_LOST_S = 10.0
# One behind the storm brake may come back with the others of its storm, which takes a window; but a
# recovery that is under way does not wait for ever for a word against it.
UNKNOWN_LOST_S = STORM_WINDOW_S + 5.0
_PATIENCE_S = {NodeState.SUSPECT: CONTROL_LOST_S, NodeState.UNKNOWN: UNKNOWN_LOST_S}
# A suspected rank that answers is reconnected this often before its peers are believed.
RECONNECTS_MAX = 2
# ...within this time: two hiccups a month do not make a rank a bad one.
RECONNECTS_WINDOW_S = 600.0


@dataclass(frozen=True, slots=True)
class Loss:
    """One active rank that cannot go on."""

    job_uid: str
    key: RankKey
    kind: FaultKind
    #: Position of the die, or of the node for a rank without a die.
    position: str
    code: str
    message: str
    start_count: int = 0


Ranks = list[tuple[Seat, RankStatus | None]]


def losses_of(context: Context, job: Job, ranks: Ranks) -> list[Loss]:
    """Active ranks of the job that are lost, in order."""
    _look_at_waits(context, job, ranks)
    found: list[Loss] = []
    for seat, status in ranks:
        cause = _cause(context, job, seat, status)
        if cause is not None:
            kind, code, message = cause
            position = seat.placement.die or seat.placement.node
            start_count = seat.placement.start_count
            found.append(Loss(job.uid, seat.key, kind, position, code, message, start_count))
    return found


def _cause(
    context: Context, job: Job, seat: Seat, status: RankStatus | None
) -> tuple[FaultKind, str, str] | None:
    node = context.nodes.node(seat.placement.node)
    if node.state is NodeState.LOST:
        return FaultKind.NODE_LOST, node.why.reason, f"node {node.name}: {node.why.message}"
    fault = context.cluster.fault_of(seat.placement.die) if seat.placement.die else None
    if fault is not None:
        return FaultKind.DIE_FAULT, fault, f"{seat.placement.die} reports {fault}"
    if _is_waited_for(context, job, status) and _is_out_of_control(context, job, node.name):
        what = f"the agent of {node.name} is silent and the recovery needs it"
        return FaultKind.NODE_LOST, "AGENT_SILENT", what
    ended = _ended(context, job, seat, status)
    if ended is not None:
        return FaultKind.RANK_EXITED, *ended
    suspicions = context.suspicions.get(job.uid)
    if status is not None and suspicions is not None and status.incarnation in suspicions.dead:
        return FaultKind.PEER_REPORTS, *suspicions.dead[status.incarnation]
    if job.uid in context.drain_blocked:
        return None
    if context.is_draining(seat.placement.die or seat.placement.node):
        if pools.is_handing_on(context, job, seat, status):
            return None
        return FaultKind.DRAIN, "DRAIN", f"{seat.placement.die or seat.placement.node} is drained"
    return None


def _ended(
    context: Context, job: Job, seat: Seat, status: RankStatus | None
) -> tuple[str, str] | None:
    """Code and sentence if the rank's process ended or never will be; None if nobody says so.

    Its agent knows best, and its pod says why. Where the agent says nothing, the pod's end counts.
    """
    word = context.pod_words.get(job.uid, {}).get(seat.key)
    if word is not None and word.start_count != seat.placement.start_count:
        word = None
    if status is not None and status.stage in (RankStage.EXITED, RankStage.FAILED):
        text = f"rank process {_how_it_ended(status)}"
        text += f": {status.message}" if status.message else ""
        # What a pod waited for before its rank came up is past.
        if word is None or (status.incarnation and not word.has_ended):
            return status.stage, text
        return word.reason, f"{text}; its pod: {word.sentence}"
    is_heard = context.nodes.node(seat.placement.node).state is NodeState.READY
    if word is not None and word.has_ended and (status is None or not is_heard):
        return word.reason, f"the rank's pod ended: {word.sentence}"
    return None


def _how_it_ended(status: RankStatus) -> str:
    """As much as its agent knows: of a process that it did not start, that is its end alone."""
    code = status.exit_code
    if status.stage is RankStage.FAILED:
        return "failed"
    if code == EXIT_CODE_UNKNOWN:
        return "ended"
    return f"ended with exit code {code}" if code >= 0 else f"ended by signal {-code}"


def _is_waited_for(context: Context, job: Job, status: RankStatus | None) -> bool:
    """Does the stage under way need a word of this rank that has not come?"""
    return job.state is not JobState.READY and not has_done(context, job, status)


def _look_at_waits(context: Context, job: Job, ranks: Ranks) -> None:
    """Keep how long this epoch has waited for which silent agents.

    The silences of one that falls silent again and again add up.
    """
    old, waits = context.waits.get(job.uid, {}), dict[tuple[int, str], Wait]()
    for seat, status in ranks:
        if not _is_waited_for(context, job, status):
            continue
        key = (job.epoch, seat.placement.node)
        known = old.get(key)
        patience_s = _PATIENCE_S.get(context.nodes.node(seat.placement.node).state)
        if patience_s is not None:
            waits[key] = (known or Wait(patience_s)).silent(context.now, patience_s)
        elif known is not None:
            waits[key] = known.heard(context.now)
    context.waits[job.uid] = waits
    if not waits:
        del context.waits[job.uid]


def _is_out_of_control(context: Context, job: Job, node: str) -> bool:
    """Has this epoch waited too long for the node's silent agent?"""
    wait = context.waits.get(job.uid, {}).get((job.epoch, node))
    return wait is not None and context.now >= wait.due_s


def control_due(context: Context, job: Job) -> float | None:
    """When a silent agent has been waited for long enough; None if none is waited for."""
    waits = context.waits.get(job.uid, {}).values()
    return min((wait.due_s for wait in waits if wait.since_s is not None), default=None)


def rank_ahead(context: Context, job: Job, ranks: Ranks) -> str:
    """A rank that lives at an epoch that the record does not know; its incarnation, or nothing."""
    for _, status in ranks:
        if status is not None and is_ahead(job, status):
            context.suspicions_of(job.uid).accusations[status.incarnation] = (
                f"a live rank is at epoch {status.epoch} of term {status.epoch_term:x}, the store"
                f" at {job.epoch} of {job.epoch_term:x}: the store was set back"
            )
            return status.incarnation
    return ""


def probes_for(context: Context, job: Job, ranks: Ranks) -> list[ProbeRank]:
    """Ask the ranks that peers suspect at the newest epoch, each once an epoch."""
    by_incarnation: dict[str, tuple[Seat, RankStatus]] = {}
    if not any(status is not None and status.suspicions for _, status in ranks):
        return []
    for seat, status in ranks:
        if status is not None and status.stage not in (RankStage.EXITED, RankStage.FAILED):
            by_incarnation[status.incarnation] = (seat, status)
    probes: list[ProbeRank] = []
    suspicions = context.suspicions_of(job.uid)
    suspicions.asked = {key: None for key in suspicions.asked if key[1] >= job.epoch}
    for _, acks in sorted(context.state.acks.get(job.uid, {}).items()):
        for accuser in acks.ranks:
            for suspicion in accuser.suspicions:
                target = by_incarnation.get(suspicion.incarnation)
                asked = (suspicion.incarnation, job.epoch)
                if target is None or suspicion.epoch != job.epoch or asked in suspicions.asked:
                    continue
                suspicions.asked[asked] = None
                name = f"{accuser.role}/{accuser.instance}/{accuser.rank}"
                said = f"{name} says {suspicion.reason}"
                suspicions.accusations[suspicion.incarnation] = said
                seat, status = target
                context.nodes.accused(seat.placement.node)
                probes.append(ProbeRank(job.uid, suspicion.incarnation, status.engine_address))
    return probes


def rank_probed(context: Context, job: Job, incarnation: str, *, answered: bool) -> None:
    """A suspected rank answered or did not; one that answers too often is believed lost."""
    suspicions = context.suspicions_of(job.uid)
    since = context.now - RECONNECTS_WINDOW_S
    lately = [moment for moment in suspicions.reconnects.get(incarnation, []) if moment >= since]
    if answered and len(lately) < RECONNECTS_MAX:
        suspicions.reconnects[incarnation] = [*lately, context.now]
        context.to_reconnect[job.uid] = incarnation
    elif answered:
        times = f"{len(lately) + 1} times in {RECONNECTS_WINDOW_S / 60:.0f} minutes"
        said = f"it answers, but peers lost their connections to it {times}"
        suspicions.dead[incarnation] = ("CONNECTION_UNRELIABLE", said)
    else:
        suspicions.dead[incarnation] = ("NO_ANSWER", "peers lost it and it does not answer")
        for acks in context.state.acks.get(job.uid, {}).values():
            if any(status.incarnation == incarnation for status in acks.ranks):
                context.nodes.rank_gone(acks.node, now=context.now)
    context.touched[job.uid] = None
