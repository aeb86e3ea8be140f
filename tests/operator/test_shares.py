"""Shares of a simulated machine over Kubernetes nodes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raddle.operator.shares import Shares, shares

NODES = [f"sn0/n{number:02d}" for number in range(12)]


def step(
    now: Shares,
    usable: list[str],
    *,
    present: list[str] | None = None,
    busy: set[str] | None = None,
    heard: set[str] | None = None,
) -> Shares:
    return shares(
        now,
        nodes=NODES,
        usable=usable,
        present=usable if present is None else present,
        busy=busy or set(),
        heard=heard or set(),
    )


def settled(now: Shares, usable: list[str], **more: object) -> Shares:
    """Steps until nothing changes, with agents that fall silent between them."""
    for _ in range(5):
        following = step(now, usable, **more)  # type: ignore[arg-type]
        if following == now:
            return now
        now = following
    raise AssertionError("the shares do not settle")


def sizes(found: Shares) -> list[int]:
    return sorted(len(nodes) for nodes in found.values())


def test_an_empty_cluster_shares_equally_and_parts_neighbours() -> None:
    """Twelve nodes over three: a job on neighbours stands on several Kubernetes nodes."""
    found = step({}, ["a", "b", "c"])
    assert found == {"a": tuple(NODES[::3]), "b": tuple(NODES[1::3]), "c": tuple(NODES[2::3])}


def test_a_new_kubernetes_node_gets_only_what_makes_shares_equal() -> None:
    """What is taken is given once its old agent is silent, and nothing else moves."""
    before = step({}, ["a", "b"])
    taken = step(before, ["a", "b", "c"], heard=set(NODES))
    assert sizes(taken) == [4, 4]
    given_ = step(taken, ["a", "b", "c"], heard={n for nodes in taken.values() for n in nodes})
    assert sizes(given_) == [4, 4, 4]
    assert set(given_["a"]) < set(before["a"])
    assert set(given_["b"]) < set(before["b"])


def test_what_has_work_stays() -> None:
    """Equal shares are not worth a rank."""
    before = step({}, ["a"])
    assert step(before, ["a", "b"], busy=set(NODES), heard=set(NODES)) == before


def test_a_silent_kubernetes_node_keeps_its_share_and_gets_no_more() -> None:
    """It may still run there; a new one takes nothing from it."""
    before = step({}, ["a", "b"])
    found = settled(before, ["b"], present=["a", "b"])
    assert found == before


def test_the_share_of_a_kubernetes_node_that_is_gone_is_given_to_the_others() -> None:
    """Once its agents are silent."""
    before = step({}, ["a", "b", "c"])
    assert step(before, ["b", "c"], heard=set(NODES)) == {k: before[k] for k in ("b", "c")}
    found = step(before, ["b", "c"])
    assert sizes(found) == [6, 6]
    assert set(before["b"]) < set(found["b"])


def test_nobody_usable_changes_nothing() -> None:
    """A cluster that is all cordoned keeps what it has."""
    before = step({}, ["a", "b"])
    assert step(before, [], present=["a", "b"]) == before


HOSTS = st.lists(st.sampled_from("abcdef"), unique=True)


@given(st.lists(st.tuples(HOSTS, HOSTS, st.sets(st.sampled_from(NODES))), max_size=8))
def test_no_node_is_ever_played_twice_and_shares_settle(
    story: list[tuple[list[str], list[str], set[str]]],
) -> None:
    """Whatever comes and goes: each node has one place at most, and in the end all have one."""
    now: Shares = {}
    for usable, more, busy in story:
        present = sorted({*usable, *more})
        kept = {n for host in present for n in now.get(host, ())}
        following = step(now, usable, present=present, busy=busy, heard=kept)
        played = [node for nodes in following.values() for node in nodes]
        assert len(played) == len(set(played))
        assert set(following) <= set(present)
        for host in present:
            assert {n for n in now.get(host, ()) if n in busy} <= set(following.get(host, ()))
        now = following
    found = settled(now, ["a", "b"])
    assert sizes(found) == [6, 6]
