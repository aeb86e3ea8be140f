"""What users ask of the leader, as values. Each becomes one `RequestReceived` event.

Validation that needs no state happens before (`raddle.wire.parse`); what needs state (names,
generations, fit) happens in the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from raddle.core.context import PodWord
from raddle.model.health import FaultLevel
from raddle.model.job import JobSpec
from raddle.model.topology import SuperNode


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitJob:
    spec: JobSpec
    # Made by the shell: a fresh uid, used only if the job is new.
    job_uid: str
    spec_digest: str
    idempotency_key: str = ""
    dry_run: bool = False
    managed_by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateJob:
    job_uid: str
    spec: JobSpec
    update_mask: tuple[str, ...]
    expected_generation: int = 0
    managed_by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleJob:
    job_uid: str
    role: str
    instances: int = 0
    ranks: int = 0
    expected_generation: int = 0
    managed_by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelJob:
    job_uid: str
    managed_by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteJob:
    job_uid: str
    managed_by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplySuperNode:
    supernode: SuperNode


@dataclass(frozen=True, slots=True, kw_only=True)
class Cordon:
    # A position of any level.
    subject: str
    message: str = ""
    # A code for programs; empty: CORDON.
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncordon:
    subject: str
    # Only a cordon with this reason; empty: any.
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclareNodeLost:
    node: str
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportPods:
    job_uid: str
    words: tuple[PodWord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateMaintenance:
    # Made by the shell.
    maintenance_id: str
    subject: str
    timeout_s: float
    message: str = ""
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelMaintenance:
    maintenance_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectFault:
    subject: str
    code: str
    level: FaultLevel
    clear: bool = False


Request = (
    SubmitJob
    | UpdateJob
    | ScaleJob
    | CancelJob
    | DeleteJob
    | ApplySuperNode
    | Cordon
    | Uncordon
    | DeclareNodeLost
    | ReportPods
    | CreateMaintenance
    | CancelMaintenance
    | InjectFault
)
