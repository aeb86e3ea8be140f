"""Gang placement: whole or not at all, with a reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from raddle.core.cluster import Cluster
from raddle.core.placement.gang import PlacedJob, place_job
from raddle.model.health import ActiveFault, FaultLevel
from raddle.model.job import JobSpec, RankPlacement
from raddle.model.kinds import SeatState
from raddle.model.types import Why
from tests.core.machines import make_cache, make_cluster, make_role, make_spec, make_supernode


def placed(spec: JobSpec, cluster: Cluster) -> PlacedJob:
    found = place_job(spec, cluster)
    assert isinstance(found, PlacedJob), found
    return found


def why_not(spec: JobSpec, cluster: Cluster) -> Why:
    found = place_job(spec, cluster)
    assert isinstance(found, Why), found
    return found


def seats(job: PlacedJob, role: str, state: SeatState = SeatState.ACTIVE) -> list[RankPlacement]:
    return [r for p in job.instances if p.role == role for r in p.ranks if r.state is state]


def nodes(ranks: list[RankPlacement]) -> list[str]:
    return sorted({rank.node for rank in ranks})


def test_an_instance_takes_one_node_in_order() -> None:
    """16 ranks fill the first node, one rank a die in the order of positions."""
    cluster = make_cluster()
    ranks = seats(placed(make_spec(), cluster), "decode")
    assert [rank.die for rank in ranks] == cluster.positions[:16]
    assert [rank.rank for rank in ranks] == list(range(16))


def test_an_instance_takes_as_few_nodes_as_possible() -> None:
    """4 ranks go to one node with room, though two half-taken nodes come first."""
    cluster = make_cluster(make_supernode(nodes=3))
    cluster.occupy(cluster.positions[2:16] + cluster.positions[18:32], "other")
    ranks = seats(placed(make_spec(make_role(ranks=4, slots_per_rank=4)), cluster), "decode")
    assert nodes(ranks) == ["sn0/n02"]


def test_the_fullest_node_that_fits_is_taken() -> None:
    """4 ranks go where just 6 dies are left, so that a whole node stays for a large instance."""
    cluster = make_cluster(make_supernode(nodes=3))
    cluster.occupy(cluster.positions[16:26], "other")
    ranks = seats(placed(make_spec(make_role(ranks=4, slots_per_rank=4)), cluster), "decode")
    assert [rank.die for rank in ranks] == cluster.positions[26:30]


def test_only_whole_npus_are_taken() -> None:
    """An NPU with one busy die serves no instance."""
    cluster = make_cluster(make_supernode(nodes=1))
    cluster.occupy(cluster.positions[:1], "other")
    ranks = seats(placed(make_spec(make_role(ranks=14)), cluster), "decode")
    assert [rank.die for rank in ranks] == cluster.positions[2:]
    why = why_not(make_spec(make_role(ranks=15)), cluster)
    assert why.message == (
        "needs 15 free dies on nodes offering driver simulated; 15 are free, 1 busy; an instance of"
        " role decode needs 15 in whole NPUs of one supernode and 0 spares, the roomiest has 14 in"
        " whole NPUs"
    )


def test_why_counts_every_die() -> None:
    """The wait says what is needed, what is free, and what the rest does."""
    cluster = make_cluster()
    cluster.occupy(cluster.positions[:456], "other")
    cluster.set_hold("sn0/n47", held=True)
    bad = [
        ActiveFault(code="8", subject=f"sn0/n46/npu{n}", level=FaultLevel.SEPARATE_NPU)
        for n in range(4)
    ]
    cluster.set_faults("sn0/n46", bad)
    why = why_not(make_spec(make_role(ranks=320)), cluster)
    assert why.reason == "WAITS_FOR_DIES"
    assert why.message == (
        "needs 320 free dies on nodes offering driver simulated;"
        " 288 are free, 456 busy, 16 held, 8 faulty"
    )


def test_nothing_is_placed_unless_all_is() -> None:
    """The second role does not fit: the job waits, whatever room the first has."""
    cluster = make_cluster(make_supernode(nodes=2))
    spec = make_spec(make_role("prefill"), make_role("decode", ranks=17))
    why = why_not(spec, cluster)
    assert why.message.startswith("needs 33 free dies on nodes offering driver simulated; 32 are")


def test_the_driver_decides_which_nodes() -> None:
    """Each role goes only to nodes that offer its driver."""
    cluster = make_cluster(make_supernode(nodes=3))
    cluster.set_node("sn0/n02", ready=True, drivers=("reference",), host_memory_bytes=0)
    engine = replace(make_role().engine, driver="reference")
    ranks = seats(placed(make_spec(make_role(engine=engine)), cluster), "decode")
    assert nodes(ranks) == ["sn0/n02"]
    assert (
        "48 on nodes without the driver"
        not in why_not(make_spec(make_role(ranks=20, engine=engine)), cluster).message
    )


def test_spares_sit_on_other_nodes() -> None:
    """A node's loss must not take ranks and their spares together, while other nodes have room."""
    cluster = make_cluster(make_supernode(nodes=2))
    job = placed(make_spec(make_role(ranks=8, spares=2)), cluster)
    spares = seats(job, "decode", SeatState.SPARE)
    assert nodes(seats(job, "decode")) == ["sn0/n00"]
    assert [spare.die for spare in spares] == cluster.positions[16:18]
    assert [spare.rank for spare in spares] == [8, 9]


def test_spares_use_broken_npus_first() -> None:
    """Among equals a spare takes the die whose NPU serves no instance any more."""
    cluster = make_cluster(make_supernode(nodes=2))
    cluster.occupy([cluster.positions[27]], "other")
    job = placed(make_spec(make_role(ranks=16, spares=1)), cluster)
    assert [s.die for s in seats(job, "decode", SeatState.SPARE)] == [cluster.positions[26]]


def test_a_job_stays_in_the_supernode_that_it_fills_best() -> None:
    """Both supernodes have room; the fuller one is taken, and for all roles."""
    cluster = make_cluster(make_supernode("a", nodes=4), make_supernode("b", nodes=4))
    cluster.occupy([p for p in cluster.positions if p.startswith("b/n00")], "other")
    spec = make_spec(make_role("prefill"), make_role("decode"), make_cache(ranks=1))
    job = placed(spec, cluster)
    assert {rank.node[0] for part in job.instances for rank in part.ranks} == {"b"}


def test_instances_may_go_to_several_supernodes() -> None:
    """No supernode has room for both instances, but each for one."""
    cluster = make_cluster(make_supernode("a", nodes=1), make_supernode("b", nodes=1))
    job = placed(make_spec(make_role(instances=2)), cluster)
    assert [nodes(list(part.ranks)) for part in job.instances] == [["a/n00"], ["b/n00"]]


def test_pool_members_avoid_the_jobs_own_ranks() -> None:
    """Members go to hosts without ranks of the job, one a host, over racks."""
    cluster = make_cluster(make_supernode(nodes=12))
    job = placed(make_spec(make_role(ranks=32), make_cache(ranks=3)), cluster)
    assert nodes(seats(job, "decode")) == ["sn0/n00", "sn0/n01"]
    assert nodes(seats(job, "cache")) == ["sn0/n02", "sn0/n04", "sn0/n08"]
    assert all(rank.die == "" for rank in seats(job, "cache"))


def test_host_memory_is_counted_over_instances() -> None:
    """Two pools don't fit into one host's memory twice; the wait says so."""
    cluster = make_cluster(make_supernode(nodes=2))
    cache = make_cache(ranks=1, instances=2, dram_bytes=2_000_000_000_000)
    job = placed(make_spec(make_role(), cache), cluster)
    assert nodes(seats(job, "cache")) == ["sn0/n00", "sn0/n01"]
    why = why_not(make_spec(make_role(), replace(cache, instances=3)), cluster)
    assert why.reason == "WAITS_FOR_HOSTS"
    assert why.message == (
        "role cache needs 1 hosts with 2000.0 GB free on nodes offering driver simulated;"
        " 2 hosts are usable, 0 of them have that memory"
    )


def test_memory_of_other_jobs_counts() -> None:
    """A host whose memory another job took is passed over."""
    cluster = make_cluster(make_supernode(nodes=3))
    cluster.occupy_host("sn0/n01", "other", 3_000_000_000_000)
    job = placed(make_spec(make_role(), make_cache(ranks=1)), cluster)
    assert nodes(seats(job, "cache")) == ["sn0/n02"]


def test_an_empty_cluster_lets_jobs_wait() -> None:
    """Without a supernode there is a reason, not an error."""
    assert why_not(make_spec(), Cluster([])).reason == "WAITS_FOR_DIES"


@settings(max_examples=80, deadline=None)
@given(
    busy=st.sets(st.integers(0, 127)),
    held=st.sets(st.integers(0, 127), max_size=8),
    ranks=st.integers(1, 40),
    spares=st.integers(0, 4),
    instances=st.integers(1, 3),
)
def test_what_is_placed_is_sound(
    busy: set[int], held: set[int], ranks: int, spares: int, instances: int
) -> None:
    """Seats are free dies, each once, an instance in one supernode, active ones in whole NPUs."""
    cluster = make_cluster(make_supernode("a", nodes=4), make_supernode("b", nodes=4))
    cluster.occupy([cluster.positions[die] for die in sorted(busy)], "other")
    for die in sorted(held):
        cluster.set_hold(cluster.positions[die], held=True)
    spec = make_spec(make_role(ranks=ranks, spares=spares, instances=instances))
    job = place_job(spec, cluster)
    free = cluster.free_dies("simulated")
    whole = sum(bool(free[d] and free[d + 1]) for d in range(0, 128, 2))
    if isinstance(job, Why):
        # One instance alone fits whenever a supernode has the NPUs and the spares.
        sides = [free[:64], free[64:]]
        alone = any(
            sum(bool(s[d] and s[d + 1]) for d in range(0, 64, 2)) >= -(-ranks // 2)
            and int(s.sum()) >= ranks + spares
            for s in sides
        )
        assert instances > 1 or not alone
        return
    dies = [rank.die for part in job.instances for rank in part.ranks]
    assert max(Counter(dies).values()) == 1
    assert all(free[cluster.die_index[die]] for die in dies)
    assert whole >= instances * -(-ranks // 2)
    for part in job.instances:
        assert len({rank.die.split("/")[0] for rank in part.ranks}) == 1
        active = [r.die for r in part.ranks if r.state is SeatState.ACTIVE]
        npus = Counter(die.rsplit("/", 1)[0] for die in active)
        assert sum(1 for count in npus.values() if count < 2) == ranks % 2
        assert len(part.ranks) == ranks + spares
    assert place_job(spec, cluster) == job
