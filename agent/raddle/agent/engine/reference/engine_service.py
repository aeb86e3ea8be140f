"""The `Engine` service of a reference rank: each verb idempotent, each fenced by the epoch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from raddle.agent.engine.reference.config import RankConfig
from raddle.agent.engine.reference.fences import Context, Standing, refusals_told
from raddle.agent.engine.reference.repair import PoolRepair
from raddle.agent.engine.reference.reports import Reports
from raddle.agent.engine.reference.serving import Serving
from raddle.model.kinds import RoleKind
from raddle.model.stats import RankState
from raddle.model.types import ExpertMap, ExpertMove, Fence, Member, RankKey, SequenceRestore
from raddle.v1 import engine_pb2, engine_pb2_grpc, types_pb2
from raddle.wire.codec import from_message, to_message

VERBS = (
    "quiesce",
    "set_members",
    "set_expert_map",
    "load_experts",
    "restore_kv",
    "resume",
    "stats",
)


class EngineService(engine_pb2_grpc.EngineServicer):
    """`serving` is None for a cache member, which has nothing to compute but has `repair`."""

    def __init__(
        self,
        config: RankConfig,
        key: RankKey,
        standing: Standing,
        reports: Reports,
        serving: Serving | None,
        repair: PoolRepair | None,
    ) -> None:
        self._config = config
        self._key = key
        self._standing = standing
        self._reports = reports
        self._serving = serving
        self._repair = repair

    def _state(self) -> Any:
        state = self._serving.state if self._serving is not None else self._standing.state
        return engine_pb2.RankState.Value(f"RANK_STATE_{state}")

    async def Describe(self, _request: Any, _context: Context) -> Any:
        return engine_pb2.DescribeResponse(
            driver="reference",
            verbs=VERBS,
            job_uid=self._standing.job_uid,
            epoch=self._standing.epoch,
            rank=to_message(self._key, types_pb2.RankKey),
            incarnation=self._config.incarnation,
            state=self._state(),
            model_digest=self._serving.shape.digest if self._serving is not None else "",
        )

    async def Ping(self, _request: Any, _context: Context) -> Any:
        return engine_pb2.PingResponse(
            job_uid=self._standing.job_uid,
            epoch=self._standing.epoch,
            incarnation=self._config.incarnation,
            state=self._state(),
        )

    @refusals_told
    async def Quiesce(self, request: Any, _context: Context) -> Any:
        self._standing.require(request.fence, newer=True)
        self._standing.state = RankState.QUIESCED
        held = 0
        if self._serving is not None:
            abort = request.mode == engine_pb2.QUIESCE_MODE_ABORT
            held = await self._serving.quiesce(request.fence.epoch, abort=abort)
        return engine_pb2.QuiesceResponse(sequences_held=held)

    @refusals_told
    async def SetMembers(self, request: Any, _context: Context) -> Any:
        self._standing.require(request.fence, newer=False)
        members = tuple(from_message(m, Member) for m in request.members)
        if self._serving is not None:
            self._serving.set_members(members)
        if self._repair is not None:
            caches = [m for m in members if m.kind is RoleKind.CACHE]
            self._repair.set_members(caches, request.fence.epoch)
        return engine_pb2.SetMembersResponse()

    @refusals_told
    async def SetExpertMap(self, request: Any, _context: Context) -> Any:
        self._standing.require(request.fence, newer=False)
        if self._serving is not None:
            self._serving.set_expert_map(from_message(request.expert_map, ExpertMap))
        return engine_pb2.SetExpertMapResponse()

    @refusals_told
    async def LoadExperts(self, request: Any, _context: Context) -> Any:
        self._standing.require(request.fence, newer=False)
        if self._serving is None:
            return engine_pb2.LoadExpertsResponse()
        moves = tuple(from_message(move, ExpertMove) for move in request.moves)
        count, size = await self._serving.load_experts(moves)
        return engine_pb2.LoadExpertsResponse(experts_loaded=count, bytes_loaded=size)

    @refusals_told
    async def RestoreKv(self, request: Any, _context: Context) -> Any:
        self._standing.require(request.fence, newer=False)
        if self._serving is None:
            return engine_pb2.RestoreKvResponse()
        sequences = tuple(from_message(s, SequenceRestore) for s in request.sequences)
        fence = from_message(request.fence, Fence)
        restored, missing = await self._serving.restore_kv(fence, sequences)
        return engine_pb2.RestoreKvResponse(
            sequences=len(sequences), tokens_restored=restored, blocks_missing=missing
        )

    @refusals_told
    async def Resume(self, request: Any, _context: Context) -> Any:
        self._standing.require(request.fence, newer=False)
        self._standing.state = RankState.SERVING
        if self._serving is not None:
            self._serving.resume(request.fence.epoch)
        return engine_pb2.ResumeResponse()

    async def WatchStats(self, _request: Any, _context: Context) -> AsyncIterator[Any]:
        async for stats in self._reports.stream():
            yield to_message(stats, engine_pb2.WatchStatsResponse)
