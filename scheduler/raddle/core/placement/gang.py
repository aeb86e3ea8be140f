"""Gang placement: all roles of a job at once, or nothing and the reason.

In go a job's spec and the free dies; out come seats. An instance takes whole NPUs inside one
supernode, on as few nodes as possible; among nodes that fit, the fullest, so that room is left for
large instances. A job stays in one supernode if it can. Spares sit on other nodes where possible;
cache members spread over hosts, first those without ranks of the job. Ties go to the lowest
position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from raddle.core.cluster import BoolArray, Cluster, IntArray
from raddle.model.job import InstancePlacement, JobSpec, Placement, RankPlacement, RoleSpec
from raddle.model.kinds import RoleKind, SeatState
from raddle.model.reasons import Decision
from raddle.model.types import Why


@dataclass(frozen=True, slots=True)
class PlacedJob:
    """Seats of all instances of all roles."""

    instances: tuple[InstancePlacement, ...]

    def placement(self, job_uid: str, epoch: int) -> Placement:
        ranks = [rank for part in self.instances for rank in part.ranks]
        dies = sum(1 for rank in ranks if rank.die)
        nodes = len({rank.node for rank in ranks})
        message = f"{len(ranks)} ranks on {dies} dies of {nodes} nodes"
        why = Why(reason=Decision.PLACED, message=message)
        return Placement(job_uid=job_uid, epoch=epoch, instances=self.instances, why=why)


@dataclass(slots=True)
class _Draft:
    """One try: the supernodes that it may use, and what it has taken so far."""

    cluster: Cluster
    supernodes: tuple[int, ...]
    taken: BoolArray
    found: dict[tuple[str, int], InstancePlacement] = field(
        default_factory=dict[tuple[str, int], InstancePlacement]
    )
    #: Seats by node, of ranks with a die.
    load: dict[str, int] = field(default_factory=dict[str, int])


def place_job(spec: JobSpec, cluster: Cluster) -> PlacedJob | Why:
    """Seats for every role of the job, or why it has to wait."""
    why = Why(reason=Decision.WAITS_FOR_DIES, message="the cluster has no supernode yet")
    for supernodes in _tries(spec, cluster):
        draft = _Draft(cluster, supernodes, np.zeros(cluster.dies, dtype=bool))
        failed = _place_all(spec, draft)
        if failed is None:
            order = [(role.name, i) for role in spec.roles for i in range(role.instances)]
            return PlacedJob(tuple(draft.found[key] for key in order))
        why = failed
    return why


def _tries(spec: JobSpec, cluster: Cluster) -> Iterator[tuple[int, ...]]:
    """Each supernode with room for the whole job, the fullest first, then all together."""
    count = len(cluster.supernodes)
    by_room = list(range(count))
    if count > 1:
        dies = [role for role in spec.roles if role.kind is not RoleKind.CACHE]
        needed = sum(role.instances * (role.ranks + role.spares) for role in dies)
        free = cluster.free_dies(dies[0].engine.driver if dies else "")
        room = np.bincount(cluster.supernode_of[free], minlength=count)
        by_room.sort(key=lambda number: (int(room[number]), number))
        yield from ((number,) for number in by_room if room[number] >= needed)
    if count:
        yield tuple(by_room)


def _place_all(spec: JobSpec, draft: _Draft) -> Why | None:
    """Fill the draft; the reason if something finds no place."""
    large_first = sorted(
        (role for role in spec.roles if role.kind is not RoleKind.CACHE),
        key=lambda role: -(role.ranks + role.spares),
    )
    for role in large_first:
        for instance in range(role.instances):
            seats = _place_instance(role, draft)
            if seats is None:
                return _why_no_dies(role, spec, draft.cluster)
            draft.found[role.name, instance] = InstancePlacement(
                role=role.name, instance=instance, ranks=seats
            )
    members: dict[str, int] = {}
    taken_bytes: dict[str, int] = {}
    for role in spec.roles:
        if role.kind is not RoleKind.CACHE:
            continue
        for instance in range(role.instances):
            hosts = _cache_hosts(role, draft, members, taken_bytes)
            if hosts is None:
                return _why_no_hosts(role, draft, taken_bytes)
            draft.found[role.name, instance] = InstancePlacement(
                role=role.name,
                instance=instance,
                ranks=tuple(
                    RankPlacement(rank=rank, node=host, state=SeatState.ACTIVE)
                    for rank, host in enumerate(hosts)
                ),
            )
    return None


# --- dies ----------------------------------------------------------------------------------------


def _place_instance(role: RoleSpec, draft: _Draft) -> tuple[RankPlacement, ...] | None:
    cluster = draft.cluster
    free = cluster.free_dies(role.engine.driver) & ~draft.taken
    for number in draft.supernodes:
        here = free & (cluster.supernode_of == number)
        active = _whole_npus(here, cluster, role.ranks, role.spread_nodes)
        if active is None:
            continue
        spares = _spare_dies(here, cluster, active, role.spares)
        if spares is None:
            continue
        seats = _seats(role, cluster, [*active.tolist(), *spares.tolist()])
        draft.taken[active] = True
        draft.taken[spares] = True
        for seat in seats:
            draft.load[seat.node] = draft.load.get(seat.node, 0) + 1
        return seats
    return None


def _seats(role: RoleSpec, cluster: Cluster, dies: list[int]) -> tuple[RankPlacement, ...]:
    return tuple(
        RankPlacement(
            rank=rank,
            die=cluster.positions[die],
            node=cluster.node_names[int(cluster.node_of[die])],
            state=SeatState.ACTIVE if rank < role.ranks else SeatState.SPARE,
        )
        for rank, die in enumerate(dies)
    )


def _whole_npus(
    free: BoolArray, cluster: Cluster, needed: int, spread_nodes: int
) -> IntArray | None:
    """So many dies in whole NPUs of one supernode, in order of position."""
    npus = _free_npus(free, cluster)
    if not len(npus):
        return None
    size = int(cluster.npu_start[npus[0] + 1] - cluster.npu_start[npus[0]])
    nodes = cluster.node_of[cluster.npu_start[npus]]
    counts = np.bincount(nodes)
    if spread_nodes > 1:
        # No node carries more than its even share, so that its loss is no larger than that.
        counts = np.minimum(counts, -(-needed // (size * spread_nodes)))
    wanted = _npus_by_node(counts, -(-needed // size))
    if wanted is None:
        return None
    # An NPU's number among the free ones of its node: the first `wanted` of each node are taken.
    number = np.arange(len(npus)) - np.searchsorted(nodes, nodes)
    starts = cluster.npu_start[npus[number < wanted[nodes]]]
    dies: IntArray = (starts[:, None] + np.arange(size)).reshape(-1)[:needed]
    return dies


def _free_npus(free: BoolArray, cluster: Cluster) -> IntArray:
    """NPUs of which every die is free."""
    if not len(free):
        return np.zeros(0, dtype=np.int64)
    found: IntArray = np.flatnonzero(np.logical_and.reduceat(free, cluster.npu_start[:-1]))
    return found


def _npus_by_node(counts: IntArray, needed: int) -> IntArray | None:
    """How many NPUs to take of each node: few nodes, and the last one the fullest that fits."""
    if int(counts.sum()) < needed:
        return None
    order = np.argsort(-counts, kind="stable")
    upto = np.cumsum(counts[order])
    full = int(np.searchsorted(upto, needed))
    wanted: IntArray = np.zeros(len(counts), dtype=np.int64)
    wanted[order[:full]] = counts[order[:full]]
    rest = needed - int(wanted.sum())
    others = order[full:]
    others = others[counts[others] >= rest]
    best = others[np.lexsort((others, counts[others]))[0]]
    wanted[best] += rest
    return wanted


def _spare_dies(free: BoolArray, cluster: Cluster, active: IntArray, count: int) -> IntArray | None:
    """Dies held back: first on nodes without active ranks, then on other NPUs.

    Among equals, dies of NPUs that are not whole any more go first: they serve no instance.
    """
    left = free.copy()
    left[active] = False
    dies: IntArray = np.flatnonzero(left)
    if count == 0 or len(dies) < count:
        return dies[:0] if count == 0 else None
    same_npu = np.isin(cluster.npu_of[dies], cluster.npu_of[active])
    same_node = np.isin(cluster.node_of[dies], cluster.node_of[active])
    whole = np.isin(cluster.npu_of[dies], _free_npus(left, cluster))
    order = np.lexsort((dies, whole, same_node, same_npu))
    chosen: IntArray = np.sort(dies[order[:count]])
    return chosen


def _why_no_dies(role: RoleSpec, spec: JobSpec, cluster: Cluster) -> Why:
    driver = role.engine.driver
    needed = sum(
        other.instances * (other.ranks + other.spares)
        for other in spec.roles
        if other.kind is not RoleKind.CACHE and other.engine.driver == driver
    )
    states = cluster.count_states(driver)
    free = states.pop("free")
    others = "".join(f", {count} {name}" for name, count in states.items() if count)
    message = f"needs {needed} free dies on nodes offering driver {driver}; {free} are free{others}"
    if free >= needed:
        whole = _largest_whole(cluster, driver)
        message += (
            f"; an instance of role {role.name} needs {role.ranks} in whole NPUs of one supernode"
            f" and {role.spares} spares, the roomiest has {whole} in whole NPUs"
        )
    return Why(reason=Decision.WAITS_FOR_DIES, message=message)


def _largest_whole(cluster: Cluster, driver: str) -> int:
    """Free dies in whole NPUs of the supernode that has most of them."""
    npus = _free_npus(cluster.free_dies(driver), cluster)
    sizes = cluster.npu_start[npus + 1] - cluster.npu_start[npus]
    supernodes = cluster.supernode_of[cluster.npu_start[npus]]
    return int(np.bincount(supernodes, weights=sizes, minlength=1).max())


# --- hosts ---------------------------------------------------------------------------------------


def _cache_hosts(
    role: RoleSpec, draft: _Draft, members: dict[str, int], taken_bytes: dict[str, int]
) -> list[str] | None:
    """One host a member: without ranks of the job first, so that one loss is not two.

    Then hosts with the fewest members of the job, in racks that have the fewest of this instance.
    """
    cluster = draft.cluster
    hosts = _roomy_hosts(role, draft, taken_bytes)
    racks: dict[int, int] = {}
    chosen: list[str] = []

    def rank_host(host: str) -> tuple[int, int, int, int]:
        index = cluster.node_index[host]
        in_rack = racks.get(int(cluster.node_rack[index]), 0)
        return draft.load.get(host, 0), members.get(host, 0), in_rack, index

    while len(chosen) < role.ranks and hosts:
        best = min(hosts, key=rank_host)
        hosts.remove(best)
        chosen.append(best)
        rack = int(cluster.node_rack[cluster.node_index[best]])
        racks[rack] = racks.get(rack, 0) + 1
    if len(chosen) < role.ranks:
        return None
    for host in chosen:
        members[host] = members.get(host, 0) + 1
        taken_bytes[host] = taken_bytes.get(host, 0) + role.dram_bytes
    return chosen


def _roomy_hosts(role: RoleSpec, draft: _Draft, taken_bytes: dict[str, int]) -> list[str]:
    cluster = draft.cluster
    return [
        host
        for host in cluster.usable_hosts(role.engine.driver)
        if int(cluster.node_supernode[cluster.node_index[host]]) in draft.supernodes
        and cluster.host_memory(host) - taken_bytes.get(host, 0) >= role.dram_bytes
    ]


def _why_no_hosts(role: RoleSpec, draft: _Draft, taken_bytes: dict[str, int]) -> Why:
    usable = draft.cluster.usable_hosts(role.engine.driver)
    roomy = _roomy_hosts(role, draft, taken_bytes)
    return Why(
        reason=Decision.WAITS_FOR_HOSTS,
        message=(
            f"role {role.name} needs {role.ranks} hosts with {role.dram_bytes / 1e9:.1f} GB free on"
            f" nodes offering driver {role.engine.driver}; {len(usable)} hosts are usable,"
            f" {len(roomy)} of them have that memory"
        ),
    )
