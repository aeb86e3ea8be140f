"""What a recovery of one instance has to know, gathered from the job and the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from raddle.core.admission import model_shape
from raddle.core.cluster import Cluster
from raddle.core.experts.layout import FloatArray, IntArray
from raddle.core.experts.maps import to_array
from raddle.core.recovery.cost import Rates
from raddle.model.job import InstanceExpertMap, InstancePlacement, Job, RankPlacement, RoleSpec
from raddle.model.kinds import FaultKind, RecoveryKind, SeatState


@dataclass(frozen=True, slots=True)
class InstanceRecovery:
    """One instance that lost ranks."""

    role: RoleSpec
    seats: tuple[RankPlacement, ...]
    #: Why each lost rank is lost.
    lost: Mapping[int, FaultKind]
    #: Lost ranks whose own seat can take a new process.
    restartable: tuple[int, ...]
    #: Usable spare seats of the instance.
    spares: tuple[RankPlacement, ...]
    #: Free dies (or hosts, for cache roles) that could take a lost rank, best first.
    fresh: tuple[str, ...]
    #: [layers, slots] or None for an instance without experts.
    table: IntArray | None
    experts: int
    #: [levels, ranks] by rank number; None without dies.
    domains: IntArray | None
    allowed: tuple[RecoveryKind, ...]
    rates: Rates
    #: Work that is asked of the instance, as a share of what it can do when whole.
    demand: float = 0.0
    #: The longest pause that the job wants to see; 0 for no wish.
    max_pause_s: float = 0.0
    #: [layers, experts] as the ranks report it; None while nobody has said anything.
    loads: FloatArray | None = None


def recovery_request(
    job: Job,
    role: RoleSpec,
    part: InstancePlacement,
    expert_map: InstanceExpertMap | None,
    lost: Mapping[int, FaultKind],
    cluster: Cluster,
    *,
    demand: float,
    loads: FloatArray | None = None,
) -> InstanceRecovery:
    """Gather the facts of one instance."""
    shape = model_shape(job.spec.model)
    by_rank = {seat.rank: seat for seat in part.ranks}
    driver = role.engine.driver
    restartable = tuple(
        rank
        for rank in sorted(lost)
        if _can_restart(by_rank[rank], lost[rank], driver, job.uid, cluster)
    )
    spares = tuple(
        seat
        for seat in part.ranks
        if seat.state is SeatState.SPARE and cluster.is_usable(seat.die, driver, job.uid)
    )
    allowed = tuple(
        kind
        for kind in RecoveryKind
        if not job.spec.recovery.allowed_options or kind in job.spec.recovery.allowed_options
    )
    return InstanceRecovery(
        role=role,
        seats=part.ranks,
        lost=lost,
        restartable=restartable,
        spares=spares,
        fresh=_fresh(role, part, lost, cluster),
        table=to_array(expert_map.expert_map) if expert_map is not None else None,
        experts=shape.experts,
        domains=_domains(part, cluster),
        allowed=allowed,
        rates=Rates.of(shape, job.spec.model.weight_dtype, cluster),
        demand=demand,
        max_pause_s=job.spec.recovery.max_pause,
        loads=loads,
    )


def _can_restart(
    seat: RankPlacement, kind: FaultKind, driver: str, job_uid: str, cluster: Cluster
) -> bool:
    if kind is FaultKind.DRAIN:
        return False
    if not seat.die:
        return seat.node in cluster.usable_hosts(driver)
    return cluster.is_usable(seat.die, driver, job_uid)


def _fresh(
    role: RoleSpec, part: InstancePlacement, lost: Mapping[int, FaultKind], cluster: Cluster
) -> tuple[str, ...]:
    """Free places in the same supernode, whole count at most what is lost."""
    taken = {seat.node for seat in part.ranks if seat.state is SeatState.ACTIVE}
    if any(not seat.die for seat in part.ranks):
        hosts = cluster.usable_hosts(role.engine.driver)
        return tuple(
            host
            for host in hosts
            if host not in taken and cluster.host_memory(host) >= role.dram_bytes
        )[: len(lost)]
    free = cluster.free_dies(role.engine.driver)
    home = cluster.supernode_of[cluster.die_index[part.ranks[0].die]]
    dies = np.flatnonzero(free & (cluster.supernode_of == home))
    # Dies of broken NPUs first: whole ones serve instances. Then nodes that the instance uses
    # already: fewer nodes are fewer ways to fail.
    free_in_npu = np.bincount(cluster.npu_of[free], minlength=len(cluster.npu_start) - 1)
    whole = (free_in_npu == np.diff(cluster.npu_start))[cluster.npu_of[dies]]
    used = np.array([cluster.node_names[n] in taken for n in cluster.node_of[dies]], dtype=bool)
    order = np.lexsort((dies, ~used, whole))
    chosen: list[int] = dies[order[: len(lost)]].tolist()
    return tuple(cluster.positions[die] for die in chosen)


def _domains(part: InstancePlacement, cluster: Cluster) -> IntArray | None:
    if any(not seat.die for seat in part.ranks):
        return None
    by_rank = sorted(part.ranks, key=lambda seat: seat.rank)
    active_or_lost = [seat.die for seat in by_rank if seat.state is not SeatState.SPARE]
    return cluster.domains(active_or_lost)
