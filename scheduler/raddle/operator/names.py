"""Names that the operator shares with the chart and with those who look at what it made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

GROUP = "raddle.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
CATEGORY = "raddle"
#: Who manages a job in the scheduler, and the fields of resources in the API server.
MANAGER = "raddle-operator"
#: Keeps a resource until the scheduler let go of what it stands for.
FINALIZER = f"{GROUP}/scheduler"
#: At an InferenceRole: the size that its job asked for last; people and autoscalers change it.
JOB_REPLICAS = f"{GROUP}/job-replicas"
#: On a real machine's Kubernetes node: its position, with a dot for the slash.
NODE_LABEL = f"{GROUP}/node"
#: Where Ascend's device plugin names the dies of a Pod.
ASCEND_ANNOTATION = "huawei.com/AscendReal"
#: On a rank's Pod: the die on which the rank is placed.
DIE_ANNOTATION = f"{GROUP}/die"
NAME_CHARACTERS_MAX = 63
_HASH_CHARACTERS = 8


@dataclass(frozen=True, slots=True)
class Kind:
    """How the API server names one kind of ours."""

    plural: str
    short: str
    namespaced: bool


KINDS = {
    "InferenceJob": Kind("inferencejobs", "ij", namespaced=True),
    "InferenceRole": Kind("inferenceroles", "ir", namespaced=True),
    "SuperNode": Kind("supernodes", "sn", namespaced=False),
    "Maintenance": Kind("maintenances", "mt", namespaced=False),
}


def short_name(*parts: object) -> str:
    """Parts joined by dashes; a name over 63 characters is cut and ends with its hash."""
    name = "-".join(str(part) for part in parts)
    if len(name) <= NAME_CHARACTERS_MAX:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_HASH_CHARACTERS]
    return f"{name[: NAME_CHARACTERS_MAX - _HASH_CHARACTERS - 1].rstrip('-')}-{digest}"


def role_name(job: str, role: str) -> str:
    """Of the InferenceRole of a role; a resource's name may be long."""
    return f"{job}-{role}"


def to_key(position: str) -> str:
    """A position as a key of a ConfigMap or a label's value: `sn0/n07` -> `sn0.n07`."""
    return position.replace("/", ".")


def from_key(key: str) -> str:
    return key.replace(".", "/")
