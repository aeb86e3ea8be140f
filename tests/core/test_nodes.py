"""The storm brake's timing, on the tracker alone: silence in, states and probes out."""

from __future__ import annotations

from raddle.core.nodes import (
    ASK_AGAIN_S,
    LEASE_TTL_S,
    STORM_GATHER_S,
    STORM_WINDOW_S,
    NodeTracker,
)
from raddle.model.kinds import NodeState

STORM_NODES_MAX = 4


def tracker(nodes: int) -> NodeTracker:
    """Ready nodes, in a term that began long ago."""
    found = NodeTracker(now=0.0)
    found.storm_nodes_max = STORM_NODES_MAX
    for number in range(nodes):
        found.registered(f"n{number}", has_lease=True, now=0.0)
    return found


def silence(nodes: NodeTracker, count: int, *, now: float) -> None:
    """Nodes fall silent, and none of their ranks answers."""
    for number in range(count):
        nodes.lease_ended(f"n{number}", now=now)
    answer(nodes, now=now)


def answer(nodes: NodeTracker, *, now: float) -> None:
    for name in nodes.take_probes():
        nodes.probed(name, answered=False, now=now)


def look(nodes: NodeTracker, *, now: float) -> float | None:
    """A wake-up and its probes; gives the time of the next one."""
    nodes.wake(now=now)
    answer(nodes, now=now)
    return nodes.wake(now=now)


def states(nodes: NodeTracker) -> set[NodeState]:
    return {node.state for node in nodes.nodes.values() if node.state is not NodeState.READY}


def test_a_node_that_falls_silent_in_calm_is_lost_after_a_moment() -> None:
    """One silent node is called lost once it is clear that no others follow."""
    nodes = tracker(8)
    silence(nodes, 1, now=100.0)
    assert states(nodes) == {NodeState.SUSPECT}
    again = look(nodes, now=100.0)
    assert again is not None
    assert again < 100.0 + 1.0
    look(nodes, now=again)
    assert states(nodes) == {NodeState.LOST}


def test_the_first_of_many_leases_to_end_is_not_judged_alone() -> None:
    """One lease has ended, and seven agents are as silent: a storm. Three would be no storm."""
    for count, state in ((7, NodeState.UNKNOWN), (3, NodeState.LOST)):
        nodes = tracker(12)
        quiet = [f"n{number}" for number in range(1, count + 1)]
        nodes.lease_ended("n0", now=100.0)
        assert nodes.take_probes() == ["n0"]
        nodes.probed("n0", answered=False, quiet_nodes=quiet, now=100.0)
        again = nodes.wake(now=100.0)
        assert again is not None
        nodes.wake(now=again)
        assert nodes.take_probes() == ["n0"]
        nodes.probed("n0", answered=False, quiet_nodes=quiet, now=again)
        assert states(nodes) == {state}


def test_a_node_that_is_silent_in_two_ways_counts_once() -> None:
    """Three nodes whose streams broke, and whose leases are not renewed either, are no storm."""
    nodes = tracker(12)
    for number in range(3):
        nodes.stream_broken(f"n{number}", now=100.0)
    nodes.take_probes()
    for number in range(3):
        nodes.probed(f"n{number}", answered=False, quiet_nodes=["n0", "n1", "n2"], now=101.0)
    assert [nodes.node(f"n{number}").state for number in range(3)] == [NodeState.LOST] * 3


def test_the_nodes_that_one_host_carries_are_one_failure() -> None:
    """Sixteen nodes are lost with their host, one more beside them; two hosts are a storm."""
    for silent, state in ((16, NodeState.LOST), (17, NodeState.LOST), (32, NodeState.UNKNOWN)):
        nodes = tracker(48)
        for number in range(48):
            nodes.node(f"n{number}").host = f"worker-{number // 16}"
        silence(nodes, silent, now=100.0)
        look(nodes, now=100.5)
        look(nodes, now=101.0)
        assert states(nodes) == {state}


def test_a_leader_that_hears_no_other_host_calls_no_host_lost() -> None:
    """All nodes are on one host: their silence may as well be the leader's own trouble."""
    nodes = tracker(16)
    for number in range(16):
        nodes.node(f"n{number}").host = "worker-0"
    silence(nodes, 16, now=100.0)
    for moment in (100.5, 101.0, 120.0):
        look(nodes, now=moment)
        assert states(nodes) == {NodeState.UNKNOWN}


def test_a_quiet_name_that_nobody_registered_is_no_node() -> None:
    """What the store's leases name does not make a node."""
    nodes = tracker(2)
    nodes.lease_ended("n0", now=100.0)
    nodes.take_probes()
    nodes.probed("n0", answered=False, quiet_nodes=("n9",), now=101.0)
    assert "n9" not in nodes.nodes


def test_a_node_that_falls_silent_at_a_leader_change_is_judged_right_after_it() -> None:
    """Silence within one lease time of an election proves nothing; what lasts beyond it does."""
    nodes = tracker(8)
    nodes.store_leader_changed(now=100.0)
    silence(nodes, 1, now=101.0)
    look(nodes, now=103.0)
    assert states(nodes) == {NodeState.UNKNOWN}
    again = look(nodes, now=103.5)
    assert again == 100.0 + LEASE_TTL_S
    look(nodes, now=again)
    assert states(nodes) == {NodeState.LOST}


def test_many_that_fall_silent_at_a_leader_change_stay_unknown() -> None:
    """More silent nodes than a rack are judged by a second witness alone, however long."""
    nodes = tracker(8)
    nodes.store_leader_changed(now=100.0)
    silence(nodes, 5, now=101.0)
    now = 102.0
    for _ in range(8):
        again = look(nodes, now=now)
        assert again is not None
        now = max(again, now + 1.0)
    assert now > 101.0 + 2 * STORM_WINDOW_S
    assert states(nodes) == {NodeState.UNKNOWN}
    nodes.accused("n2")
    answer(nodes, now=now)
    assert nodes.node("n2").state is NodeState.LOST
    assert nodes.node("n3").state is NodeState.UNKNOWN


def test_leases_that_end_one_after_the_other_around_an_election_are_a_storm() -> None:
    """Of eight leases that end within a second and a half, the first few are not judged alone."""
    nodes = tracker(12)
    nodes.store_leader_changed(now=100.0)
    for number in range(8):
        now = 103.6 + 0.2 * number
        nodes.lease_ended(f"n{number}", now=now)
        look(nodes, now=now)
        assert NodeState.LOST not in states(nodes), now
    for moment in (105.2, 106.0, 108.0):
        look(nodes, now=moment)
        assert NodeState.LOST not in states(nodes), moment


def return_(nodes: NodeTracker, numbers: range) -> None:
    for number in numbers:
        nodes.stream_opened(f"n{number}")
        nodes.lease_seen(f"n{number}")


def test_nodes_that_come_back_last_from_a_storm_are_not_judged_alone() -> None:
    """While a storm ends node by node, the few that are still unknown are given the same time."""
    nodes = tracker(12)
    silence(nodes, 8, now=100.0)
    look(nodes, now=100.5)
    assert states(nodes) == {NodeState.UNKNOWN}
    for number in range(7):
        now = 103.0 + 0.5 * number
        return_(nodes, range(number, number + 1))
        look(nodes, now=now)
        assert NodeState.LOST not in states(nodes), now
    assert nodes.node("n7").state is NodeState.UNKNOWN
    again = look(nodes, now=107.0)
    assert again is not None
    look(nodes, now=again)
    assert nodes.node("n7").state is NodeState.LOST


def test_nodes_that_come_back_at_once_leave_the_others_their_time() -> None:
    """A long storm ends in one moment: from then on the last two have a window."""
    nodes = tracker(12)
    silence(nodes, 8, now=100.0)
    look(nodes, now=100.5)
    return_(nodes, range(6))
    again = look(nodes, now=130.0)
    assert states(nodes) == {NodeState.UNKNOWN}
    assert again == 130.0 + STORM_WINDOW_S
    look(nodes, now=again)
    assert states(nodes) == {NodeState.LOST}


def test_others_that_come_and_go_do_not_put_a_dead_nodes_end_off() -> None:
    """Storm after storm: a node that never came back is lost a window after the first."""
    nodes = tracker(12)
    silence(nodes, 8, now=100.0)
    look(nodes, now=100.5)
    now = 101.0
    while nodes.node("n7").state is NodeState.UNKNOWN:
        return_(nodes, range(7))
        look(nodes, now=now + 0.1)
        for number in range(7):
            nodes.lease_ended(f"n{number}", now=now + 3.0)
        look(nodes, now=now + 3.5)
        now += 5.5
        assert now < 125.0
    assert nodes.node("n7").state is NodeState.LOST


def test_leases_that_end_late_in_a_storm_are_no_verdict() -> None:
    """Unknown without streams, and later without leases: nothing new is known of them."""
    nodes = tracker(12)
    names = [f"n{number}" for number in range(8)]
    for name in names:
        nodes.stream_broken(name, now=100.0)
    for moment in (100.0, 100.5):
        nodes.wake(now=moment)
        for name in nodes.take_probes():
            nodes.probed(name, answered=False, quiet_nodes=names, now=moment)
    assert states(nodes) == {NodeState.UNKNOWN}
    for number in range(8):
        nodes.lease_ended(f"n{number}", now=109.0)
    look(nodes, now=109.0)
    assert states(nodes) == {NodeState.UNKNOWN}


def test_a_storm_is_remembered_when_all_else_is_built_anew() -> None:
    """The term goes on with what the records say: who was unknown stays so, as long as before."""
    before = tracker(12)
    silence(before, 8, now=100.0)
    look(before, now=100.5)
    return_(before, range(7))
    look(before, now=103.0)
    nodes = NodeTracker(now=103.0)
    nodes.storm_nodes_max = STORM_NODES_MAX
    for number in range(12):
        nodes.registered(f"n{number}", has_lease=number != 7, now=103.0)
    nodes.remember(before)
    look(nodes, now=104.0)
    look(nodes, now=105.0)
    assert states(nodes) == {NodeState.UNKNOWN}
    look(nodes, now=103.0 + STORM_WINDOW_S)
    assert nodes.node("n7").state is NodeState.LOST


def cut_off(nodes: NodeTracker, count: int, *, now: float) -> None:
    """The leader alone hears nothing from these nodes any more."""
    for number in range(count):
        nodes.stream_broken(f"n{number}", now=now)
    answer(nodes, now=now)


def test_a_node_that_renews_its_lease_is_not_dead() -> None:
    """Neither stream nor answer, but a living lease: suspect, asked again, however long."""
    nodes = tracker(8)
    cut_off(nodes, 3, now=100.0)
    for second in range(60):
        again = look(nodes, now=100.0 + second)
        assert again == 100.0 + second + ASK_AGAIN_S
        assert states(nodes) == {NodeState.SUSPECT}
    for number in range(3):
        nodes.stream_opened(f"n{number}")
    assert states(nodes) == set()


def test_a_node_whose_lease_ends_after_its_stream_is_lost() -> None:
    """What nobody renews any more spares nobody: its end is a silence of its own."""
    nodes = tracker(8)
    cut_off(nodes, 1, now=100.0)
    look(nodes, now=120.0)
    nodes.lease_ended("n0", now=121.0)
    answer(nodes, now=121.0)
    assert states(nodes) == {NodeState.SUSPECT}
    look(nodes, now=121.0 + STORM_GATHER_S)
    assert states(nodes) == {NodeState.LOST}


def test_a_node_that_has_stopped_renewing_is_lost_before_its_lease_ends() -> None:
    """A lease that runs out tells of the past only."""
    nodes = tracker(8)
    cut_off(nodes, 1, now=100.0)
    for moment in (102.0, 102.0 + STORM_GATHER_S):
        nodes.wake(now=moment)
        assert nodes.take_probes() == ["n0"]
        nodes.probed("n0", answered=False, quiet_nodes=["n0"], now=moment)
    assert states(nodes) == {NodeState.LOST}


def test_a_peer_speaks_louder_than_a_lease() -> None:
    """A rank there answers neither its peers nor the leader: the lease may be of before."""
    nodes = tracker(8)
    cut_off(nodes, 1, now=100.0)
    nodes.accused("n0")
    look(nodes, now=101.0)
    look(nodes, now=101.0 + STORM_GATHER_S)
    assert states(nodes) == {NodeState.LOST}


def test_leases_that_end_together_after_a_cut_are_a_storm() -> None:
    """Nodes that were suspect for long fall silent in the moment in which their leases end."""
    nodes = tracker(12)
    cut_off(nodes, 8, now=100.0)
    look(nodes, now=150.0)
    silence(nodes, 8, now=150.5)
    look(nodes, now=150.5 + STORM_GATHER_S)
    assert states(nodes) == {NodeState.UNKNOWN}


def test_an_accusation_does_not_outlive_what_it_was_about() -> None:
    """A peer's word against a node that came back is void: later its lease counts again."""
    nodes = tracker(8)
    cut_off(nodes, 1, now=100.0)
    nodes.accused("n0")
    nodes.stream_opened("n0")
    assert nodes.node("n0").state is NodeState.READY
    cut_off(nodes, 1, now=200.0)
    look(nodes, now=210.0)
    assert nodes.node("n0").why.reason == "LEASE_LIVES"


def test_a_word_of_the_agent_voids_an_accusation() -> None:
    """A peer accused a silent node that is being asked; then its agent writes: it is not lost."""
    nodes = tracker(8)
    nodes.stream_broken("n0", now=100.0)
    assert nodes.take_probes() == ["n0"]
    nodes.accused("n0")
    nodes.lease_seen("n0")
    nodes.probed("n0", answered=False, now=110.0)
    assert nodes.node("n0").why.reason == "LEASE_LIVES"


def test_a_host_whose_leases_run_out_is_not_heard() -> None:
    """Two hosts are cut off, one's leases end first: the other's, about to end, prove nothing."""
    nodes = tracker(6)
    for number in range(6):
        nodes.node(f"n{number}").host = f"host-{number // 3}"
    nodes.storm_nodes_max = 4
    for name in ("n0", "n1", "n2"):
        nodes.lease_ended(name, now=100.0)
    nodes.take_probes()
    quiet = ["n3", "n4", "n5"]
    for name in ("n0", "n1", "n2"):
        nodes.probed(name, answered=False, now=101.0, quiet_nodes=quiet)
    assert states(nodes) == {NodeState.UNKNOWN}


def test_a_silence_is_remembered_when_all_else_is_built_anew() -> None:
    """A node that renews its lease and answers nobody stays suspect, and is asked again."""
    before = tracker(3)
    cut_off(before, 1, now=100.0)
    look(before, now=110.0)
    assert before.node("n0").why.reason == "LEASE_LIVES"
    after = tracker(3)
    after.remember(before)
    node = after.node("n0")
    assert (node.state, node.why.reason) == (NodeState.SUSPECT, "LEASE_LIVES")
    assert after.wake(now=110.0) == 110.0 + ASK_AGAIN_S
