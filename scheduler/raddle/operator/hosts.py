"""What the API server says of a Kubernetes node, as far as it concerns work on its dies. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from raddle.operator.names import ASCEND_ANNOTATION, NODE_LABEL, from_key

#: Taints that Kubernetes sets itself: they tell of health or of a cordon, and are no order.
_OWN_TAINTS = "node.kubernetes.io/"
#: Somebody said that the machine is off and nothing runs there.
_OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
_DEVICE = re.compile(r"^[A-Za-z0-9.]+-(\d+)(?:-.*)?$")
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

    @property
    def usable(self) -> bool:
        return self.ready and self.linux and not (self.cordon or self.drain or self.gone)


def host_of(resource: Mapping[str, Any], tolerated: Collection[str]) -> Host:
    """Read a Node; taints whose keys are tolerated mean nothing."""
    metadata, spec, status = (resource.get(part) or {} for part in ("metadata", "spec", "status"))
    name, labels = metadata["name"], metadata.get("labels") or {}
    taints = [t for t in spec.get("taints") or () if t["key"] not in tolerated]
    ordered = [t for t in taints if not t["key"].startswith(_OWN_TAINTS)]
    cordon = f"Kubernetes node {name} is cordoned" if spec.get("unschedulable") else ""
    drain = ""
    for taint in ordered:
        said = f"Kubernetes node {name} has the taint {taint['key']}:{taint['effect']}"
        if taint["effect"] == "NoExecute":
            drain = drain or said
        elif taint["effect"] == "NoSchedule":
            cordon = cordon or said
    conditions = {c["type"]: c["status"] for c in status.get("conditions") or ()}
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
    )


def selected(host: Host, selector: Mapping[str, str]) -> bool:
    return all(host.labels.get(key) == value for key, value in selector.items())


def devices_of(pod: Mapping[str, Any]) -> tuple[int, ...]:
    """Numbers of the dies that Ascend's device plugin gave to a Pod that has not ended."""
    metadata = pod.get("metadata") or {}
    text = (metadata.get("annotations") or {}).get(ASCEND_ANNOTATION, "")
    if (pod.get("status") or {}).get("phase") in _ENDED:
        return ()
    matches = [_DEVICE.match(part.strip()) for part in text.split(",")]
    return tuple(sorted({int(match[1]) for match in matches if match}))
