"""Recoveries of one instance: every candidate has its numbers, the cheapest feasible is taken."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raddle.core.cluster import Cluster
from raddle.core.experts.layout import Layout
from raddle.core.experts.maps import check_map, to_array, to_expert_map
from raddle.core.experts.place import place_unknown_loads
from raddle.core.placement.gang import PlacedJob, place_job
from raddle.core.recovery.planner import InstanceDecision, plan_instance
from raddle.core.recovery.request import recovery_request
from raddle.model.health import ActiveFault, FaultLevel
from raddle.model.incident import RecoveryOption
from raddle.model.job import (
    InstanceExpertMap,
    InstancePlacement,
    Job,
    RecoverySpec,
    RoleSpec,
)
from raddle.model.kinds import FaultKind, RecoveryKind, SeatState
from raddle.model.types import WeightSource
from tests.core.machines import (
    DEEPSEEK,
    TINY,
    make_cache,
    make_cluster,
    make_role,
    make_spec,
    make_supernode,
)


class Placed:
    """One instance of one role, placed on a machine, with its map."""

    def __init__(
        self,
        role: RoleSpec,
        *,
        cluster: Cluster | None = None,
        config: dict[str, Any] | None = None,
        recovery: RecoverySpec | None = None,
        others: Sequence[RoleSpec] = (),
    ) -> None:
        self.role = role
        self.cluster = cluster or make_cluster(make_supernode(nodes=4))
        self.config = config or TINY
        self.job = Job(uid="j", spec=make_spec(role, *others, config=config, recovery=recovery))
        placed = place_job(self.job.spec, self.cluster)
        assert isinstance(placed, PlacedJob)
        self.part: InstancePlacement = placed.instances[0]
        for part in placed.instances:
            self.cluster.occupy([seat.die for seat in part.ranks if seat.die], "j")
        self.map = self._map() if role.slots_per_rank else None

    @property
    def experts(self) -> int:
        return int(self.config["n_routed_experts"])

    def _map(self) -> InstanceExpertMap:
        layers = int(self.config["num_hidden_layers"]) - int(
            self.config.get("first_k_dense_replace", 0)
        )
        width = self.role.slots_per_rank
        dies = [seat.die for seat in self.part.ranks if seat.state is SeatState.ACTIVE]
        table = place_unknown_loads(layers, self.experts, self.layout(dies, range(len(dies))))
        return InstanceExpertMap(expert_map=to_expert_map(table, width, self.experts))

    def layout(self, dies: Sequence[str], ranks: Sequence[int]) -> Layout:
        """The instance's dies with these ranks alive; the last ones host the shared expert."""
        routed = self.role.ranks - self.role.shared_expert_ranks
        hosts = np.isin(np.arange(len(dies)), [rank for rank in ranks if rank < routed])
        return Layout.of(self.cluster.domains(dies), self.role.slots_per_rank, hosts=hosts)

    def break_dies(self, *ranks: int) -> None:
        """The devices of these ranks report that they are to be separated."""
        by_node: dict[str, list[ActiveFault]] = {}
        for seat in self.part.ranks:
            if seat.rank in ranks:
                fault = ActiveFault(code="8", subject=seat.die, level=FaultLevel.SEPARATE_NPU)
                by_node.setdefault(seat.node, []).append(fault)
        for node, faults in by_node.items():
            self.cluster.set_faults(node, faults)

    def plan(
        self, *lost: int, kind: FaultKind = FaultKind.RANK_EXITED, demand: float = 0.0
    ) -> InstanceDecision:
        if kind is FaultKind.DIE_FAULT:
            self.break_dies(*lost)
        request = recovery_request(
            self.job,
            self.role,
            self.part,
            self.map,
            dict.fromkeys(lost, kind),
            self.cluster,
            demand=demand,
        )
        decision = plan_instance(request)
        self.check(decision, lost)
        return decision

    def check(self, decision: InstanceDecision, lost: Sequence[int]) -> None:
        """What must hold of every decision."""
        assert decision.why.reason
        assert decision.why.message
        assert sum(option.chosen for option in decision.considered) == (decision.option is not None)
        for option in decision.considered:
            assert option.why.reason
            assert option.why.message
        if decision.option is None:
            return
        active = [s.rank for s in decision.seats if s.state is SeatState.ACTIVE]
        assert len(active) == len(set(active))
        assert set(decision.starts) <= set(active) & set(lost)
        dies = [s.die for s in decision.seats if s.state is not SeatState.LOST and s.die]
        assert len(dies) == len(set(dies))
        for seat in decision.seats:
            if seat.rank in decision.starts and seat.die:
                assert self.cluster.is_usable(seat.die, "simulated", "j")
        if decision.expert_map is None:
            return
        table = to_array(decision.expert_map)
        placed = [seat.die for seat in self.part.ranks if seat.state is not SeatState.SPARE]
        assert check_map(table, self.experts, self.layout(placed, active)) == []
        for rank, moves in decision.moves.items():
            assert rank in active
            for move in moves:
                assert table[move.layer, move.slot] == move.expert
                if move.source is WeightSource.PEER:
                    assert move.source_rank in set(active) - set(decision.starts)


def of(decision: InstanceDecision, kind: RecoveryKind) -> RecoveryOption:
    return next(option for option in decision.considered if option.option is kind)


def redundant(**changes: Any) -> RoleSpec:
    """16 ranks x 2 slots hold 16 experts twice."""
    return make_role(**{"ranks": 16, "slots_per_rank": 2, **changes})


def exact(**changes: Any) -> RoleSpec:
    """16 ranks x 1 slot hold 16 experts, nothing is redundant."""
    return make_role(**{"ranks": 16, "slots_per_rank": 1, **changes})


def test_a_covered_loss_is_remapped() -> None:
    """Every expert has another copy: the survivors go on, nothing is loaded or started."""
    placed = Placed(redundant())
    decision = placed.plan(3)
    assert decision.option is RecoveryKind.REMAP
    assert (decision.starts, decision.moves) == ((), {})
    assert decision.why.message == "15 ranks left to go on, every expert has a live copy"
    seat = decision.seats[3]
    assert (seat.state, seat.why.reason) == (SeatState.LOST, "RANK_EXITED")
    assert [option.option for option in decision.considered] == [
        RecoveryKind.REMAP,
        RecoveryKind.DONOR_SLOT,
        RecoveryKind.HOT_SPARE,
        RecoveryKind.RESTART,
    ]
    assert of(decision, RecoveryKind.DONOR_SLOT).why.message.startswith("not needed")
    assert of(decision, RecoveryKind.HOT_SPARE).why.message == "no spare is usable"
    restart = of(decision, RecoveryKind.RESTART)
    assert restart.feasible
    assert restart.cost > of(decision, RecoveryKind.REMAP).cost
    assert of(decision, RecoveryKind.REMAP).capacity_left == pytest.approx(15 / 16)


def test_an_uncovered_loss_takes_donor_slots() -> None:
    """24 slots hold 16 experts: what was on the lost rank alone takes a redundant copy's slot."""
    placed = Placed(make_role(ranks=12, slots_per_rank=2))
    everywhere = [expert for rank in range(12) for expert in _of(placed, rank)]
    lost = next(r for r in range(12) if any(everywhere.count(e) == 1 for e in _of(placed, r)))
    decision = placed.plan(lost)
    assert decision.option is RecoveryKind.DONOR_SLOT
    assert decision.starts == ()
    option = of(decision, RecoveryKind.DONOR_SLOT)
    assert option.experts_moved == sum(len(moves) for moves in decision.moves.values()) > 0
    assert option.bytes_moved == option.experts_moved * 3 * 64 * 32
    assert of(decision, RecoveryKind.REMAP).why.message == "some expert has no live copy left"


def _of(placed: Placed, rank: int) -> list[int]:
    assert placed.map is not None
    width = placed.role.slots_per_rank
    row = to_array(placed.map.expert_map)[0]
    return [int(e) for e in row[rank * width : (rank + 1) * width] if e >= 0]


def test_without_redundancy_a_process_restarts_in_its_seat() -> None:
    """No slot can take its expert: a new process on the same healthy die loads it again."""
    placed = Placed(exact())
    decision = placed.plan(3)
    assert decision.option is RecoveryKind.RESTART
    assert decision.starts == (3,)
    assert decision.seats == placed.part.ranks
    assert len(decision.moves[3]) == 4
    assert "no slot for 4 experts" in of(decision, RecoveryKind.DONOR_SLOT).why.message


def test_a_spare_takes_the_place_of_a_broken_die() -> None:
    """The lost rank goes on under its number on the spare die; the spare seat is used up."""
    placed = Placed(exact(spares=1))
    spare = placed.part.ranks[16]
    decision = placed.plan(3, kind=FaultKind.DIE_FAULT)
    assert decision.option is RecoveryKind.HOT_SPARE
    assert (decision.starts, decision.seats[3].die) == ((3,), spare.die)
    assert len(decision.seats) == 16
    assert all(seat.state is SeatState.ACTIVE for seat in decision.seats)


def test_a_broken_spare_is_no_spare() -> None:
    """The spare die is faulty itself: a free die is used instead."""
    placed = Placed(exact(spares=1))
    placed.break_dies(16)
    decision = placed.plan(3, kind=FaultKind.DIE_FAULT)
    assert decision.option is RecoveryKind.RESTART
    assert decision.seats[3].die not in {seat.die for seat in placed.part.ranks}


def test_a_broken_die_is_replaced_by_a_free_one() -> None:
    """No spare: a free die takes the rank, first of an NPU that is no longer whole."""
    cluster = make_cluster(make_supernode(nodes=4))
    cluster.occupy([cluster.positions[63]], "other")
    placed = Placed(exact(), cluster=cluster)
    decision = placed.plan(3, kind=FaultKind.DIE_FAULT)
    assert decision.option is RecoveryKind.RESTART
    assert decision.seats[3].die == cluster.positions[62]


def test_nothing_feasible_says_why_for_each() -> None:
    """A full machine without redundancy or spares: no option, and each reason is named."""
    placed = Placed(exact(), cluster=make_cluster(make_supernode(nodes=1)))
    decision = placed.plan(3, kind=FaultKind.DIE_FAULT)
    assert decision.option is None
    assert decision.why.reason == "NO_OPTION"
    for word in ("REMAP", "DONOR_SLOT", "HOT_SPARE", "RESTART"):
        assert f"{word}: " in decision.why.message


def test_too_few_spares_replace_whom_they_can() -> None:
    """Two broken dies, one spare, demand that one missing rank can serve: one rank leaves."""
    cluster = make_cluster(make_supernode(nodes=2))
    placed = Placed(redundant(spares=1), cluster=cluster)
    cluster.occupy([p for p in cluster.positions if cluster.owner_of(p) is None], "other")
    decision = placed.plan(3, 4, kind=FaultKind.DIE_FAULT, demand=1.0)
    assert decision.option is RecoveryKind.HOT_SPARE
    assert decision.why.message == "1 rank moved to spare dies, 1 rank gone"
    assert decision.starts == (3,)
    assert decision.seats[4].state is SeatState.LOST


def test_demand_decides_between_small_and_whole() -> None:
    """Idle, the instance shrinks at once; fully loaded, a longer pause keeps it whole."""
    assert Placed(redundant()).plan(3, demand=0.5).option is RecoveryKind.REMAP
    busy = Placed(redundant()).plan(3, demand=1.0)
    assert busy.option is RecoveryKind.RESTART
    assert of(busy, RecoveryKind.REMAP).why.message.startswith("costs ")


def test_a_job_may_forbid_options() -> None:
    """Only RESTART is allowed: the cheaper remap is not taken, and says so."""
    placed = Placed(redundant(), recovery=RecoverySpec(allowed_options=("RESTART",)))
    decision = placed.plan(3)
    assert decision.option is RecoveryKind.RESTART
    assert of(decision, RecoveryKind.REMAP).why.message == "the job does not allow it"


def test_a_pause_that_is_too_long_is_avoided_while_there_is_a_choice() -> None:
    """max_pause forbids the restart that demand alone would choose; alone, it is taken."""
    limit = RecoverySpec(max_pause=0.5)
    decision = Placed(redundant(), recovery=limit).plan(3, demand=1.0)
    assert decision.option is RecoveryKind.REMAP
    assert "max_pause is 0.5 s" in of(decision, RecoveryKind.RESTART).why.message
    assert Placed(exact(), recovery=limit).plan(3).option is RecoveryKind.RESTART


def test_nobody_lost_is_a_reconnect() -> None:
    """The same seats and map start a new epoch."""
    placed = Placed(redundant())
    decision = placed.plan()
    assert decision.option is RecoveryKind.RECONNECT
    assert decision.seats == placed.part.ranks
    assert placed.map is not None
    assert decision.expert_map == placed.map.expert_map
    assert decision.starts == ()


def test_a_drained_rank_never_restarts_in_its_seat() -> None:
    """What is drained leaves: its seat says so and no process starts there."""
    placed = Placed(redundant())
    placed.cluster.set_hold(placed.part.ranks[3].die, held=True)
    decision = placed.plan(3, kind=FaultKind.DRAIN)
    assert decision.option is RecoveryKind.REMAP
    assert decision.seats[3].state is SeatState.DRAINED
    exactly = Placed(exact())
    moved = exactly.plan(3, kind=FaultKind.DRAIN)
    assert moved.option is RecoveryKind.RESTART
    assert moved.seats[3].die != exactly.part.ranks[3].die


def test_the_last_rank_can_not_leave() -> None:
    """All ranks are lost: only new processes help."""
    placed = Placed(make_role(ranks=2, slots_per_rank=16))
    decision = placed.plan(0, 1)
    assert decision.option is RecoveryKind.RESTART
    assert decision.starts == (0, 1)
    assert all(m.source is WeightSource.DISK for ms in decision.moves.values() for m in ms)
    assert "no rank of the instance survives" in of(decision, RecoveryKind.DONOR_SLOT).why.message


def test_the_shared_expert_needs_a_rank() -> None:
    """The only rank with the shared expert is lost: the instance can't go on without it."""
    placed = Placed(make_role(ranks=17, slots_per_rank=2, shared_expert_ranks=1))
    decision = placed.plan(16)
    assert decision.option is RecoveryKind.RESTART
    assert "no rank with the shared expert survives" in of(decision, RecoveryKind.REMAP).why.message


def test_a_rank_without_experts_just_leaves() -> None:
    """Ranks of a dense model need no map: the others go on."""
    placed = Placed(make_role(ranks=4, slots_per_rank=0))
    decision = placed.plan(1)
    assert (decision.option, decision.expert_map) == (RecoveryKind.REMAP, None)


def test_a_pool_member_leaves_and_even_the_last_one_may() -> None:
    """A pool without members is a miss for every block: the job goes on."""
    placed = Placed(make_cache(ranks=2), others=[make_role()])
    decision = placed.plan(0)
    assert decision.option is RecoveryKind.REMAP
    assert decision.seats[0].state is SeatState.LOST
    assert decision.why.message == "1 rank left to go on"
    donor = of(decision, RecoveryKind.DONOR_SLOT)
    assert donor.why.message == "not needed: the instance holds no experts"
    assert donor.cost == 0
    assert placed.plan(0, 1).option is RecoveryKind.REMAP


def test_a_pool_member_moves_to_a_host_with_memory() -> None:
    """Allowed to restart only, and its host gone, it starts on the next host with room."""
    placed = Placed(
        make_cache(ranks=1),
        others=[make_role()],
        recovery=RecoverySpec(allowed_options=("RESTART",)),
    )
    home = placed.part.ranks[0].node
    placed.cluster.set_node(home, ready=False, drivers=("simulated",), host_memory_bytes=0)
    placed.cluster.occupy_host("sn0/n00", "other", 3_000_000_000_000)
    decision = placed.plan(0, kind=FaultKind.NODE_LOST)
    assert decision.option is RecoveryKind.RESTART
    assert decision.seats[0].node not in (home, "sn0/n00")


def test_losses_may_follow_each_other() -> None:
    """Rank after rank leaves; the map stays sound until no slot is left for some expert."""
    placed = Placed(redundant(), recovery=RecoverySpec(allowed_options=("REMAP", "DONOR_SLOT")))
    kinds = []
    for lost in range(16):
        decision = placed.plan(lost)
        kinds.append(decision.option)
        if decision.option is None:
            break
        assert decision.expert_map is not None
        placed.part = InstancePlacement(ranks=decision.seats)
        placed.map = InstanceExpertMap(expert_map=decision.expert_map)
    # 8 ranks x 2 slots are the least that hold 16 experts.
    assert kinds == [*[k for k in kinds if k is not None], None]
    assert len(kinds) == 9


def test_a_large_instance_is_decided_fast() -> None:
    """One die of EP320: a plan within a second of CPU, at most 58 experts loaded."""
    placed = Placed(make_role(ranks=320, slots_per_rank=1), cluster=make_cluster(), config=DEEPSEEK)
    start = time.process_time()
    decision = placed.plan(100, kind=FaultKind.DIE_FAULT)
    assert time.process_time() - start < 1.0
    assert decision.option in (RecoveryKind.REMAP, RecoveryKind.DONOR_SLOT)
    assert sum(len(moves) for moves in decision.moves.values()) <= 58


@settings(max_examples=60, deadline=None)
@given(
    lost=st.sets(st.integers(0, 11), min_size=1),
    kind=st.sampled_from([FaultKind.RANK_EXITED, FaultKind.DIE_FAULT, FaultKind.DRAIN]),
    width=st.integers(2, 4),
    spares=st.integers(0, 2),
    shared=st.integers(0, 2),
    demand=st.sampled_from([0.0, 0.7, 1.0]),
)
def test_every_decision_is_sound(
    lost: set[int], kind: FaultKind, width: int, spares: int, shared: int, demand: float
) -> None:
    """Seats, map, loads and reasons hold together, and the choice is the cheapest feasible."""
    role = make_role(ranks=12, slots_per_rank=width, spares=spares, shared_expert_ranks=shared)
    placed = Placed(role, cluster=make_cluster(make_supernode(nodes=2)))
    decision = placed.plan(*sorted(lost), kind=kind, demand=demand)
    feasible = [option for option in decision.considered if option.feasible]
    if not feasible:
        assert decision.option is None
        return
    chosen = next(option for option in feasible if option.chosen)
    assert chosen.option is decision.option
    assert chosen.cost == min(option.cost for option in feasible)
