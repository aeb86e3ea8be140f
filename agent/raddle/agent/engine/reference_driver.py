"""The driver of the reference engine: real ranks, the `Engine` service, all verbs."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import structlog

from raddle.agent.core.events import (
    Drive,
    DriveFailed,
    Driven,
    PeerSuspected,
    RankExited,
    RankSilent,
    RankStarted,
    StartFailed,
    StartRank,
    StopRank,
)
from raddle.agent.engine.driver import JobContext, Tell
from raddle.agent.engine.launcher import Launcher, Life, Running
from raddle.agent.engine.reference.config import RankAddress, RankConfig, StepTimes
from raddle.agent.engine.reference.shape import parse_shape
from raddle.agent.engine.reference.weights import write_checkpoint
from raddle.model.errors import RaddleError, Reason
from raddle.model.health import PeerSuspicion, RankStage
from raddle.model.job import AssignmentStage, JobAssignment, RankAssignment
from raddle.model.kinds import RoleKind
from raddle.model.names import rank_folder, ranks_folder
from raddle.model.stats import RankStats
from raddle.model.types import Fence, RankKey
from raddle.telemetry.channels import make_channel
from raddle.telemetry.tls import RANK_NAME, TlsFiles
from raddle.v1 import engine_pb2, engine_pb2_grpc, types_pb2
from raddle.wire.codec import from_message, to_message
from raddle.wire.status import error_from

# A rank that lives answers these at once: one that does not, twice, hangs.
QUICK_TIMEOUT_S = 1.5
ATTEMPTS_OF_A_HUNG_RANK = 2
# One that is not driven is asked now and then. Peers that wait for it in a step notice within a
# second that it hangs; where none waits, nobody but its agent can.
PING_EVERY_S = 1.0
PINGS_OF_A_HUNG_RANK = 3
# Weights and KV blocks take the time that they take.
LOAD_TIMEOUT_S = 30.0
_RETRY_S = 0.1
_RETRY_S_MAX = 1.0
_FINAL = (Reason.WRONG_JOB, Reason.ENGINE_UNSUPPORTED)
log = structlog.get_logger()
_AS_THEY_COME = StepTimes()


class ReferenceRank:
    """One rank with its channel, its life and the tasks that follow both."""

    def __init__(
        self,
        address: RankAddress,
        key: RankKey,
        life: Life,
        channel: grpc.aio.Channel,
    ) -> None:
        self.address = address
        self.key = key
        self.life = life
        self.channel = channel
        self.stub: Any = engine_pb2_grpc.EngineStub(channel)
        self.tasks: list[asyncio.Task[None]] = []
        #: Set when reports shall begin again, with all that the rank holds.
        self.again = asyncio.Event()
        #: How long to wait before reports that broke off are asked for again.
        self.reports_pause_s = _RETRY_S

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        self.life.close()
        await self.channel.close()


class ReferenceDriver:
    """Ranks of one node. `stats` gets their high-rate reports (job uid, report)."""

    name = "reference"
    needs_context = True
    verbs: tuple[str, ...] = (
        "quiesce",
        "set_members",
        "set_expert_map",
        "load_experts",
        "restore_kv",
        "resume",
    )

    def __init__(
        self,
        node: str,
        folder: Path,
        tell: Tell,
        stats: Any,
        launcher: Launcher,
        *,
        host: str = "127.0.0.1",
        tls: TlsFiles | None = None,
        step: StepTimes = _AS_THEY_COME,
    ) -> None:
        self._host = host
        self._step = step
        self._tls = tls
        self._node = node
        self._folder = folder
        self._tell = tell
        self._stats = stats
        self._launcher = launcher
        self._ranks: dict[tuple[str, RankKey, int], ReferenceRank] = {}
        self._starting: set[tuple[str, RankKey, int]] = set()
        self._stopping: set[tuple[str, RankKey, int]] = set()

    # --- ranks ---------------------------------------------------------------------------------

    async def adopt(self) -> None:
        for folder in sorted((self._folder / ranks_folder(self._node)).glob("*/*")):
            found = await self._launcher.adopt(folder)
            if found is None:
                continue
            address = found.address
            log.info(
                "rank adopted",
                job_uid=address.job_uid,
                epoch=address.epoch,
                rank=f"{address.role}/{address.instance}/{address.rank}",
                incarnation=address.incarnation,
                pid=address.pid,
            )
            self._begin(found)

    async def start(self, instruction: StartRank) -> None:
        job, rank = instruction.job, instruction.rank
        where = (job.job_uid, rank.rank, rank.start_count)
        self._starting.add(where)
        try:
            config = await self._config(job, rank)
            folder = self._folder / rank_folder(self._node, *where)
            found = await self._launcher.start(folder, config, lambda: where not in self._stopping)
        except (RaddleError, OSError) as error:
            self._stopping.discard(where)
            self._tell(StartFailed(*where, str(error)))
            return
        finally:
            self._starting.discard(where)
        if found is None:
            self._stopping.discard(where)
            self._tell(RankExited(*where, 0, "ended on request"))
            return
        self._begin(found)
        if where in self._stopping:
            await found.life.end()

    async def _config(self, job: JobAssignment, rank: RankAssignment) -> RankConfig:
        role = next(role for role in job.roles if role.name == rank.rank.role)
        shape = parse_shape(job.model.config)
        checkpoint = self._checkpoint(job, shape.digest)
        await asyncio.to_thread(write_checkpoint, shape, checkpoint)
        key = rank.rank
        name = f"{job.job_uid}-{key.role}-{key.instance}-{key.rank}-{rank.start_count}"
        return RankConfig(
            job_uid=job.job_uid,
            epoch=rank.start_count,
            role=key.role,
            kind=rank.kind,
            instance=key.instance,
            rank=key.rank,
            incarnation=f"{name}-{secrets.token_hex(3)}",
            node=self._node,
            die=rank.die,
            model_config=job.model.config,
            checkpoint=str(checkpoint),
            kv_block_tokens=job.model.kv_block_tokens,
            dram_bytes=role.dram_bytes,
            max_sequences=role.max_sequences_per_rank,
            step_deadline_s=self._step.deadline_s,
            step_min_s=self._step.min_s,
            host=self._host,
            tls_ca=str(self._tls.ca) if self._tls else "",
            tls_certificate=str(self._tls.certificate) if self._tls else "",
            tls_key=str(self._tls.key) if self._tls else "",
        )

    def _checkpoint(self, job: JobAssignment, digest: str) -> Path:
        """The job's weights: a folder that it names, else one of the agent's own."""
        if job.model.weights_uri.startswith("file://"):
            return Path(job.model.weights_uri.removeprefix("file://"))
        return self._folder / "checkpoints" / digest[:16]

    def _begin(self, found: Running) -> None:
        address = found.address
        key = RankKey(role=address.role, instance=address.instance, rank=address.rank)
        channel = make_channel(
            address.engine_address,
            identity=f"agent/{self._node}",
            tls=self._tls,
            server_name=RANK_NAME,
        )
        rank = ReferenceRank(address, key, found.life, channel)
        slot = (address.job_uid, key, address.start_count)
        self._ranks[slot] = rank
        self._tell(
            RankStarted(
                address.job_uid,
                key,
                address.start_count,
                found.config.die,
                address.incarnation,
                address.engine_address,
                address.data_address,
                address.epoch,
            )
        )
        rank.tasks = [
            asyncio.create_task(self._watch_end(slot, rank)),
            asyncio.create_task(self._follow_reports(slot, rank)),
            asyncio.create_task(self._watch_answers(slot, rank)),
        ]

    async def _watch_end(self, slot: tuple[str, RankKey, int], rank: ReferenceRank) -> None:
        _speak_of(slot)
        code = await rank.life.wait()
        wanted = slot in self._stopping
        self._stopping.discard(slot)
        self._ranks.pop(slot, None)
        message = "ended on request" if wanted else "the rank is gone"
        self._tell(RankExited(*slot, code, message))
        rank.life.close()
        await rank.channel.close()

    async def _watch_answers(self, slot: tuple[str, RankKey, int], rank: ReferenceRank) -> None:
        _speak_of(slot)
        missed = 0
        while slot in self._ranks and slot not in self._stopping:
            try:
                await self._quick(rank.stub.Ping, engine_pb2.PingRequest())
                missed = 0
            except grpc.aio.AioRpcError as error:
                # Who hangs lets the time pass; what fails at once is a matter of the way to it.
                missed += error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                if missed and missed % PINGS_OF_A_HUNG_RANK == 0 and slot in self._ranks:
                    said = f"it did not answer its agent {missed} times in a row"
                    self._tell(RankSilent(*slot, said))
            await asyncio.sleep(PING_EVERY_S)

    async def stop(self, instruction: StopRank) -> None:
        slot = (instruction.job_uid, instruction.key, instruction.start_count)
        rank = self._ranks.get(slot)
        if rank is not None or slot in self._starting:
            self._stopping.add(slot)
        if rank is not None:
            await rank.life.end()

    # --- reports -------------------------------------------------------------------------------

    def report_again(self) -> None:
        """A new leader knows nothing: each rank tells again what it holds."""
        for rank in self._ranks.values():
            rank.again.set()

    async def _follow_reports(self, slot: tuple[str, RankKey, int], rank: ReferenceRank) -> None:
        """Follow a rank's reports until it is gone or to be ended: one that hangs may never go."""
        _speak_of(slot)
        while slot in self._ranks and slot not in self._stopping:
            rank.again.clear()
            following = asyncio.create_task(self._follow(slot, rank))
            again = asyncio.create_task(rank.again.wait())
            try:
                await asyncio.wait({following, again}, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait({again}, timeout=rank.reports_pause_s)
                rank.reports_pause_s = min(2 * rank.reports_pause_s, _RETRY_S_MAX)
            finally:
                for task in (following, again):
                    task.cancel()
                await asyncio.gather(following, again, return_exceptions=True)

    async def _follow(self, slot: tuple[str, RankKey, int], rank: ReferenceRank) -> None:
        try:
            async for message in rank.stub.WatchStats(engine_pb2.WatchStatsRequest()):
                rank.reports_pause_s = _RETRY_S
                self._reported(slot, from_message(message, RankStats))
        except grpc.aio.AioRpcError as error:
            log.info("rank reports broke off", why=error.details())

    def _reported(self, slot: tuple[str, RankKey, int], stats: RankStats) -> None:
        for fault in stats.peer_faults:
            suspicion = PeerSuspicion(
                role=fault.peer.role,
                instance=fault.peer.instance,
                rank=fault.peer.rank,
                incarnation=fault.peer_incarnation,
                reason=fault.reason,
                epoch=fault.epoch,
            )
            self._tell(PeerSuspected(*slot, suspicion))
        self._stats(slot[0], stats)

    # --- verbs ---------------------------------------------------------------------------------

    async def drive(self, instruction: Drive, context: JobContext | None) -> None:
        job, want = instruction.job, instruction.rank
        slot = (job.job_uid, want.rank, want.start_count)
        rank = self._ranks.get(slot)
        if rank is None:
            return
        if instruction.attempts:
            await asyncio.sleep(_RETRY_S * instruction.attempts)
        fence = to_message(Fence(job_uid=job.job_uid, epoch=job.epoch), types_pb2.Fence)
        try:
            if job.stage is AssignmentStage.LIVE:
                await self._quick(rank.stub.Resume, engine_pb2.ResumeRequest(fence=fence))
                self._tell(Driven(*slot, job.epoch, RankStage.LIVE, last=True))
                return
            keep = engine_pb2.QUIESCE_MODE_KEEP
            await self._quick(rank.stub.Quiesce, engine_pb2.QuiesceRequest(fence=fence, mode=keep))
            prepare = job.stage is AssignmentStage.PREPARE
            self._tell(Driven(*slot, job.epoch, RankStage.FENCED, last=not prepare))
            if prepare:
                assert context is not None
                await self._prepare(rank, job, want, fence, context)
        except grpc.aio.AioRpcError as error:
            failure = error_from(error)
            hangs = (
                error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                and instruction.attempts + 1 >= ATTEMPTS_OF_A_HUNG_RANK
            )
            final = hangs or failure.reason in _FINAL
            self._tell(DriveFailed(*slot, job.epoch, failure.message, final=final))

    async def _quick(self, method: Any, request: Any) -> Any:
        return await method(request, timeout=QUICK_TIMEOUT_S)

    async def _call(self, method: Any, request: Any) -> Any:
        return await method(request, timeout=LOAD_TIMEOUT_S)

    async def _prepare(
        self,
        rank: ReferenceRank,
        job: JobAssignment,
        want: RankAssignment,
        fence: Any,
        context: JobContext,
    ) -> None:
        members = [to_message(m, types_pb2.Member) for m in context.routes.members]
        await self._quick(
            rank.stub.SetMembers, engine_pb2.SetMembersRequest(fence=fence, members=members)
        )
        loaded = restored = 0
        if want.kind is not RoleKind.CACHE:
            loaded = await self._load(rank, want, fence, context)
            restored = await self._restore(rank, want, fence)
        slot = (job.job_uid, want.rank, want.start_count)
        self._tell(
            Driven(
                *slot,
                job.epoch,
                RankStage.REPAIRED,
                last=True,
                experts_loaded=loaded,
                kv_tokens_restored=restored,
            )
        )

    async def _load(
        self, rank: ReferenceRank, want: RankAssignment, fence: Any, context: JobContext
    ) -> int:
        """Set the map of the rank's instance and load what it asks for."""
        for part in context.maps.instances:
            if (part.role, part.instance) == (want.rank.role, want.rank.instance):
                table = to_message(part.expert_map, types_pb2.ExpertMap)
                await self._call(
                    rank.stub.SetExpertMap,
                    engine_pb2.SetExpertMapRequest(fence=fence, expert_map=table),
                )
        answer = await self._call(
            rank.stub.LoadExperts,
            engine_pb2.LoadExpertsRequest(
                fence=fence, moves=_messages(want.moves, types_pb2.ExpertMove)
            ),
        )
        return int(answer.experts_loaded)

    async def _restore(self, rank: ReferenceRank, want: RankAssignment, fence: Any) -> int:
        if not want.restores:
            return 0
        answer = await self._call(
            rank.stub.RestoreKv,
            engine_pb2.RestoreKvRequest(
                fence=fence, sequences=_messages(want.restores, types_pb2.SequenceRestore)
            ),
        )
        return int(answer.tokens_restored)

    async def close(self) -> None:
        for rank in list(self._ranks.values()):
            with contextlib.suppress(grpc.aio.AioRpcError):
                await rank.close()
        self._ranks.clear()


def _speak_of(slot: tuple[str, RankKey, int]) -> None:
    """Every line of this task names the rank, and not the epoch in which the task began."""
    job_uid, key, _ = slot
    rank = f"{key.role}/{key.instance}/{key.rank}"
    structlog.contextvars.bind_contextvars(job_uid=job_uid, rank=rank)
    structlog.contextvars.unbind_contextvars("epoch", "incident_id")


def _messages(values: Iterable[Any], message_type: Any) -> list[Any]:
    return [to_message(value, message_type) for value in values]
