"""The dies of the machine: positions, domains, and who may use them."""

from __future__ import annotations

import numpy as np
import pytest

from raddle.core.cluster import Cluster
from raddle.model.errors import PermanentError, Reason
from raddle.model.health import ActiveFault, FaultLevel
from tests.core.machines import make_cluster, make_supernode


def fault(subject: str, level: FaultLevel, code: str = "80E01801") -> ActiveFault:
    kind = Cluster.level_of_subject(subject)
    return ActiveFault(code=code, subject_kind=kind, subject=subject, level=level)


def free(cluster: Cluster) -> int:
    cluster.validate()
    return int(cluster.free_dies("simulated").sum())


def test_positions_and_domains_follow_the_machine() -> None:
    """A CloudMatrix384 has 768 dies; their NPU, node and rack are those of their names."""
    cluster = make_cluster()
    assert cluster.dies == 768
    assert cluster.positions[cluster.die_index["sn0/n07/npu3/die1"]] == "sn0/n07/npu3/die1"
    names = ["sn0/n00/npu0/die0", "sn0/n00/npu0/die1", "sn0/n03/npu7/die1", "sn0/n04/npu0/die0"]
    assert cluster.domains(names).tolist() == [
        [0, 1, 63, 64],
        [0, 0, 31, 32],
        [0, 0, 3, 4],
        [0, 0, 0, 1],
    ]


def test_supernodes_never_share_a_domain() -> None:
    """The second supernode's racks, nodes and NPUs have numbers of their own."""
    cluster = make_cluster(make_supernode("b", nodes=2), make_supernode("a", nodes=2))
    assert list(cluster.supernodes) == ["a", "b"]
    domains = cluster.domains(["a/n01/npu7/die1", "b/n00/npu0/die0"])
    assert (domains[:, 0] != domains[:, 1]).all()


def test_a_die_is_free_only_while_nothing_forbids_it() -> None:
    """A node that is not ready, another driver, a hold, a fault and an owner each take dies."""
    cluster = make_cluster(make_supernode(nodes=4))
    assert free(cluster) == 64
    cluster.set_node("sn0/n00", ready=False, drivers=("simulated",), host_memory_bytes=0)
    assert free(cluster) == 48
    cluster.set_node("sn0/n01", ready=True, drivers=("reference",), host_memory_bytes=0)
    assert free(cluster) == 32
    cluster.set_hold("sn0/n02/npu0", held=True)
    assert free(cluster) == 30
    cluster.set_faults("sn0/n02", [fault("sn0/n02/npu1/die0", FaultLevel.SEPARATE_NPU)])
    assert free(cluster) == 29
    cluster.occupy(["sn0/n03/npu0/die0"], "j")
    assert free(cluster) == 28
    assert cluster.count_states("simulated") == {
        "free": 28,
        "busy": 1,
        "held": 2,
        "faulty": 1,
        "on nodes that are not ready": 16,
        "on nodes without the driver": 16,
    }


def test_release_gives_a_die_back() -> None:
    """Only the owner's dies are busy, and a released one is free again."""
    cluster = make_cluster(make_supernode(nodes=1))
    cluster.occupy(cluster.positions[:2], "j")
    assert cluster.owner_of(cluster.positions[1]) == "j"
    assert cluster.is_usable(cluster.positions[1], "simulated", "j")
    assert not cluster.is_usable(cluster.positions[1], "simulated", "other")
    cluster.release(cluster.positions[:2])
    assert free(cluster) == 16


def test_two_owners_of_a_die_are_refused() -> None:
    """A die that belongs to one job can't be given to another."""
    cluster = make_cluster(make_supernode(nodes=1))
    cluster.occupy(cluster.positions[:1], "a")
    with pytest.raises(AssertionError, match="a and b"):
        cluster.occupy(cluster.positions[:1], "b")


def test_lifting_a_hold_leaves_dies_that_another_hold_covers() -> None:
    """A node's hold goes, its NPU's own hold stays."""
    cluster = make_cluster(make_supernode(nodes=2))
    cluster.set_hold("sn0/n00", held=True)
    cluster.set_hold("sn0/n00/npu3", held=True)
    assert free(cluster) == 16
    assert cluster.usable_hosts("simulated") == ["sn0/n01"]
    cluster.set_hold("sn0/n00", held=False)
    assert free(cluster) == 30
    assert cluster.is_held("sn0/n00/npu3/die1")
    assert cluster.usable_hosts("simulated") == ["sn0/n00", "sn0/n01"]


def test_severe_faults_take_a_dies_work_away() -> None:
    """Below RESTART_REQUEST the work goes on; from there on the worst code is named."""
    cluster = make_cluster(make_supernode(nodes=1))
    cluster.set_faults(
        "sn0/n00",
        [
            fault("sn0/n00/npu0/die0", FaultLevel.SUB_HEALTH),
            fault("sn0/n00/npu1/die0", FaultLevel.RESTART_REQUEST),
            fault("sn0/n00/npu2", FaultLevel.SEPARATE_NPU, "8C1F8608"),
            fault("sn0/n00/npu2/die1", FaultLevel.RESTART_REQUEST),
        ],
    )
    assert free(cluster) == 13
    assert cluster.fault_of("sn0/n00/npu0/die0") is None
    assert cluster.fault_of("sn0/n00/npu1/die0") == "80E01801"
    assert cluster.fault_of("sn0/n00/npu2/die1") == "8C1F8608"
    cluster.set_faults("sn0/n00", [])
    assert free(cluster) == 16
    assert cluster.fault_of("sn0/n00/npu2/die1") is None


def test_unknown_dies_are_passed_over() -> None:
    """A record may name a die that the machine no longer has: it is nobody's and never usable."""
    cluster = make_cluster(make_supernode(nodes=1))
    cluster.occupy(["sn9/n00/npu0/die0"], "j")
    cluster.release(["sn9/n00/npu0/die0"])
    assert free(cluster) == 16
    assert cluster.fault_of("sn9/n00/npu0/die0") is None
    assert not cluster.is_usable("sn9/n00/npu0/die0", "simulated")


def test_an_agent_speaks_only_for_its_own_node() -> None:
    """A fault that a node reports of another node's die changes nothing."""
    cluster = make_cluster(make_supernode(nodes=2))
    cluster.set_faults("sn0/n00", [fault("sn0/n01/npu0/die0", FaultLevel.SEPARATE_NPU)])
    cluster.set_faults("sn9/n00", [fault("sn0/n00", FaultLevel.SEPARATE_NPU)])
    assert free(cluster) == 32


def test_a_faulty_node_takes_no_pool_member() -> None:
    """A fault of the node itself takes its dies and its host."""
    cluster = make_cluster(make_supernode(nodes=2))
    cluster.set_faults("sn0/n00", [fault("sn0/n00", FaultLevel.RESTART_NPU)])
    assert cluster.usable_hosts("simulated") == ["sn0/n01"]
    assert free(cluster) == 16


def test_host_memory_is_counted_by_job() -> None:
    """What pool members take is gone until the job gives it back; agents may correct the size."""
    cluster = make_cluster(make_supernode(nodes=1))
    cluster.set_node("sn0/n00", ready=True, drivers=(), host_memory_bytes=100)
    cluster.occupy_host("sn0/n00", "a", 30)
    cluster.occupy_host("sn0/n00", "b", 20)
    assert cluster.host_memory("sn0/n00") == 50
    cluster.release_hosts("a")
    assert cluster.host_memory("sn0/n00") == 80


@pytest.mark.parametrize(
    ("subject", "reason"),
    [("sn0/n99", Reason.NOT_FOUND), ("sn1", Reason.NOT_FOUND), ("x y", Reason.INVALID_ARGUMENT)],
)
def test_unknown_subjects_are_refused(subject: str, reason: Reason) -> None:
    """A position that is not part of the machine is named in the refusal."""
    with pytest.raises(PermanentError, match=subject) as error:
        make_cluster(make_supernode(nodes=2)).require_subject(subject)
    assert error.value.reason is reason


def test_every_level_has_a_node_but_the_supernode() -> None:
    """Dies, NPUs and nodes lead to their node; a supernode is refused."""
    cluster = make_cluster(make_supernode(nodes=2))
    for subject in ("sn0/n01", "sn0/n01/npu2", "sn0/n01/npu2/die1"):
        assert cluster.node_of_subject(subject) == "sn0/n01"
    with pytest.raises(PermanentError, match="supernode"):
        cluster.node_of_subject("sn0")


def test_a_cluster_without_machines_is_empty() -> None:
    """Before the first supernode is applied everything answers, with nothing."""
    cluster = Cluster([])
    cluster.validate()
    assert cluster.dies == 0
    assert np.count_nonzero(cluster.free_dies("simulated")) == 0
    assert cluster.usable_hosts("") == []
