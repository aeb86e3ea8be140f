"""A job's KV for those who ask, from the leader's memory: status, places of blocks, metrics."""

from __future__ import annotations

import asyncio

from raddle.core.context import Context, Seat, active_seats
from raddle.core.kvcache.figures import REPAIR_BYTES_PER_S
from raddle.core.kvcache.index import block_keys
from raddle.core.kvcache.recoveries import Recovery
from raddle.core.pools import repair_of
from raddle.core.sequences import KvStanding, costs_of, space_of, standing_of, standings_of
from raddle.model.errors import PermanentError, Reason, TemporaryError
from raddle.model.job import Job, JobState
from raddle.model.kinds import RoleKind
from raddle.model.kv import KvTier
from raddle.model.reasons import Decision
from raddle.model.stats import KvEvent, KvRepair
from raddle.model.types import RankKey
from raddle.scheduler.replica import Replica
from raddle.v1 import engine_pb2, scheduler_pb2, types_pb2
from raddle.wire.codec import to_message

LOCATE_BLOCKS_MAX = 1_000
_METRICS_INTERVAL_S = 5.0
# Jobs whose pools have metrics of their own; the first of them by uid.
_METRICS_JOBS_MAX = 1_000


def leader_context(replica: Replica) -> Context:
    """What the leader in this process knows.

    Raises:
        TemporaryError: NOT_LEADER or NO_LEADER, also before its first decision.
    """
    context = replica.require_leader().context()
    if context is None:
        raise TemporaryError(
            Reason.NO_LEADER, "the leader has not decided anything yet; try again."
        )
    return context


def _job(context: Context, job_uid: str) -> Job:
    return context.state.require_job(job_uid)


def status(replica: Replica, job_uid: str) -> scheduler_pb2.GetKvStatusResponse:
    """The job's pool and recoveries."""
    context = leader_context(replica)
    job = _job(context, job_uid)
    standing = standing_of(context, job)
    restored, computed = context.state.kv_tokens.get(job_uid, (0, 0))
    answer = scheduler_pb2.GetKvStatusResponse(
        job_uid=job_uid,
        replicas=standing.replicas,
        blocks_by_copies=standing.copies,
        blocks=standing.blocks,
        blocks_below=standing.blocks_below,
        protection=standing.protection,
        hit_rate=hit_rate(restored, computed),
        kv_tokens_restored=restored,
        kv_tokens_recomputed=computed,
        recoveries=[_recovery(one) for one in context.state.recoveries.of(job_uid)],
    )
    answer.time_to_protection.FromNanoseconds(
        round(time_to_protection_s(context, job, standing) * 1e9)
    )
    seats = _seats(context, job)
    for key, blocks in standing.members.items():
        member = answer.members.add(rank=to_message(key, types_pb2.RankKey), blocks=blocks)
        if key in seats:
            member.node = seats[key].placement.node
            member.draining = seats[key].placement.kv_draining
        repair = repair_of(context, job_uid, key)
        if repair is not None:
            member.repair.CopyFrom(to_message(repair, engine_pb2.KvRepair))
    return answer


def hit_rate(restored: int, computed: int) -> float:
    """Share of tokens that ranks found in the pool instead of computing them."""
    return restored / (restored + computed) if restored + computed else 0.0


def time_to_protection_s(context: Context, job: Job, standing: KvStanding) -> float:
    """How long repair needs, as the members say.

    Before they have looked: what their budgets need for what lacks copies, spread evenly.
    """
    if not standing.blocks_below:
        return 0.0
    said = max((repair.left for repair in _repairs(context, job, standing)), default=0.0)
    if said > 0:
        return said
    block_bytes = costs_of(context, job).bytes_per_token * job.spec.model.kv_block_tokens
    lacking = sum(
        (standing.wanted - copies) * count
        for copies, count in enumerate(standing.copies[: standing.wanted])
    )
    return lacking * block_bytes / (REPAIR_BYTES_PER_S * max(1, len(standing.members)))


def _repairs(context: Context, job: Job, standing: KvStanding) -> list[KvRepair]:
    found = [repair_of(context, job.uid, key) for key in standing.members]
    return [repair for repair in found if repair is not None]


def _seats(context: Context, job: Job) -> dict[RankKey, Seat]:
    placement = context.state.placement(job.uid)
    seats = active_seats(context, job, placement) if placement is not None else []
    return {seat.key: seat for seat in seats}


def _nodes(context: Context, job: Job) -> dict[RankKey, str]:
    return {key: seat.placement.node for key, seat in _seats(context, job).items()}


def _recovery(one: Recovery) -> scheduler_pb2.KvRecovery:
    restores = one.plan.restores
    message = scheduler_pb2.KvRecovery(
        incident_id=one.incident_id,
        epoch=one.epoch,
        sequences=len(restores),
        sequences_given_up=sum(r.why.says(Decision.GIVE_UP) for r in restores),
        sequences_back=len(one.backs_s),
        kv_tokens_restored=sum(r.tokens_restored for r in restores),
        kv_tokens_recomputed=sum(r.tokens_recomputed for r in restores),
    )
    for duration, seconds in (
        (message.median_predicted, one.plan.median_s),
        (message.median_actual, one.median_s),
        (message.last_predicted, one.plan.last_s),
        (message.last_actual, one.last_s),
    ):
        duration.FromNanoseconds(round(seconds * 1e9))
    return message


def locate(
    replica: Replica, job_uid: str, request: scheduler_pb2.LocateKvBlocksRequest
) -> scheduler_pb2.LocateKvBlocksResponse:
    """All copies of the blocks.

    Raises:
        PermanentError: INVALID_ARGUMENT for what names no block, LIMIT_EXCEEDED for too many.
    """
    hashes = list(request.block_hashes)
    if len(hashes) > LOCATE_BLOCKS_MAX:
        raise PermanentError(
            Reason.LIMIT_EXCEEDED,
            f"{len(hashes)} blocks were asked for; at most {LOCATE_BLOCKS_MAX} at once.",
        )
    try:
        block_keys(hashes)
    except ValueError as error:
        raise PermanentError(
            Reason.INVALID_ARGUMENT, f"block_hashes: {error}; hashes are hexadecimal."
        ) from error
    context = leader_context(replica)
    job = _job(context, job_uid)
    named = KvEvent(lora=request.lora, tenant_salt=request.tenant_salt, kv_group=request.kv_group)
    space, nodes = space_of(job, named), _nodes(context, job)
    answer = scheduler_pb2.LocateKvBlocksResponse()
    tiers = list(KvTier)
    for block_hash in hashes:
        message = answer.blocks.add(block_hash=block_hash)
        for place in context.state.index.places(space, block_hash):
            uid, key = place.member
            if uid == job_uid:
                message.places.add(
                    rank=to_message(key, types_pb2.RankKey),
                    node=nodes.get(key, ""),
                    tier=tiers.index(place.tier),
                )
    present = [bool(block.places) for block in answer.blocks]
    answer.prefix_blocks = present.index(False) if False in present else len(present)
    return answer


async def follow_metrics(replica: Replica) -> None:
    """Keep the metrics of pools up to date while this process leads."""
    while True:
        await asyncio.sleep(_METRICS_INTERVAL_S)
        context = replica.leader.context() if replica.leader is not None else None
        replica.metrics.clear_kv()
        if context is not None:
            replica.metrics.kv_refused(context.state.kv_events_refused)
            await _measure(replica, context)


async def _measure(replica: Replica, context: Context) -> None:
    pooled = [
        job
        for job in context.state.jobs()
        if job.state in (JobState.READY, JobState.RECOVERING)
        and any(role.kind is RoleKind.CACHE for role in job.spec.roles)
    ]
    for job in pooled[:_METRICS_JOBS_MAX]:
        standing: KvStanding | None = None
        for counted in standings_of(context, job):
            standing = counted
            # The leader decides on this loop too.
            await asyncio.sleep(0)
        assert standing is not None
        repairs = _repairs(context, job, standing)
        replica.metrics.kv_measured(
            job.uid,
            {
                "hit_ratio": hit_rate(*context.state.kv_tokens.get(job.uid, (0, 0))),
                "protection_ratio": standing.protection,
                "blocks": standing.blocks,
                "blocks_below": standing.blocks_below,
                "time_to_protection_seconds": time_to_protection_s(context, job, standing),
                "repair_copies_made": sum(repair.copies_made for repair in repairs),
                "repair_copies_left": sum(repair.copies_left for repair in repairs),
                "repair_bytes_made": sum(repair.bytes_made for repair in repairs),
                "repair_bytes_left": sum(repair.bytes_left for repair in repairs),
            },
        )
