"""What a Kubernetes node says, and what shows of its dies there."""

from __future__ import annotations

import json
from typing import Any

from raddle.operator.hosts import (
    WrongDevice,
    devices_of,
    foreign_holders,
    host_of,
    selected,
    wrong_devices,
)
from raddle.operator.machine_view import die_maps, node_condition, stamped
from raddle.v1 import health_pb2, scheduler_pb2


def node(**spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "worker-1", "labels": {"raddle.dev/node": "sn0.n07", "pool": "x"}},
        "spec": spec,
        "status": {
            "conditions": [{"type": "Ready", "status": "True"}],
            "addresses": [{"type": "InternalIP", "address": "10.0.0.7"}],
        },
    }


def test_a_ready_node_is_usable() -> None:
    """With its address, and its position from the label."""
    host = host_of(node(), ())
    assert host.usable
    assert (host.address, host.node) == ("10.0.0.7", "sn0/n07")
    assert selected(host, {"pool": "x"})
    assert not selected(host, {"pool": "y"})


def test_cordon_and_taints_keep_work_away() -> None:
    """NoExecute drains; taints of Kubernetes itself and tolerated ones say nothing."""
    assert "cordoned" in host_of(node(unschedulable=True), ()).cordon
    taint = {"key": "team", "effect": "NoSchedule"}
    assert "team:NoSchedule" in host_of(node(taints=[taint]), ()).cordon
    assert host_of(node(taints=[taint]), {"team"}).usable
    drain = {"key": "repair", "effect": "NoExecute"}
    assert "repair:NoExecute" in host_of(node(taints=[drain]), ()).drain
    own = {"key": "node.kubernetes.io/not-ready", "effect": "NoExecute"}
    assert not host_of(node(taints=[own]), ()).drain


def test_taints_are_tolerated_by_key_and_effect() -> None:
    """As Kubernetes reads tolerations: without a key all keys, without an effect all effects."""
    drain = node(taints=[{"key": "team", "effect": "NoExecute"}])
    for tolerated in ("team", "team:NoExecute", "*", "*:NoExecute"):
        assert host_of(drain, {tolerated}).usable
    for tolerated in ("other", "team:NoSchedule", "*:NoSchedule"):
        assert host_of(drain, {tolerated}).drain
    off = node(taints=[{"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute"}])
    assert host_of(off, {"*"}).gone


def test_only_a_word_makes_a_node_gone() -> None:
    """Out of service says it; not ready does not."""
    taint = {"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute"}
    assert host_of(node(taints=[taint]), ()).gone
    silent = node()
    silent["status"]["conditions"][0]["status"] = "Unknown"
    host = host_of(silent, ())
    assert not host.usable
    assert not host.gone


def test_devices_of_a_foreign_pod() -> None:
    """Numbers at the end of the device plugin's names; a Pod that ended holds nothing."""
    pod: dict[str, Any] = {
        "metadata": {"annotations": {"huawei.com/AscendReal": "Ascend910-3,Ascend910-12"}}
    }
    assert devices_of(pod) == (3, 12)
    assert devices_of(pod | {"status": {"phase": "Succeeded"}}) == ()
    assert devices_of({"metadata": {"annotations": {"huawei.com/AscendReal": "?"}}}) == ()
    assert devices_of({"metadata": {}}) == ()


def test_dies_are_held_by_what_kubelet_and_the_device_plugin_say() -> None:
    """Kubelet's word needs no annotation, and no Pod in the API; a Pod of ours holds nothing."""
    dies = [scheduler_pb2.DieStatus(die=f"d{number}") for number in range(5)]
    for number, die in enumerate(dies):
        die.part.logic_id = number
    dies[1].holder, dies[2].holder, dies[3].holder = "a/unseen", "a/rank", "a/plain"

    def pod(name: str, devices: str = "", **labels: str) -> dict[str, Any]:
        annotations = {"huawei.com/AscendReal": devices}
        metadata = {"namespace": "a", "name": name, "annotations": annotations, "labels": labels}
        return {"metadata": metadata}

    rank = pod("rank", "Ascend910-2", **{"raddle.dev/job-uid": "j-1"})
    pods = [rank, pod("plain"), pod("annotated", "Ascend910-4")]
    assert foreign_holders(dies, pods) == {"d1": "a/unseen", "d3": "a/plain", "d4": "a/annotated"}


def told(state: str = "READY") -> scheduler_pb2.WatchNodesResponse:
    found = scheduler_pb2.WatchNodesResponse()
    found.node.node, found.node.state = "sn0/n07", state
    for number in range(2):
        found.dies.add(die=f"sn0/n07/npu0/die{number}")
    return found


def test_the_state_of_dies_is_a_condition_of_their_kubernetes_node() -> None:
    """Faults before silence before holds; each names the dies."""
    assert node_condition([told()])["reason"] == "AllDiesHealthy"
    held = told()
    held.dies[1].hold, held.dies[1].why.reason = "CORDON", "HELD_BY_OTHER"
    condition = node_condition([held])
    assert (condition["status"], condition["reason"]) == ("True", "DiesHeld")
    assert "sn0/n07/npu0/die1 HELD_BY_OTHER" in condition["message"]
    silent = node_condition([told("LOST")])
    assert (silent["status"], silent["reason"]) == ("Unknown", "AgentSilent")
    held.dies[0].health = health_pb2.FAULT_LEVEL_SEPARATE_NPU
    condition = node_condition([held, told("LOST")])
    assert (condition["status"], condition["reason"]) == ("False", "DiesFaulty")
    assert "sn0/n07/npu0/die0 SEPARATE_NPU" in condition["message"]


def test_a_condition_turns_only_with_its_status() -> None:
    """Its time of transition is left alone else."""
    condition = node_condition([told()])
    assert "lastTransitionTime" in stamped(condition, None)
    assert "lastTransitionTime" not in stamped(condition, condition)


def test_dies_are_in_a_config_map_of_their_supernode() -> None:
    """One key a node; other tools read JSON."""
    found = die_maps([told()])
    dies = json.loads(found["sn0"]["sn0.n07"])
    assert dies["state"] == "READY"
    assert [die["die"] for die in dies["dies"]] == ["sn0/n07/npu0/die0", "sn0/n07/npu0/die1"]


def four_dies() -> scheduler_pb2.WatchNodesResponse:
    told = scheduler_pb2.WatchNodesResponse()
    for number in range(4):
        die = told.dies.add(die=f"sn0/n07/npu{number // 2}/die{number % 2}")
        die.part.logic_id = number
    return told


def rank_pod(device: str = "") -> dict[str, Any]:
    """Its rank is placed on device 3."""
    annotations = {"raddle.dev/die": "sn0/n07/npu1/die1"}
    if device:
        annotations["huawei.com/AscendReal"] = device
    return {"metadata": {"name": "rank", "namespace": "a", "annotations": annotations}}


def test_a_rank_with_another_device_is_found() -> None:
    """By kubelet's word, or by the device plugin's; both devices are named."""
    wrong = WrongDevice("a/rank", "sn0/n07/npu1/die1", ("sn0/n07/npu0/die0",), is_taken=False)
    assert wrong_devices(four_dies().dies, [rank_pod("Ascend910-0")]) == [wrong]
    told = four_dies()
    told.dies[0].holder = "a/rank"
    assert wrong_devices(told.dies, [rank_pod("Ascend910-3")]) == [wrong]
    told.dies[3].holder = "b/other"
    told.dies[3].holds.add(kind="CORDON", reason="HELD_BY_OTHER")
    (found,) = wrong_devices(told.dies, [rank_pod()])
    assert found.is_taken


def test_a_rank_with_its_own_device_is_not() -> None:
    """Neither is one of which nobody says what it has, or one among several devices of its own."""
    told = four_dies()
    assert wrong_devices(told.dies, [rank_pod(), rank_pod("Ascend910-3"), rank_pod("?")]) == []
    told.dies[2].holder = told.dies[3].holder = "a/rank"
    assert wrong_devices(told.dies, [rank_pod("Ascend910-0")]) == []
    without_die = {"metadata": {"name": "rank", "namespace": "a"}}
    assert wrong_devices(told.dies, [without_die]) == []
