"""Gang placement: all roles of a job at once, or nothing and the reason.

In go a job's spec and the free dies; out come seats. An instance takes whole NPUs inside one
supernode, on as few nodes as possible; spares sit on other nodes where possible; cache members
spread over hosts, first those without ranks of the job. Ties go to the lowest position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raddle.core.cluster import BoolArray, Cluster, IntArray
from raddle.model.job import InstancePlacement, JobSpec, Placement, RankPlacement, RoleSpec
from raddle.model.kinds import RoleKind, SeatState
from raddle.model.topology import node_of
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
        why = Why(reason="PLACED", message=message)
        return Placement(job_uid=job_uid, epoch=epoch, instances=self.instances, why=why)


def place_job(spec: JobSpec, cluster: Cluster) -> PlacedJob | Why:
    """Seats for every role of the job, or why it has to wait."""
    taken: BoolArray = np.zeros(cluster.dies, dtype=bool)
    found: dict[tuple[str, int], InstancePlacement] = {}
    by_size = sorted(
        (r for r in spec.roles if r.kind is not RoleKind.CACHE),
        key=lambda role: -(role.ranks + role.spares),
    )
    for role in by_size:
        for instance in range(role.instances):
            seats = _place_instance(role, cluster, taken)
            if isinstance(seats, Why):
                return seats
            found[role.name, instance] = InstancePlacement(
                role=role.name, instance=instance, ranks=seats
            )
    for role in spec.roles:
        if role.kind is not RoleKind.CACHE:
            continue
        members = _place_cache(role, cluster, found)
        if isinstance(members, Why):
            return members
        found.update(members)
    return PlacedJob(
        tuple(found[role.name, i] for role in spec.roles for i in range(role.instances))
    )


def _place_instance(
    role: RoleSpec, cluster: Cluster, taken: BoolArray
) -> tuple[RankPlacement, ...] | Why:
    free = cluster.free_dies(role.engine.driver) & ~taken
    needed = role.ranks
    for number, _ in enumerate(cluster.supernodes):
        here = free & (cluster.supernode_of == number)
        dies = _whole_npus(here, cluster, needed)
        if dies is None:
            continue
        spares = _spare_dies(here, cluster, dies, role.spares)
        if spares is None:
            continue
        taken[dies] = True
        taken[spares] = True
        return tuple(
            RankPlacement(
                rank=rank,
                die=cluster.positions[die],
                node=node_of(cluster.positions[die]),
                state=SeatState.ACTIVE if rank < role.ranks else SeatState.SPARE,
            )
            for rank, die in enumerate([*dies, *spares])
        )
    return _why_not(role, cluster, int(free.sum()))


def _why_not(role: RoleSpec, cluster: Cluster, free: int) -> Why:
    states = cluster.count_states()
    others = ", ".join(f"{count} {name}" for name, count in states.items() if count)
    dies = role.ranks + role.spares
    return Why(
        reason="WAITS_FOR_DIES",
        message=(
            f"an instance of role {role.name} needs {dies} free dies in whole NPUs of one supernode"
            f" on nodes with driver {role.engine.driver!r}; {free} are free"
            f" (machine: {others or 'no nodes'})"
        ),
    )


def _whole_npus(free: BoolArray, cluster: Cluster, needed: int) -> list[int] | None:
    """Dies in whole NPUs on as few nodes as possible: full nodes first, then the best fit."""
    dies = np.flatnonzero(free)
    if len(dies) < needed:
        return None
    whole = _in_whole_npus(dies, cluster)
    if len(whole) < needed:
        return None
    nodes, counts = np.unique(cluster.node_of[whole], return_counts=True)
    chosen: list[int] = []
    left = needed
    order = sorted(range(len(nodes)), key=lambda i: (-int(counts[i]), int(nodes[i])))
    used = [False] * len(nodes)
    for i in order:
        if left >= int(counts[i]):
            chosen += [int(d) for d in whole[cluster.node_of[whole] == nodes[i]]]
            left -= int(counts[i])
            used[i] = True
        if left == 0:
            break
    if left:
        # The smallest node that still holds the rest leaves the largest holes to others.
        fits = [i for i in order if not used[i] and int(counts[i]) >= left]
        if not fits:
            return None
        best = min(fits, key=lambda i: (int(counts[i]), int(nodes[i])))
        rest = whole[cluster.node_of[whole] == nodes[best]]
        chosen += [int(d) for d in rest[:left]]
    return sorted(chosen)


def _in_whole_npus(dies: IntArray, cluster: Cluster) -> IntArray:
    """Those free dies whose whole NPU is free."""
    npus = cluster.npu_of[dies]
    counts = np.bincount(npus, minlength=int(cluster.npu_of[-1]) + 1)
    sizes = np.bincount(cluster.npu_of)
    whole: IntArray = dies[counts[npus] == sizes[npus]]
    return whole


def _spare_dies(
    free: BoolArray, cluster: Cluster, active: list[int], count: int
) -> list[int] | None:
    """Dies held back: first on nodes without active ranks, then on other NPUs."""
    if count == 0:
        return []
    active_nodes = {int(cluster.node_of[d]) for d in active}
    active_npus = {int(cluster.npu_of[d]) for d in active}
    taken = set(active)
    candidates = [int(d) for d in np.flatnonzero(free) if int(d) not in taken]
    candidates.sort(
        key=lambda d: (
            int(cluster.npu_of[d]) in active_npus,
            int(cluster.node_of[d]) in active_nodes,
            d,
        )
    )
    return sorted(candidates[:count]) if len(candidates) >= count else None


def _place_cache(
    role: RoleSpec, cluster: Cluster, placed: dict[tuple[str, int], InstancePlacement]
) -> dict[tuple[str, int], InstancePlacement] | Why:
    """One member a host: hosts without ranks of the job first, so that one loss is not two."""
    load: dict[str, int] = {}
    for part in placed.values():
        for rank in part.ranks:
            load[rank.node] = load.get(rank.node, 0) + 1
    hosts = [
        host
        for host in cluster.usable_hosts(role.engine.driver)
        if cluster.host_memory(host) >= role.dram_bytes
    ]
    hosts.sort(key=lambda host: (load.get(host, 0), cluster.node_index[host]))
    if len(hosts) < role.ranks:
        return Why(
            reason="WAITS_FOR_HOSTS",
            message=(
                f"role {role.name} needs {role.ranks} hosts with driver {role.engine.driver!r} and"
                f" {role.dram_bytes} bytes of memory; {len(hosts)} are usable"
            ),
        )
    return {
        (role.name, instance): InstancePlacement(
            role=role.name,
            instance=instance,
            ranks=tuple(
                RankPlacement(rank=rank, node=host, state=SeatState.ACTIVE)
                for rank, host in enumerate(hosts[: role.ranks])
            ),
        )
        for instance in range(role.instances)
    }
