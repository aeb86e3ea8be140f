"""Jobs: what a user asks for, where it runs, what agents are told.

The same field names as in `proto/raddle/v1`; `raddle.wire.codec` turns one into the other.
Times are seconds since 1970 of the scheduler's clock, durations are seconds; 0 means not set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from raddle.model.kinds import RoleKind, SeatState
from raddle.model.types import ExpertMap, ExpertMove, RankKey, SequenceRestore, Why


class JobState(StrEnum):
    """Where a job stands."""

    UNSPECIFIED = "UNSPECIFIED"
    # Accepted, waits with a reason.
    PENDING = "PENDING"
    # Placed, ranks start.
    STARTING = "STARTING"
    READY = "READY"
    RECOVERING = "RECOVERING"
    # Being cancelled; ranks end.
    STOPPING = "STOPPING"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"


class AssignmentStage(StrEnum):
    """What an agent has to bring its ranks to."""

    UNSPECIFIED = "UNSPECIFIED"
    # Start (or adopt) the ranks and report their addresses.
    START = "START"
    # Fence, set members and map, load experts, restore KV.
    PREPARE = "PREPARE"
    # Serve.
    LIVE = "LIVE"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The model that a job serves."""

    name: str = ""
    revision: str = ""
    # The Hugging Face config.json, inline.
    config: str = ""
    # sha256 of the config, made by the server.
    config_digest: str = ""
    weights_uri: str = ""
    # int8, fp8 or bf16.
    weight_dtype: str = ""
    kv_dtype: str = ""
    kv_block_tokens: int = 0
    mtp_layers: int = 0
    max_context_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """A command that an agent starts for each rank."""

    command: str = ""
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """The engine of a role."""

    # reference or simulated (further drivers come with their engines).
    driver: str = ""
    # Attach to a running rank instead of starting one.
    attach: bool = False
    launch: LaunchSpec = field(default_factory=LaunchSpec)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSpec:
    """One role.

    `instances` groups of `ranks` ranks, one die a rank times `tp`; a cache rank takes host
    memory only.
    """

    name: str = ""
    # prefill, decode or cache.
    kind: RoleKind
    instances: int = 0
    ranks: int = 0
    tp: int = 0
    slots_per_rank: int = 0
    shared_expert_ranks: int = 0
    spares: int = 0
    max_sequences_per_rank: int = 0
    dram_bytes: int = 0
    engine: EngineSpec = field(default_factory=EngineSpec)
    # An instance sits on at least so many nodes, evenly; 0 means on as few as possible.
    spread_nodes: int = 0
    # Of a cache role: copies that the pool keeps of each block, on different nodes; 0 means 2.
    kv_replicas: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverySpec:
    """What a recovery may do."""

    # REMAP, DONOR_SLOT, HOT_SPARE, RESTART; empty means all.
    allowed_options: tuple[str, ...] = ()
    max_pause: float = 0.0
    allow_masking: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What a user asks for."""

    namespace: str = ""
    name: str = ""
    queue: str = ""
    priority: int = 0
    model: ModelSpec = field(default_factory=ModelSpec)
    roles: tuple[RoleSpec, ...] = ()
    recovery: RecoverySpec = field(default_factory=RecoverySpec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job. Stored under jobs/<job_uid>."""

    uid: str = ""
    spec: JobSpec = field(default_factory=JobSpec)
    # Grows with each change of the spec by a user.
    generation: int = 0
    # The generation that the placement answers.
    observed_generation: int = 0
    # The store's revision of this record; filled on the way out, never stored.
    revision: int = 0
    # The newest committed epoch.
    epoch: int = 0
    state: JobState = JobState.UNSPECIFIED
    why: Why = field(default_factory=Why)
    created_by: str = ""
    managed_by: str = ""
    idempotency_key: str = ""
    # Digest of the submitted spec, to tell a retry from another body.
    spec_digest: str = ""
    create_time: float = 0.0
    ready_time: float = 0.0
    end_time: float = 0.0
    # Highest epoch that is live (published).
    live_epoch: int = 0
    # Restarts of whole instances so far, for the budget.
    restarts: int = 0
    # The leader's lease in whose term `epoch` was decided; with it the number is unique even after
    # the store was restored from an older state. 0: not known.
    epoch_term: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlacement:
    """One rank's seat."""

    rank: int = 0
    # Position of the die; empty for a cache rank.
    die: str = ""
    node: str = ""
    # ACTIVE, SPARE (held back, may take a lost rank's place), LOST or DRAINED.
    state: SeatState
    # Why it is not active.
    why: Why = field(default_factory=Why)
    # The epoch at which this seat's process was last started; 0 for a seat without a process.
    start_count: int = 0
    # Of a cache rank: the slots of the pool's map that it keeps, 16 bits each, little-endian.
    kv_slots: bytes = b""
    # It hands its blocks on and takes no new ones, until its process may end.
    kv_draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InstancePlacement:
    """One instance's ranks."""

    role: str = ""
    instance: int = 0
    ranks: tuple[RankPlacement, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a job sits. Stored under placements/<job_uid>."""

    job_uid: str = ""
    epoch: int = 0
    instances: tuple[InstancePlacement, ...] = ()
    why: Why = field(default_factory=Why)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceExpertMap:
    """The map of one instance."""

    role: str = ""
    instance: int = 0
    expert_map: ExpertMap = field(default_factory=ExpertMap)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobExpertMaps:
    """Expert maps of all instances of a job at one epoch.

    Stored under expertmaps/<job_uid>/<epoch>.
    """

    job_uid: str = ""
    epoch: int = 0
    instances: tuple[InstanceExpertMap, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAssignment:
    """One rank on this node."""

    rank: RankKey = field(default_factory=RankKey)
    kind: RoleKind
    die: str = ""
    moves: tuple[ExpertMove, ...] = ()
    restores: tuple[SequenceRestore, ...] = ()
    # The epoch at which this process was started; another number asks for another process.
    start_count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobAssignment:
    """One job on this node."""

    job_uid: str = ""
    namespace: str = ""
    name: str = ""
    epoch: int = 0
    stage: AssignmentStage = AssignmentStage.UNSPECIFIED
    model: ModelSpec = field(default_factory=ModelSpec)
    # The roles that have ranks here.
    roles: tuple[RoleSpec, ...] = ()
    ranks: tuple[RankAssignment, ...] = ()
    incident_id: str = ""
    epoch_term: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What one node has to do.

    Stored under assignments/<node>; a job that is not listed ends there.
    """

    node: str = ""
    jobs: tuple[JobAssignment, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRecord:
    """A name's owner. Stored under names/<namespace>/<name>."""

    job_uid: str = ""
