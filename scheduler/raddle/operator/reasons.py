"""Reasons as Kubernetes shows them: what the operator itself tells, and one list of all. Pure.

A condition takes a member of a list and nothing else: `docs/reference/reasons.md` has every reason
that can be met.
"""

from __future__ import annotations

from raddle.model.errors import Reason
from raddle.model.kinds import FaultKind, RecoveryKind
from raddle.model.reasons import Code, Decision


class OperatorReason(Code):
    """What only the operator can tell: of resources, Pods and Kubernetes nodes."""

    SUSPENDED = "SUSPENDED", "`spec.suspend` is true."
    REPLACED = "REPLACED", "A job of before has to end first."
    ALL_RANKS_ACTIVE = "ALL_RANKS_ACTIVE", "Every rank of the job is there."
    RANKS_LOST = "RANKS_LOST", "The job goes on without some of its ranks."
    FRONT_DOOR_NOT_READY = (
        "FRONT_DOOR_NOT_READY",
        "The job's Service leads to no ready Pod.",
    )
    NO_KUBERNETES_NODE = "NO_KUBERNETES_NODE", "No Kubernetes node plays the node of a rank."
    APPLIED = "APPLIED", "The scheduler knows the description of the SuperNode."
    NODE_LABELLED_TWICE = (
        "NODE_LABELLED_TWICE",
        "Several Kubernetes nodes carry the same label.",
    )
    ALL_DIES_HEALTHY = "ALL_DIES_HEALTHY", "All dies of the Kubernetes node are well."
    DIES_FAULTY = "DIES_FAULTY", "Dies of the Kubernetes node report faults."
    DIES_HELD = "DIES_HELD", "Dies of the Kubernetes node take no new work."
    AGENT_SILENT = "AGENT_SILENT", "No agent reports from the Kubernetes node."
    HELD_BY_OTHER = "HELD_BY_OTHER", "A Pod of somebody else holds the die."
    HOST_CORDONED = "HOST_CORDONED", "The Kubernetes node is cordoned, or has a taint."
    DEVICE_DIFFERS = (
        "DEVICE_DIFFERS",
        "Kubelet gave a rank's Pod another device than its die.",
    )
    DEVICE_TAKEN = "DEVICE_TAKEN", "Kubelet gave the die of a rank to a Pod of somebody else."
    UNKNOWN = "UNKNOWN", "No reason was given, or one that is not listed here; the message has it."


class PodReason(Code):
    """Why a Pod does not come up or has ended, in the words of Kubernetes."""

    ERR_IMAGE_PULL = "ErrImagePull", "The node cannot get the image."
    IMAGE_PULL_BACK_OFF = (
        "ImagePullBackOff",
        "The node cannot get the image and will try again.",
    )
    ERR_IMAGE_NEVER_PULL = (
        "ErrImageNeverPull",
        "The image is not there and must not be pulled.",
    )
    INVALID_IMAGE_NAME = "InvalidImageName", "The image's name is none."
    IMAGE_INSPECT_ERROR = "ImageInspectError", "The image on the node cannot be read."
    CREATE_CONTAINER_CONFIG_ERROR = (
        "CreateContainerConfigError",
        "A Secret or a ConfigMap that the container needs is not there, or not as it must be.",
    )
    CREATE_CONTAINER_ERROR = "CreateContainerError", "The node cannot make the container."
    RUN_CONTAINER_ERROR = "RunContainerError", "The node cannot start the container."
    CRASH_LOOP_BACK_OFF = "CrashLoopBackOff", "The container keeps ending."
    START_ERROR = "StartError", "The container's program could not be started."
    CONTAINER_CANNOT_RUN = "ContainerCannotRun", "The container's program could not be started."
    CONTAINER_STATUS_UNKNOWN = "ContainerStatusUnknown", "The node lost sight of the container."
    OOM_KILLED = "OOMKilled", "The container used more memory than its limit, or the node ran out."
    ERROR = "Error", "The container's program ended with an error."
    EVICTED = "Evicted", "The node was short of memory or disk and ended the Pod."
    PREEMPTING = "Preempting", "The Pod had to leave for a more important one."
    NODE_SHUTDOWN = "NodeShutdown", "The node shuts down."
    TERMINATED = "Terminated", "The Pod ended as its node shut down."
    UNEXPECTED_ADMISSION_ERROR = (
        "UnexpectedAdmissionError",
        "The node refused the Pod, mostly for a device that its plugin could not give.",
    )
    NODE_AFFINITY = "NodeAffinity", "The node does not fit the Pod's own wishes."
    OUT_OF_CPU = "OutOfcpu", "The node has too little CPU left for the Pod."
    OUT_OF_MEMORY = "OutOfmemory", "The node has too little memory left for the Pod."
    OUT_OF_PODS = "OutOfpods", "The node has too many Pods."
    UNSCHEDULABLE = "Unschedulable", "No Kubernetes node takes the Pod."
    POD_WAITS = "PodWaits", "The Pod waits for another reason; the message has it."
    POD_FAILED = "PodFailed", "The Pod failed for another reason; the message has it."


class EventReason(Code):
    """What an Event of an InferenceJob tells."""

    QUEUED = "QUEUED", "The job begins to wait."
    NOT_QUEUED = "NOT_QUEUED", "The job waits no more."
    PLACED = "PLACED", "The job is placed."
    NOT_PLACED = "NOT_PLACED", "The job has no place any more."
    READY = "READY", "The job serves."
    NOT_READY = "NOT_READY", "The job does not serve, or cannot be reached."
    DEGRADED = "DEGRADED", "The job goes on without some of its ranks."
    NOT_DEGRADED = "NOT_DEGRADED", "All ranks are there again."
    RECOVERING = "RECOVERING", "The job recovers from a loss."
    NOT_RECOVERING = "NOT_RECOVERING", "The recovery is over."
    INCIDENT_OPENED = "INCIDENT_OPENED", "An incident touches the job."
    INCIDENT_CLOSED = "INCIDENT_CLOSED", "The incident is over."
    CHANGE_REFUSED = "CHANGE_REFUSED", "The scheduler refused a change of the job."


#: Of conditions: every list of reasons but those of Events, in the order of the reference.
LISTS: tuple[type[Code], ...] = (
    OperatorReason,
    PodReason,
    Decision,
    FaultKind,
    RecoveryKind,
    Reason,
)
LISTED: dict[str, Code] = {str(code): code for codes in LISTS for code in codes}


def named(code: str, message: str, unlisted: Code = OperatorReason.UNKNOWN) -> tuple[Code, str]:
    """The reason of a code that others gave, and the sentence, which keeps a code of no list."""
    found = LISTED.get(code)
    if found is not None:
        return found, message
    return unlisted, f"{code}: {message}" if code else message


def camel(reason: Code) -> str:
    """A reason as Kubernetes writes it: `WAITS_FOR_TURN` -> `WaitsForTurn`."""
    if not reason.isupper():
        # A word of Kubernetes itself.
        return str(reason)
    return "".join(word.capitalize() for word in reason.split("_"))
