"""Nodes and dies as lists, and what a replica says of itself: read from the mirror."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from raddle.core.context import is_ended
from raddle.core.nodes import NodeTracker
from raddle.model import keys
from raddle.model.health import ActiveFault, AgentHealth, AgentRegistration, FaultLevel, Hold
from raddle.model.job import Placement
from raddle.model.kinds import HoldKind, NodeState, SeatState
from raddle.model.reasons import Decision
from raddle.model.topology import SuperNode, node_of
from raddle.model.types import RankKey
from raddle.scheduler.mirror import Mirror
from raddle.scheduler.replica import Replica
from raddle.scheduler.view import Records
from raddle.v1 import health_pb2, scheduler_pb2, topology_pb2, types_pb2
from raddle.wire.codec import to_message

_LEVELS = list(FaultLevel)
_HOLD_KINDS = list(HoldKind)
_TAKEN = (SeatState.ACTIVE, SeatState.SPARE)


def _supernodes(mirror: Mirror) -> list[SuperNode]:
    return [value for _, value in mirror.under(keys.TOPOLOGY)]


def _work(mirror: Mirror) -> dict[str, tuple[str, RankKey, str]]:
    """Die -> (job uid, rank, seat state) of all placements."""
    found = {}
    for _, placement in mirror.under(keys.PLACEMENTS):
        assert isinstance(placement, Placement)
        for part in placement.instances:
            for rank in part.ranks:
                if rank.die and rank.state in _TAKEN:
                    key = RankKey(role=part.role, instance=part.instance, rank=rank.rank)
                    found[rank.die] = (placement.job_uid, key, str(rank.state))
    return found


def _seats(mirror: Mirror) -> Counter[str]:
    """Node -> seats of all placements there, those in host memory too."""
    return Counter(
        rank.node
        for _, placement in mirror.under(keys.PLACEMENTS)
        for part in placement.instances
        for rank in part.ranks
        if rank.state in _TAKEN
    )


def holds_by_subject(mirror: Records) -> dict[str, list[Hold]]:
    """All holds; of one subject the strongest kind first."""
    found: dict[str, list[Hold]] = {}
    for _, hold in mirror.under(keys.HOLDS):
        found.setdefault(hold.subject, []).append(hold)
    for holds in found.values():
        holds.sort(key=lambda hold: -_HOLD_KINDS.index(hold.kind))
    return found


def holds_over(holds: dict[str, list[Hold]], position: str) -> list[Hold]:
    """Holds on a part and on what it is part of, the nearest first."""
    parts = position.split("/")
    prefixes = ["/".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    return [hold for prefix in prefixes for hold in holds.get(prefix, ())]


def _faults_of(health: AgentHealth | None, die: str) -> list[ActiveFault]:
    faults = health.active_faults if health is not None else ()
    return [f for f in faults if die == f.subject or die.startswith(f"{f.subject}/")]


def dies(mirror: Mirror, node: str) -> list[scheduler_pb2.DieStatus]:
    """Dies of one node, or all, in order."""
    names = node_names(mirror)
    wanted = names if not node else [node] if node in names else []
    return [die for found in dies_of(mirror, wanted).values() for die in found]


def node_names(mirror: Mirror) -> dict[str, SuperNode]:
    """Names of all nodes, in order, and the supernode that each is part of."""
    return {name: s for s in _supernodes(mirror) for name in s.node_names()}


def dies_of(mirror: Mirror, wanted: Iterable[str]) -> dict[str, list[scheduler_pb2.DieStatus]]:
    """The dies of nodes that exist, each in order."""
    names, work, holds = node_names(mirror), _work(mirror), holds_by_subject(mirror)
    return {
        name: [
            _die(mirror, position, work, holds_over(holds, position))
            for position in names[name].node_positions(name)
        ]
        for name in wanted
    }


def _die(
    mirror: Mirror, position: str, work: dict[str, tuple[str, RankKey, str]], holds: list[Hold]
) -> scheduler_pb2.DieStatus:
    status = scheduler_pb2.DieStatus(die=position)
    if holds:
        status.hold = holds[0].kind
        status.why.reason, status.why.message = holds[0].reason, holds[0].message
        status.holds.extend(to_message(hold, health_pb2.Hold) for hold in holds)
    health: AgentHealth | None = mirror.get(keys.health(node_of(position)))
    for held in health.holders if health is not None else ():
        if held.die == position:
            status.holder = held.pod
    faults = _faults_of(health, position)
    status.faults.extend(to_message(fault, health_pb2.ActiveFault) for fault in faults)
    if faults:
        worst = max(_LEVELS.index(fault.level) for fault in faults)
        status.health = health_pb2.FaultLevel.ValueType(worst)
    if position in work:
        status.job_uid, key, status.rank_state = work[position]
        status.rank.CopyFrom(to_message(key, types_pb2.RankKey))
    registration: AgentRegistration | None = mirror.get(keys.registration(node_of(position)))
    for part in registration.parts if registration is not None else ():
        if part.position == position:
            status.part.CopyFrom(to_message(part, topology_pb2.PartIdentity))
    return status


def nodes(mirror: Mirror, replica: Replica) -> list[scheduler_pb2.NodeStatus]:
    """All nodes of all supernodes, in order, with what the leader believes of them."""
    tracker = replica.leader.nodes() if replica.leader is not None else None
    return [status for status, _ in pictures(mirror, node_names(mirror), tracker)]


def pictures(
    mirror: Mirror, wanted: Iterable[str], tracker: NodeTracker | None
) -> list[tuple[scheduler_pb2.NodeStatus, list[scheduler_pb2.DieStatus]]]:
    """Nodes that exist, each with its dies and what the leader believes of it."""
    seats = _seats(mirror)
    found = []
    for name, dies_here in dies_of(mirror, wanted).items():
        status = _node(mirror, name, dies_here, tracker)
        status.ranks = seats[name]
        found.append((status, dies_here))
    return found


def _node(
    mirror: Mirror,
    name: str,
    found: list[scheduler_pb2.DieStatus],
    tracker: NodeTracker | None,
) -> scheduler_pb2.NodeStatus:
    registration: AgentRegistration | None = mirror.get(keys.registration(name))
    status = scheduler_pb2.NodeStatus(node=name, state=NodeState.ABSENT, dies=len(found))
    status.why.reason, status.why.message = Decision.ABSENT, "no agent ever registered"
    if registration is not None:
        status.drivers.extend(registration.drivers)
        status.version = registration.version
        status.host = registration.host
    if tracker is not None and name in tracker.nodes:
        node = tracker.nodes[name]
        status.state = node.state
        status.why.reason, status.why.message = node.why.reason, node.why.message
    for die in found:
        severe = die.health >= health_pb2.FAULT_LEVEL_RESTART_REQUEST
        status.dies_held += bool(die.hold)
        status.dies_faulty += severe
        status.dies_free += not (die.hold or die.job_uid or severe)
    return status


def status(mirror: Mirror, replica: Replica) -> scheduler_pb2.GetStatusResponse:
    """What this replica is and sees."""
    record = replica.leader_record()
    running = [job for _, job in mirror.under(keys.JOBS) if not is_ended(job)]
    leases = sum(1 for key, _ in mirror.under(keys.AGENTS) if key.endswith("/health"))
    answer = scheduler_pb2.GetStatusResponse(
        version=replica.version,
        identity=replica.identity,
        leader=replica.leader is not None,
        leader_identity=record.identity if record else "",
        leader_address=record.address if record else "",
        store_version=replica.store_version,
        store_revision=mirror.revision,
        jobs=len(running),
        nodes_ready=leases,
        records_set_aside=len(mirror.set_aside) + len(mirror.too_new),
        fault_injection=replica.fault_injection,
    )
    answer.start_time.FromSeconds(int(replica.start_time or time.time()))
    return answer
