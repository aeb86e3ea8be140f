"""What can happen to an agent, and what it can ask of its shell."""

from __future__ import annotations

from dataclasses import dataclass

from raddle.model.health import AgentAcks, PeerSuspicion, RankStage, RankStatus
from raddle.model.job import Assignment, JobAssignment, RankAssignment
from raddle.model.types import RankKey


@dataclass(frozen=True, slots=True)
class AssignmentChanged:
    assignment: Assignment


@dataclass(frozen=True, slots=True)
class RankStarted:
    """A process is up (or was adopted) and says where it listens."""

    job_uid: str
    key: RankKey
    start_count: int
    die: str
    incarnation: str
    engine_address: str
    data_address: str
    epoch: int


@dataclass(frozen=True, slots=True)
class StartFailed:
    job_uid: str
    key: RankKey
    start_count: int
    message: str


@dataclass(frozen=True, slots=True)
class RankExited:
    job_uid: str
    key: RankKey
    start_count: int
    exit_code: int
    message: str


@dataclass(frozen=True, slots=True)
class Driven:
    """A rank reached a stage at an epoch; `last` if its command has nothing left to do."""

    job_uid: str
    key: RankKey
    start_count: int
    epoch: int
    stage: RankStage
    last: bool
    experts_loaded: int = 0
    kv_tokens_restored: int = 0


@dataclass(frozen=True, slots=True)
class DriveFailed:
    """A command failed; `final` if trying again is useless."""

    job_uid: str
    key: RankKey
    start_count: int
    epoch: int
    message: str
    final: bool


@dataclass(frozen=True, slots=True)
class PeerSuspected:
    """A rank here lost a peer."""

    job_uid: str
    key: RankKey
    start_count: int
    suspicion: PeerSuspicion


@dataclass(frozen=True, slots=True)
class RankSilent:
    """A rank here, whose process is there, does not answer its agent any more."""

    job_uid: str
    key: RankKey
    start_count: int
    message: str


@dataclass(frozen=True, slots=True)
class AcksFound:
    """Jobs of which the store holds acknowledgements, by an earlier life or of an older state.

    What is true of them, and of every other job here, is told again.
    """

    job_uids: tuple[str, ...]


Event = (
    AcksFound
    | AssignmentChanged
    | RankStarted
    | StartFailed
    | RankExited
    | Driven
    | DriveFailed
    | PeerSuspected
    | RankSilent
)


@dataclass(frozen=True, slots=True)
class StartRank:
    job: JobAssignment
    rank: RankAssignment


@dataclass(frozen=True, slots=True)
class StopRank:
    job_uid: str
    key: RankKey
    start_count: int


@dataclass(frozen=True, slots=True)
class Drive:
    """Bring a rank to the job's stage; `attempts` failed before."""

    job: JobAssignment
    rank: RankAssignment
    status: RankStatus
    attempts: int


@dataclass(frozen=True, slots=True)
class WriteAcks:
    """Write a job's acknowledgements; None deletes them."""

    job_uid: str
    acks: AgentAcks | None


Instruction = StartRank | StopRank | Drive | WriteAcks
