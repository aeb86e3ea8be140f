"""The pool's seats of a job: which slots of the map each keeps, and who hands blocks on first.

In go placements, drains and what pool members say of their repair; out come the placement's slots
and marks for the next epoch, and whether a member's process may end. A member on a part that is
drained first gets no slot and takes no block any more, at an epoch of the same members; its blocks
are copied to the others within the repair's budget; only then is it lost to the drain.
"""

from __future__ import annotations

from dataclasses import replace

from raddle.core.context import Context, Seat, active_seats, kv_replicas, role_of
from raddle.core.kvcache.slots import (
    SlotMember,
    assign_slots,
    pack_slots,
    slots_for,
    unpack_slots,
)
from raddle.model.health import RankStatus
from raddle.model.job import Job, Placement, RankPlacement, RoleSpec
from raddle.model.kinds import RoleKind, SeatState
from raddle.model.stats import KvRepair
from raddle.model.types import RankKey

#: Drivers whose pool members hand their blocks on and say when they have.
HANDING_ON_DRIVERS = ("reference",)


def _hands_on(role: RoleSpec) -> bool:
    return role.kind is RoleKind.CACHE and role.engine.driver in HANDING_ON_DRIVERS


def _is_to_drain(context: Context, role: RoleSpec, rank: RankPlacement) -> bool:
    return _hands_on(role) and context.is_draining(rank.node)


def with_slots(context: Context, job: Job, placement: Placement) -> Placement:
    """The placement with the slots of its pool members, as few of them moved as can be."""
    places = [
        (part_number, rank_number, role_of(job, part.role), rank)
        for part_number, part in enumerate(placement.instances)
        for rank_number, rank in enumerate(part.ranks)
        if role_of(job, part.role).kind is RoleKind.CACHE
    ]
    if not places:
        return placement
    if not _has_changed(context, places):
        return placement
    members: list[SlotMember] = []
    for _, _, role, rank in places:
        takes = rank.state is SeatState.ACTIVE and not _is_to_drain(context, role, rank)
        members.append(
            SlotMember(
                node=rank.node,
                rack=context.cluster.rack_name(rank.node),
                weight=float(max(1, role.dram_bytes)) if takes else 0.0,
                slots=unpack_slots(rank.kv_slots),
            )
        )
    replicas = max(kv_replicas(role) for _, _, role, _ in places)
    assigned = assign_slots(members, slots_for(len(places)), replicas)
    parts = [list(part.ranks) for part in placement.instances]
    for (part_number, rank_number, role, rank), slots in zip(places, assigned, strict=True):
        draining = rank.state is SeatState.ACTIVE and _is_to_drain(context, role, rank)
        parts[part_number][rank_number] = replace(
            rank, kv_slots=pack_slots(slots), kv_draining=draining
        )
    instances = tuple(
        replace(part, ranks=tuple(ranks))
        for part, ranks in zip(placement.instances, parts, strict=True)
    )
    return replace(placement, instances=instances)


def _has_changed(context: Context, places: list[tuple[int, int, RoleSpec, RankPlacement]]) -> bool:
    """Does a member have no slots that should have some, or the other way round?"""
    nodes: list[str] = []
    for _, _, role, rank in places:
        active = rank.state is SeatState.ACTIVE
        draining = active and _is_to_drain(context, role, rank)
        if bool(rank.kv_slots) != (active and not draining) or rank.kv_draining != draining:
            return True
        if active:
            nodes.append(rank.node)
    return len(set(nodes)) < len(nodes)


def is_untold(context: Context, job: Job) -> bool:
    """Has a drain of a pool member begun or ended that the job's epoch does not know of?"""
    placement = context.state.placement(job.uid)
    return placement is not None and any(
        _is_to_drain(context, seat.role, seat.placement) != seat.placement.kv_draining
        for seat in active_seats(context, job, placement)
    )


def is_handing_on(context: Context, job: Job, seat: Seat, status: RankStatus | None) -> bool:
    """Must the process of a drained seat go on, since it may hold blocks that others lack?"""
    if status is None or not _hands_on(seat.role):
        return False
    said = context.state.kv_repairs.get((job.uid, seat.key))
    if said is None or not seat.placement.kv_draining:
        return True
    incarnation, epoch, repair = said
    return (incarnation, epoch) != (status.incarnation, job.epoch) or not repair.is_handed_on


def copies_to_hand_on(context: Context, subject: str, job_uids: list[str]) -> int | None:
    """Copies that draining members under the subject still make; None if none of them waits."""
    found: list[int] = []
    for job_uid in job_uids:
        job, placement = context.state.job(job_uid), context.state.placement(job_uid)
        if job is None or placement is None:
            continue
        for seat in active_seats(context, job, placement):
            if seat.placement.kv_draining and context.is_under(seat.placement.node, subject):
                repair = repair_of(context, job_uid, seat.key)
                found.append(repair.copies_left if repair is not None else 0)
    return sum(found) if found else None


def repair_of(context: Context, job_uid: str, key: RankKey) -> KvRepair | None:
    """What the member's newest process last said of its repair."""
    said = context.state.kv_repairs.get((job_uid, key))
    return said[2] if said is not None else None
