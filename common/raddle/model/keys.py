"""Names of the store's keys, relative to the cluster's prefix. Pure: builds and splits text.

A node is named by its position (`sn0/n07`), so keys of a node have more than one slash; prefixes
always end with a slash, since `agents/sn0/n1` would also match `agents/sn0/n10`.
"""

from __future__ import annotations

from raddle.model.kinds import HoldKind

LEADER = "leader"
TOPOLOGY = "topology/"
AGENTS = "agents/"
JOBS = "jobs/"
NAMES = "names/"
PLACEMENTS = "placements/"
EXPERT_MAPS = "expertmaps/"
ROUTES = "routes/"
ASSIGNMENTS = "assignments/"
INCIDENTS = "incidents/"
HOLDS = "holds/"
MAINTENANCE = "maintenance/"
FAULTS = "faults/"
INJECTIONS = "injections/"
AUDIT = "audit/"
OPERATIONS = "operations/"

_AGENT_KEY_PARTS_MIN = 4


def supernode(name: str) -> str:
    return f"{TOPOLOGY}{name}"


def agent_prefix(node: str) -> str:
    return f"{AGENTS}{node}/"


def registration(node: str) -> str:
    return f"{AGENTS}{node}/registration"


def health(node: str) -> str:
    return f"{AGENTS}{node}/health"


def acks(node: str, job_uid: str) -> str:
    return f"{AGENTS}{node}/acks/{job_uid}"


def agent_operation(node: str) -> str:
    """The operation key of an agent's own commits; inside its prefix, where it may write."""
    return f"{AGENTS}{node}/operation"


def job(job_uid: str) -> str:
    return f"{JOBS}{job_uid}"


def name(namespace: str, job_name: str) -> str:
    return f"{NAMES}{namespace}/{job_name}"


def placement(job_uid: str) -> str:
    return f"{PLACEMENTS}{job_uid}"


def expert_maps(job_uid: str, epoch: int) -> str:
    return f"{EXPERT_MAPS}{job_uid}/{epoch}"


def routes(job_uid: str) -> str:
    return f"{ROUTES}{job_uid}"


def assignment(node: str) -> str:
    return f"{ASSIGNMENTS}{node}"


def incident(incident_id: str) -> str:
    return f"{INCIDENTS}{incident_id}"


def hold(subject: str, kind: HoldKind) -> str:
    """A hold on a position of any level; each kind has a record of its own."""
    return f"{HOLDS}{subject}/{kind.lower()}"


def only_hold(subject: str) -> str:
    """Where the hold of a position was before each kind had a record of its own; still read."""
    return f"{HOLDS}{subject}"


def part_hold(serial: str) -> str:
    """A hold that follows the silicon wherever it is plugged."""
    return f"{HOLDS}part/{serial}"


def maintenance(maintenance_id: str) -> str:
    return f"{MAINTENANCE}{maintenance_id}"


def fault_ledger(node: str) -> str:
    return f"{FAULTS}{node}"


def injections(node: str) -> str:
    return f"{INJECTIONS}{node}"


def event(event_id: str) -> str:
    return f"{AUDIT}{event_id}"


def node_of_agent_key(key: str) -> str:
    """`agents/sn0/n07/acks/j-1` -> `sn0/n07`; empty when the key is not an agent's."""
    parts = key.split("/")
    if len(parts) < _AGENT_KEY_PARTS_MIN or parts[0] != "agents":
        return ""
    return f"{parts[1]}/{parts[2]}"
