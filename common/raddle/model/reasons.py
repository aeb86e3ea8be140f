"""Reasons: codes for programs, each with one sentence for people. Pure.

Every reason that Raddle gives is a member of such a list; `docs/reference/reasons.md` has them all.
Errors have theirs (`raddle.model.errors`), kinds of faults and recoveries are reasons of what
is done about them (`raddle.model.kinds`), the operator adds what only Kubernetes can tell.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Code(StrEnum):
    """A code, and what it means."""

    meaning: str

    def __new__(cls, code: str, meaning: str = "") -> Self:
        member = str.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member


class Decision(Code):
    """Why a job, a rank, a drain or a node is as it is, by the scheduler's own decision."""

    # Jobs.
    ACCEPTED = "ACCEPTED", "The job is accepted and waits to be placed."
    WAITS_FOR_DIES = "WAITS_FOR_DIES", "Too few dies are free for the job as it wants them."
    WAITS_FOR_HOSTS = "WAITS_FOR_HOSTS", "Too few hosts have the memory that a cache role asks for."
    WAITS_FOR_TURN = (
        "WAITS_FOR_TURN",
        "Dies are kept for a job that has waited very long.",
    )
    PLACED = "PLACED", "Every rank has its die or its host."
    READY = "READY", "All ranks serve at the newest epoch, or a node's agent reports."
    RECOVERING = "RECOVERING", "Ranks were lost, and the job moves to an epoch without them."
    REBALANCING = "REBALANCING", "Experts move to even out the load of dies."
    SCALED = "SCALED", "A role has another size: the job is placed anew."
    RESTART_BACKOFF = "RESTART_BACKOFF", "Ranks keep ending: they are started again after a pause."
    RESTART_BUDGET = (
        "RESTART_BUDGET",
        "Ranks ended too soon after each start: the job failed.",
    )
    CANCELLED = "CANCELLED", "Somebody ended the job or the drain."

    # What was considered for an instance that lost ranks.
    NO_OPTION = "NO_OPTION", "No way to recover is feasible in place."
    CHEAPEST = "CHEAPEST", "The feasible way that costs least work."
    DEARER = "DEARER", "Feasible, and costs more work or a longer pause."
    INFEASIBLE = "INFEASIBLE", "Not feasible, or not allowed by the job."

    # Sequences of lost ranks.
    RESTORE = "RESTORE", "The sequence continues from KV blocks that are left."
    RECOMPUTE = "RECOMPUTE", "The sequence continues, its KV blocks are computed anew."
    GIVE_UP = "GIVE_UP", "The sequence's time is over before it could continue."

    # Expert maps.
    NOT_NEEDED = "NOT_NEEDED", "Every expert has a live copy."
    TOO_SMALL = "TOO_SMALL", "Too few ranks to do without some expert for a while."
    TOO_MANY_LOST = "TOO_MANY_LOST", "Too many experts of a layer are lost to do without them."
    MASKED = "MASKED", "Lost experts are left out until their weights are loaded."
    BALANCED = "BALANCED", "The map is as even as it can be."
    SMALL_GAIN = "SMALL_GAIN", "Another map would gain too little."
    TOO_DEAR = "TOO_DEAR", "Another map would cost more than it gains."
    PAYS = "PAYS", "Another map gains more than it costs."

    # Drains.
    DRAINING = "DRAINING", "Ranks move away from what is drained."
    HANDING_ON = "HANDING_ON", "Members of a KV pool hand their blocks on before they end."
    NO_ROOM = "NO_ROOM", "Ranks have nowhere to go: free dies or cancel the drain."
    DRAINED = "DRAINED", "Nothing runs any more where it was drained."
    EXPIRED = "EXPIRED", "The drain's time is over, and ranks are still there."
    DRY_RUN = "DRY_RUN", "Only asked; nothing was done."

    # Nodes and dies.
    LEASE_ABSENT = "LEASE_ABSENT", "The agent had no lease when the leader's term began."
    LEASE_ENDED = "LEASE_ENDED", "The agent's lease ended."
    STREAM_BROKEN = "STREAM_BROKEN", "The agent's stream to the leader broke."
    NO_STREAM = "NO_STREAM", "The agent does not stream to this leader."
    RANKS_ANSWER = "RANKS_ANSWER", "The agent is silent, but its ranks answer."
    RANKS_SILENT = "RANKS_SILENT", "First the agent fell silent, then its ranks."
    LEASE_LIVES = "LEASE_LIVES", "Nobody there answers the leader, but the agent renews its lease."
    STORM_BRAKE = "STORM_BRAKE", "Too many nodes fell silent together: a second witness is awaited."
    DECLARED_LOST = "DECLARED_LOST", "Somebody said that the silent node is gone."
    ABSENT = "ABSENT", "No agent ever registered for the node."
    SILENT = "SILENT", "The node's agent has no lease."
    FAULT = "FAULT", "Faults of the device are present."
    HEALTHY = "HEALTHY", "No hold, no fault, and the agent reports."
    FAULT_INJECTED = "FAULT_INJECTED", "A fault of a simulated device was set or cleared."
