"""Sequences and KV blocks of jobs between the machine and `kvcache`: intake, plans, outcomes.

In go what members and front doors say and which ranks are lost; out come restore plans, and the
standing of a job's KV for those who ask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from raddle.core.admission import model_shape
from raddle.core.context import Context, active_seats, is_ended, kv_replicas
from raddle.core.events import SequencesReported, StatsReported
from raddle.core.kvcache.figures import PREFILL_TOKENS_PER_S_A_DIE
from raddle.core.kvcache.index import BlockEvent, block_event
from raddle.core.kvcache.recoveries import Recovery
from raddle.core.kvcache.restore import KvCosts, Pool, RestorePlan, Survivor, plan_restores
from raddle.model import keys
from raddle.model.job import Job, Placement
from raddle.model.kinds import RoleKind
from raddle.model.kv import BlockSpace, KvTier
from raddle.model.stats import KvEvent
from raddle.model.types import RankKey, SequenceRestore

_SEQUENCES_A_DOOR_MAX = 100_000
# What one plan names of sequences (a node of 16 full decode ranks) and of their blocks, so that it
# fits into a transaction; front doors place the others by load.
RESTORES_A_PLAN_MAX = 1_600
BLOCKS_A_PLAN_MAX = 2_000
POOL_TIERS = (KvTier.DRAM, KvTier.STORAGE)


def space_of(job: Job, event: KvEvent | None = None) -> BlockSpace:
    """What the job's blocks depend on besides tokens; an event may name adapter and tenant."""
    model = job.spec.model
    return BlockSpace(
        model_digest=model.config_digest,
        weight_dtype=model.weight_dtype,
        kv_dtype=model.kv_dtype,
        hash_scheme=job.spec.roles[0].engine.driver if job.spec.roles else "",
        block_tokens=model.kv_block_tokens,
        lora=event.lora if event else "",
        tenant_salt=event.tenant_salt if event else "",
        kv_group=event.kv_group if event else 0,
    )


def take_stats(context: Context, event: StatsReported) -> None:
    """Blocks that members stored and removed, how prompts met them, and how repair goes."""
    job = context.state.job(event.job_uid)
    if job is None or is_ended(job):
        return
    index = context.state.index
    for report in event.reports:
        for change in report.kv_events:
            try:
                taken = _event_of(job, change)
            except ValueError:
                # A member that names blocks wrongly has none that anybody could find.
                context.state.kv_events_refused += 1
                continue
            index.apply((event.job_uid, report.rank), report.incarnation, taken)
        context.state.count_kv(event.job_uid, report)
        if report.kv_repair is not None:
            said = (report.incarnation, report.epoch, report.kv_repair)
            context.state.kv_repairs[event.job_uid, report.rank] = said


def _event_of(job: Job, change: KvEvent) -> BlockEvent:
    """A member's event as the index takes it.

    Raises:
        ValueError: a hash is no hash, or the blocks are of another size than the job's.
    """
    space = space_of(job, change)
    if change.block_tokens not in (0, space.block_tokens):
        raise ValueError("blocks of another size")
    return block_event(change, space)


def take_sequences(context: Context, event: SequencesReported) -> None:
    """What a front door says of its sequences."""
    job = context.state.job(event.job_uid)
    if job is None or is_ended(job):
        return
    doors = context.state.sequences.setdefault(event.job_uid, {})
    if event.snapshot:
        doors[event.front_door_id] = {}
    door = doors.setdefault(event.front_door_id, {})
    for name in event.removed:
        door.pop(name, None)
    for sequence in event.updated:
        if len(door) < _SEQUENCES_A_DOOR_MAX or sequence.sequence_id in door:
            door[sequence.sequence_id] = sequence
    done = context.state.recoveries.reported(
        event.job_uid, event.updated, event.removed, context.now
    )
    for recovery in done:
        _record_outcome(context, recovery)


def _record_outcome(context: Context, recovery: Recovery) -> None:
    """All sequences are back: the incident tells when, beside what was predicted."""
    incident = context.state.records.get(keys.incident(recovery.incident_id))
    if incident is None or not recovery.backs_s:
        return
    plans = tuple(
        replace(
            plan,
            instances=tuple(
                replace(part, kv_median_actual=recovery.median_s, kv_last_actual=recovery.last_s)
                if part.sequences_restored
                else part
                for part in plan.instances
            ),
        )
        if (plan.job_uid, plan.epoch) == (recovery.job_uid, recovery.epoch)
        else plan
        for plan in incident.plans
    )
    context.state.put(keys.incident(incident.id), replace(incident, plans=plans))


def plan_lost_sequences(
    context: Context, job: Job, placement: Placement, lost: set[RankKey], incident_id: str
) -> RestorePlan:
    """A new home for each sequence that sits on no process that was ever live.

    So also for those of an earlier plan, which gives way to this one before it was carried out.
    """
    state = context.state
    for key in lost:
        # Whatever it held is gone, whether or not its successor has spoken yet.
        state.index.drop((job.uid, key), _incarnations(context, job, key))
        state.kv_repairs.pop((job.uid, key), None)
    seats = active_seats(context, job, placement)
    stay = {seat.key for seat in seats if seat.placement.start_count <= job.live_epoch}
    sequences = state.all_sequences(job.uid)
    mine = [s for s in sequences if s.rank not in stay][:RESTORES_A_PLAN_MAX]
    if not mine:
        return RestorePlan()
    counts: dict[RankKey, int] = {}
    tokens: dict[RankKey, int] = {}
    for sequence in sequences:
        if sequence.rank in stay:
            counts[sequence.rank] = counts.get(sequence.rank, 0) + 1
            held = sequence.prompt_tokens + sequence.sent_tokens
            tokens[sequence.rank] = tokens.get(sequence.rank, 0) + held
    costs = costs_of(context, job)
    room = _tokens_max(context, job, costs)
    survivors = [
        Survivor(
            key=seat.key,
            sequences=counts.get(seat.key, 0),
            sequences_max=seat.role.max_sequences_per_rank,
            tokens=tokens.get(seat.key, 0),
            tokens_max=room.get(seat.role.name, 0),
        )
        for seat in seats
        if seat.role.kind is RoleKind.DECODE
    ]
    members = [seat.key for seat in seats if seat.role.kind is RoleKind.CACHE]
    peers = [seat.key for seat in seats if seat.placement.die and seat.key in stay]
    pool = Pool(state.index, job.uid, space_of(job), members, peers)
    plan = _bounded(plan_restores(mine, survivors, pool, costs))
    if plan.restores:
        waiting = {s.sequence_id: s.sent_tokens for s in mine}
        state.recoveries.began(
            Recovery(job.uid, incident_id, job.epoch, plan, context.now, waiting)
        )
    return plan


def _incarnations(context: Context, job: Job, key: RankKey) -> list[str]:
    """Processes of a rank that its agents tell of."""
    by_node = context.state.acks.get(job.uid, {})
    statuses = (context.state.rank_status(job.uid, node, key) for node in by_node)
    return [status.incarnation for status in statuses if status is not None and status.incarnation]


def _bounded(plan: RestorePlan) -> RestorePlan:
    """Name no more blocks than a transaction has room for: ranks look the others up themselves."""
    left = BLOCKS_A_PLAN_MAX
    found: list[SequenceRestore] = []
    for restore in plan.restores:
        hashes = restore.block_hashes[:left]
        left -= len(hashes)
        found.append(replace(restore, block_hashes=hashes))
    return replace(plan, restores=tuple(found))


def costs_of(context: Context, job: Job) -> KvCosts:
    """Bandwidths and prefill rate of the slowest machine."""
    machines = list(context.cluster.supernodes.values())
    model = job.spec.model
    host = min((m.die_to_host_bytes_per_s for m in machines), default=151_000_000_000)
    peer = min((m.die_to_die_bytes_per_s for m in machines), default=196_000_000_000)
    return KvCosts(
        bytes_per_token=model_shape(model).kv_bytes_per_token(model.kv_dtype or "bf16"),
        pool_bytes_per_s=host,
        peer_bytes_per_s=peer,
        host_bytes_per_s=host,
        prefill_tokens_per_s=min(
            (m.prefill_tokens_per_s or PREFILL_TOKENS_PER_S_A_DIE for m in machines),
            default=PREFILL_TOKENS_PER_S_A_DIE,
        ),
        correction=context.state.recoveries.correction(job.uid),
    )


def _tokens_max(context: Context, job: Job, costs: KvCosts) -> dict[str, int]:
    """KV tokens that fit beside the weights on a die of each decode role; 0 if unknown."""
    machines = list(context.cluster.supernodes.values())
    memory = min((m.die_memory_bytes for m in machines), default=0)
    shape = model_shape(job.spec.model)
    dtype = job.spec.model.weight_dtype or "int8"
    found: dict[str, int] = {}
    for role in job.spec.roles:
        experts = role.slots_per_rank * shape.moe_layers * shape.expert_bytes(dtype)
        free = memory - experts - shape.other_bytes(dtype)
        found[role.name] = max(0, free // costs.bytes_per_token)
    return found


@dataclass(frozen=True, slots=True)
class KvStanding:
    """A job's KV as the leader knows it now."""

    members: dict[RankKey, int]
    replicas: int
    #: Blocks by the number of their copies in the pool: 0, 1, 2, ...
    copies: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return sum(self.copies)

    @property
    def wanted(self) -> int:
        """Copies that each block should have: no more than there are members."""
        return min(self.replicas, len(self.members))

    @property
    def blocks_below(self) -> int:
        return sum(self.copies[: self.wanted])

    @property
    def protection(self) -> float:
        """Share of the blocks that have all their copies; 1 for an empty pool."""
        return 1.0 - self.blocks_below / self.blocks if self.blocks else 1.0


def standing_of(context: Context, job: Job) -> KvStanding:
    """Count the copies of all blocks of the job; looks at every row of the index."""
    *_, standing = standings_of(context, job)
    return standing


def standings_of(context: Context, job: Job) -> Iterator[KvStanding]:
    """The same in steps, of which the last one is the whole: who has time rests between them."""
    placement = context.state.placement(job.uid)
    seats = active_seats(context, job, placement) if placement is not None else []
    caches = [seat for seat in seats if seat.role.kind is RoleKind.CACHE]
    index = context.state.index
    names = [(job.uid, seat.key) for seat in caches]
    members = {seat.key: index.blocks((job.uid, seat.key)) for seat in caches}
    replicas = max((kv_replicas(seat.role) for seat in caches), default=0)
    copies = np.zeros(1, dtype=np.int64)
    for piece in index.copies(names, POOL_TIERS):
        copies = piece + (copies if copies.size == piece.size else 0)
        yield KvStanding(members, replicas, tuple(np.trim_zeros(copies, "b").tolist()) or (0,))
