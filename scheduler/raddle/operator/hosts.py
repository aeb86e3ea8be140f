"""What the API server says of a Kubernetes node, as far as it concerns work on its dies. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from raddle.model.names import device_number
from raddle.model.topology import node_of
from raddle.operator.machine_view import CONDITION
from raddle.operator.names import ASCEND_ANNOTATION, DIE_ANNOTATION, GROUP, NODE_LABEL, from_key
from raddle.operator.reasons import OperatorReason
from raddle.v1 import scheduler_pb2

#: Taints that Kubernetes sets itself: they tell of health or of a cordon, and are no order.
_OWN_TAINTS = "node.kubernetes.io/"
#: Somebody said that the machine is off and nothing runs there.
_OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
_SAID = ("type", "status", "reason", "message")
_ENDED = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class Host:
    """One Kubernetes node. `cordon` and `drain` say why, or are empty."""

    name: str
    address: str
    ready: bool
    cordon: str
    drain: str
    gone: bool
    #: Position on a real machine, from its label; empty without one.
    node: str
    labels: Mapping[str, str]
    linux: bool
    #: What its condition about its dies says now, without times; None without one.
    dies: Mapping[str, str] | None

    @property
    def usable(self) -> bool:
        return self.ready and self.linux and not (self.cordon or self.drain or self.gone)


def host_of(resource: Mapping[str, Any], tolerated: Collection[str]) -> Host:
    """Read a Node; tolerated taints (`key`, `key:effect`, `*` for all keys) mean nothing."""
    metadata, spec, status = (resource.get(part) or {} for part in ("metadata", "spec", "status"))
    name, labels = metadata["name"], metadata.get("labels") or {}
    taints = spec.get("taints") or ()
    ordered = [
        taint
        for taint in taints
        if not taint["key"].startswith(_OWN_TAINTS) and not _is_tolerated(taint, tolerated)
    ]
    cordon = f"Kubernetes node {name} is cordoned" if spec.get("unschedulable") else ""
    drain = ""
    for taint in ordered:
        said = f"Kubernetes node {name} has the taint {taint['key']}:{taint['effect']}"
        if taint["effect"] == "NoExecute":
            drain = drain or said
        elif taint["effect"] == "NoSchedule":
            cordon = cordon or said
    conditions = {c["type"]: c["status"] for c in status.get("conditions") or ()}
    dies = next((c for c in status.get("conditions") or () if c["type"] == CONDITION), None)
    addresses = {a["type"]: a["address"] for a in status.get("addresses") or ()}
    return Host(
        name=name,
        address=addresses.get("InternalIP", ""),
        ready=conditions.get("Ready") == "True",
        cordon=cordon,
        drain=drain,
        gone=any(t["key"] == _OUT_OF_SERVICE for t in taints),
        node=from_key(labels.get(NODE_LABEL, "")),
        labels=labels,
        linux=labels.get("kubernetes.io/os", "linux") == "linux",
        dies=dies and {name: dies.get(name, "") for name in _SAID},
    )


def _is_tolerated(taint: Mapping[str, str], tolerated: Collection[str]) -> bool:
    of_effect = f":{taint['effect']}"
    return any(
        f"{key}{effect}" in tolerated for key in (taint["key"], "*") for effect in ("", of_effect)
    )


def selected(host: Host, selector: Mapping[str, str]) -> bool:
    return all(host.labels.get(key) == value for key, value in selector.items())


def devices_of(pod: Mapping[str, Any]) -> tuple[int, ...]:
    """Numbers of the dies that Ascend's device plugin gave to a Pod that has not ended."""
    metadata = pod.get("metadata") or {}
    text = (metadata.get("annotations") or {}).get(ASCEND_ANNOTATION, "")
    if (pod.get("status") or {}).get("phase") in _ENDED:
        return ()
    numbers = {device_number(part.strip()) for part in text.split(",")}
    return tuple(sorted(number for number in numbers if number is not None))


def die_of(pod: Mapping[str, Any]) -> str:
    """The die on which the rank of a Pod is placed; empty for one without a die."""
    return str((pod["metadata"].get("annotations") or {}).get(DIE_ANNOTATION, ""))


@dataclass(frozen=True, slots=True)
class WrongDevice:
    """A rank's Pod was given other devices than the die on which its rank is placed."""

    #: `namespace/name`.
    pod: str
    placed: str
    given: tuple[str, ...]
    #: A Pod of somebody else was given the rank's die.
    is_taken: bool


def wrong_devices(
    dies: Iterable[scheduler_pb2.DieStatus], pods: Iterable[Mapping[str, Any]]
) -> list[WrongDevice]:
    """Ranks' Pods, among these, that have other devices of their node than Raddle means.

    Kubelet's word goes before the device plugin's. Pods of which neither speaks are left out.
    """
    known = {die.die: die for die in dies}
    numbers = {
        (node_of(die.die), die.part.logic_id): die.die
        for die in known.values()
        if die.HasField("part")
    }
    found = []
    for pod in pods:
        metadata = pod["metadata"]
        name = f"{metadata['namespace']}/{metadata['name']}"
        placed = die_of(pod)
        given = [die.die for die in known.values() if die.holder == name] or [
            numbers[node_of(placed), number]
            for number in devices_of(pod)
            if (node_of(placed), number) in numbers
        ]
        if placed in known and given and placed not in given:
            holds = {hold.reason for hold in known[placed].holds}
            is_taken = OperatorReason.HELD_BY_OTHER in holds
            found.append(WrongDevice(name, placed, tuple(sorted(given)), is_taken))
    return found


def foreign_holders(
    dies: Iterable[scheduler_pb2.DieStatus], pods: Iterable[Mapping[str, Any]]
) -> dict[str, str]:
    """Dies of a Kubernetes node that Pods of others hold, among all Pods of that node.

    Two say so: the device plugin in an annotation, and kubelet through the node's agent. Kubelet
    knows Pods without the annotation, and Pods that the API server shows no more.
    """
    ours: set[str] = set()
    given: dict[int, str] = {}
    for pod in pods:
        name = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        if f"{GROUP}/job-uid" in (pod["metadata"].get("labels") or {}):
            ours.add(name)
        else:
            given |= dict.fromkeys(devices_of(pod), name)
    found = {}
    for die in dies:
        if die.holder and die.holder not in ours:
            found[die.die] = die.holder
        elif die.HasField("part") and die.part.logic_id in given:
            found[die.die] = given[die.part.logic_id]
    return found
