"""What agents report of devices and ranks, and who forbids work on what.

The same field names as in `proto/raddle/v1`; `raddle.wire.codec` turns one into the other.
Times are seconds since 1970 of the scheduler's clock, durations are seconds; 0 means not set.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from raddle.model.kinds import HoldKind

#: Of a process that its agent did not start: nobody can tell.
EXIT_CODE_UNKNOWN = -1


class FaultLevel(StrEnum):
    """What the device says. Ordered by severity."""

    UNSPECIFIED = "UNSPECIFIED"
    NOT_HANDLE = "NOT_HANDLE"
    SUB_HEALTH = "SUB_HEALTH"
    RESTART_REQUEST = "RESTART_REQUEST"
    RESTART_BUSINESS = "RESTART_BUSINESS"
    FREE_RESTART_NPU = "FREE_RESTART_NPU"
    RESTART_NPU = "RESTART_NPU"
    PRE_SEPARATE_NPU = "PRE_SEPARATE_NPU"
    SEPARATE_NPU = "SEPARATE_NPU"
    MANUALLY_SEPARATE_NPU = "MANUALLY_SEPARATE_NPU"


class RankStage(StrEnum):
    """How far a rank came at an epoch."""

    UNSPECIFIED = "UNSPECIFIED"
    # Process is up and answers; addresses are known.
    STARTED = "STARTED"
    FENCED = "FENCED"
    REPAIRED = "REPAIRED"
    LIVE = "LIVE"
    # The process ended.
    EXITED = "EXITED"
    # It could not start or a command failed for good.
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartIdentity:
    """The part that an agent found at a position."""

    # `sn0/n07/npu3/die1`.
    position: str = ""
    serial: str = ""
    vdie_id: str = ""
    physical_id: int = 0
    logic_id: int = 0
    super_device_id: str = ""
    device_ip: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRegistration:
    """What an agent says of its node. Stored under agents/<node>/registration, without a lease."""

    # `sn0/n07`.
    node: str = ""
    boot_id: str = ""
    version: str = ""
    # Engine drivers that this node can run.
    drivers: tuple[str, ...] = ()
    parts: tuple[PartIdentity, ...] = ()
    host_memory_bytes: int = 0
    start_time: float = 0.0
    # The computer that carries this node, where one carries several (simulated nodes on
    # Kubernetes): they fall silent together, and that is one failure. Empty: the node stands for
    # itself.
    host: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultOccurrence:
    """One numbered occurrence; a last value alone would lose what frequency rules count."""

    sequence: int = 0
    code: str = ""
    # die, npu, node, link, switch or plane.
    subject_kind: str = ""
    subject: str = ""
    # OCCUR, RECOVER or ONCE.
    action: str = ""
    level: FaultLevel = FaultLevel.UNSPECIFIED
    device_time: float = 0.0
    agent_time: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveFault:
    """A fault that is present now."""

    code: str = ""
    subject_kind: str = ""
    subject: str = ""
    level: FaultLevel = FaultLevel.UNSPECIFIED


@dataclass(frozen=True, slots=True, kw_only=True)
class DieHolder:
    """A die that kubelet gave to a pod."""

    # `sn0/n07/npu3/die1`.
    die: str = ""
    # `namespace/name`.
    pod: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentHealth:
    """One node's report. Stored under agents/<node>/health with the agent's lease."""

    node: str = ""
    boot_id: str = ""
    sequence: int = 0
    active_faults: tuple[ActiveFault, ...] = ()
    # The last 64.
    occurrences: tuple[FaultOccurrence, ...] = ()
    # What kubelet gave to pods, ours included, if the agent asks it.
    holders: tuple[DieHolder, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSuspicion:
    """A rank's word that a peer is gone."""

    role: str = ""
    instance: int = 0
    rank: int = 0
    incarnation: str = ""
    reason: str = ""
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """What an agent says of one rank."""

    role: str = ""
    instance: int = 0
    rank: int = 0
    die: str = ""
    incarnation: str = ""
    engine_address: str = ""
    data_address: str = ""
    # The newest epoch that the rank acknowledged, and how far it came at it.
    epoch: int = 0
    stage: RankStage = RankStage.UNSPECIFIED
    # Minus the signal that ended it; EXIT_CODE_UNKNOWN where nobody can tell.
    exit_code: int = 0
    message: str = ""
    experts_loaded: int = 0
    kv_tokens_restored: int = 0
    kv_tokens_recomputed: int = 0
    suspicions: tuple[PeerSuspicion, ...] = ()
    # The start_count of the assignment that started this process.
    start_count: int = 0
    # The term in which its epoch was decided, as its assignment says; 0: not known.
    epoch_term: int = 0

    def is_of_another_decision(self, epoch: int, epoch_term: int) -> bool:
        """Did the rank come to this epoch's number in another term?

        One number is decided twice when the store was restored from an older state. Terms that
        are not known tell nothing.
        """
        known = 0 not in (self.epoch_term, epoch_term)
        return self.epoch == epoch and known and self.epoch_term != epoch_term


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentAcks:
    """One node's ranks of one job. Stored under agents/<node>/acks/<job_uid>, without a lease."""

    node: str = ""
    job_uid: str = ""
    ranks: tuple[RankStatus, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Who forbids work on what. Stored under holds/<position>/<kind>.

    One under holds/<position>, as there were before kinds had records of their own, is still read.
    """

    # A position of any level (`sn0/n07`, `sn0/n07/npu3/die1`) or a part's serial.
    subject: str = ""
    # CORDON, DRAIN, FAULT or SEPARATION.
    kind: HoldKind
    reason: str = ""
    message: str = ""
    created_by: str = ""
    create_time: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultLedger:
    """Occurrences folded from a node's reports, kept without a lease.

    Stored under faults/<node>.
    """

    node: str = ""
    boot_id: str = ""
    last_sequence: int = 0
    # The newest 1,024.
    occurrences: tuple[FaultOccurrence, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Injections:
    """Faults that a rehearsal sets on a node's simulated devices.

    Stored under injections/<node>.
    """

    node: str = ""
    faults: tuple[ActiveFault, ...] = ()
