"""Values that jobs, incidents and routes share: rank names, fences, members, expert maps.

The same field names as in `proto/raddle/v1`; `raddle.wire.codec` turns one into the other.
Times are seconds since 1970 of the scheduler's clock, durations are seconds; 0 means not set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from raddle.model.kinds import RoleKind
from raddle.model.reasons import Code

#: The longest time that anybody may ask for: ten years. Longer ones are slips of units, and what
#: is far above cannot be stored.
DURATION_S_MAX = 10 * 365 * 86_400


class WeightSource(StrEnum):
    """Where a copy of an expert's weights comes from."""

    UNSPECIFIED = "UNSPECIFIED"
    # A rank that holds a live copy.
    PEER = "PEER"
    # The DRAM model cache of the hosts.
    POOL = "POOL"
    # The checkpoint on disk.
    DISK = "DISK"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankKey:
    """One rank of a job: a role, an instance (one expert-parallel group) and the rank in it."""

    role: str = ""
    instance: int = 0
    rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """Why something was decided, refused or waits.

    A code for programs and a sentence for people.
    """

    reason: str = ""
    message: str = ""

    def says(self, reason: Code) -> bool:
        return self.reason == reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """Every command to a rank carries the job and the epoch; an older epoch is refused."""

    job_uid: str = ""
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A rank as its peers, routers and the leader reach it."""

    rank: RankKey = field(default_factory=RankKey)
    # prefill, decode or cache.
    kind: RoleKind
    # Position of the die (`sn0/n07/npu3/die1`); empty for a cache member, which takes host memory.
    die: str = ""
    node: str = ""
    # gRPC address of the rank's Engine service, host:port.
    engine_address: str = ""
    # Address of the rank's expert traffic, host:port.
    data_address: str = ""
    # Names one process: a restarted rank has another incarnation.
    incarnation: str = ""
    # Name of the rack that the node stands in.
    rack: str = ""
    # Of a cache member: copies that the pool keeps of each block, and the member's room.
    kv_replicas: int = 0
    dram_bytes: int = 0
    # The epoch at which the process was started.
    start_epoch: int = 0
    # Of a cache member: the slots of the pool's map that it keeps, 16 bits each, little-endian.
    kv_slots: bytes = b""
    # It hands its blocks on and takes no new ones: its node is being drained.
    kv_draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMapLayer:
    """One layer: the logical expert of each physical slot, -1 for an empty or dead slot."""

    physical_to_logical: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMap:
    """Which expert sits in which physical slot.

    For every mixture-of-experts layer of one instance.
    """

    # Every rank hosts this many slots a layer; slot s sits on rank s / slots_per_rank.
    slots_per_rank: int = 0
    experts: int = 0
    layers: tuple[ExpertMapLayer, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMove:
    """Load one expert of one layer into one local slot of the rank that gets this."""

    layer: int = 0
    expert: int = 0
    # Physical slot in the instance's map.
    slot: int = 0
    source: WeightSource = WeightSource.UNSPECIFIED
    # Rank to read from when the source is a peer.
    source_rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRestore:
    """What happens to one sequence of a lost rank."""

    sequence_id: str = ""
    source: RankKey = field(default_factory=RankKey)
    target: RankKey = field(default_factory=RankKey)
    # Full KV blocks still held by pool members or peers, oldest first, as hex hashes.
    block_hashes: tuple[str, ...] = ()
    # Tokens of the sequence so far: the prompt and the tokens already sent.
    tokens: int = 0
    tokens_restored: int = 0
    tokens_recomputed: int = 0
    # RESTORE, RECOMPUTE or GIVE_UP (it would not be back before its deadline).
    why: Why = field(default_factory=Why)
    # When it makes tokens again, counted from the plan.
    predicted: float = 0.0
    # Ranks that hold blocks of it in their own memory, for what the pool lacks.
    peers: tuple[RankKey, ...] = ()
