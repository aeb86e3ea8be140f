"""One node's agent: it registers, reports health, follows its assignment, drives its ranks.

In go the store's records for this node, devices and ranks; out go registration, health and
acknowledgements. What is done about ranks is decided in `raddle.agent.core.machine`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from raddle.agent.core.events import (
    AcksFound,
    AssignmentChanged,
    Drive,
    DriveFailed,
    Event,
    Instruction,
    PeerSuspected,
    RankExited,
    RankSilent,
    StartFailed,
    StartRank,
    StopRank,
    WriteAcks,
)
from raddle.agent.core.faults import FaultLog
from raddle.agent.core.machine import AgentMachine
from raddle.agent.engine.driver import EngineDriver, JobContext
from raddle.agent.health.pod_resources import PodResources
from raddle.agent.health.source import HealthSource
from raddle.agent.leader_link import Stream
from raddle.model import keys
from raddle.model.errors import RaddleError
from raddle.model.health import AgentAcks, AgentRegistration
from raddle.model.job import Assignment, AssignmentStage, JobExpertMaps
from raddle.model.routes import Routes
from raddle.model.types import RankKey
from raddle.store.follow import follow
from raddle.store.protocol import Delete, Lease, Put, Record, Snapshot, Store, Transaction
from raddle.wire import records as wire

LEASE_TTL_S = 4.0
_RETRY_S = 0.2
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the node is."""

    name: str
    version: str
    host_memory_bytes: int
    boot_id: str
    #: The computer that carries it, where one carries several nodes.
    host: str = ""


class NodeAgent:
    """All tasks of one node."""

    def __init__(
        self,
        facts: NodeFacts,
        store: Store,
        source: HealthSource,
        stream: Stream,
        make_drivers: Callable[[Callable[[Event], None]], list[EngineDriver]],
        *,
        pod_resources: PodResources | None = None,
        clock: Callable[[], float] = time.time,
        make_machine: Callable[[str], AgentMachine] = AgentMachine,
    ) -> None:
        self._facts = facts
        self._store = store
        self._source = source
        self._pod_resources = pod_resources
        self._stream = stream
        self._clock = clock
        self._machine = make_machine(facts.name)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._drivers = {driver.name: driver for driver in make_drivers(self.tell)}
        self._contexts: dict[str, tuple[int, asyncio.Task[JobContext | None]]] = {}
        self._unwritten: dict[str, AgentAcks | None] = {}
        self._ack_wanted = asyncio.Event()
        #: What we wrote may be gone from the store: it is told again.
        self._acks_doubtful = asyncio.Event()
        self._health_doubtful = asyncio.Event()
        self._holders_changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._faults = FaultLog(facts.name, facts.boot_id)
        #: Does the store hold our health, under a lease that lives?
        self.is_reporting = False

    def tell(self, event: Event) -> None:
        self._events.put_nowait(event)

    async def run(self) -> None:
        """Until cancelled. Real ranks run on."""
        for driver in self._drivers.values():
            await driver.adopt()
        parts = [
            self._work(),
            self._report_health(),
            self._follow_assignment(),
            self._find_acks(),
            self._write_acks(),
            self._stream.run(),
        ]
        if self._pod_resources is not None:
            parts.append(self._follow_holders(self._pod_resources))
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in (*tasks, *self._tasks):
                task.cancel()
            await asyncio.gather(*tasks, *self._tasks, return_exceptions=True)
            for driver in self._drivers.values():
                await driver.close()

    # --- ranks ---------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            events = [await self._events.get()]
            while not self._events.empty():
                events.append(self._events.get_nowait())
            for event in events:
                self._log_event(event)
            instructions = self._machine.handle(events)
            self._log_commands(instructions)
            for instruction in instructions:
                self._carry_out(instruction)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case StartRank(job, rank):
                role = next(r for r in job.roles if r.name == rank.rank.role)
                work = self._drivers[role.engine.driver].start(instruction)
                self._start(work, job.job_uid, rank.rank)
            case StopRank():
                # A rank belongs to one driver; the others do not know it.
                for driver in self._drivers.values():
                    self._start(driver.stop(instruction), instruction.job_uid, instruction.key)
            case Drive(job, rank):
                self._start(self._drive(instruction), job.job_uid, rank.rank)
            case WriteAcks(job_uid, acks):
                self._unwritten[job_uid] = acks
                self._ack_wanted.set()

    def _start(self, work: Any, job_uid: str, key: RankKey) -> None:
        """Work on a rank beside all else; every line that it logs says on which."""
        with structlog.contextvars.bound_contextvars(**self._about(job_uid), rank=_name(key)):
            task = asyncio.create_task(work)
            task.add_done_callback(self._done)
        self._tasks.add(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a rank's work failed", exc_info=task.exception())

    def _about(self, job_uid: str) -> dict[str, Any]:
        """The job with the epoch and the incident of its newest assignment here."""
        jobs = self._machine.assignment.jobs if self._machine.assignment is not None else ()
        for job in jobs:
            if job.job_uid == job_uid:
                found = {"job_uid": job_uid, "epoch": job.epoch, "incident_id": job.incident_id}
                return {name: value for name, value in found.items() if value}
        return {"job_uid": job_uid}

    def _log_event(self, event: Event) -> None:
        match event:
            case RankExited() | StartFailed():
                what = "rank ended" if isinstance(event, RankExited) else "rank did not start"
                log.info(
                    what, rank=_name(event.key), why=event.message, **self._about(event.job_uid)
                )
            case DriveFailed():
                about = self._about(event.job_uid) | {"epoch": event.epoch}
                log.warning("command failed", rank=_name(event.key), why=event.message, **about)
            case RankSilent():
                about = self._about(event.job_uid)
                log.warning("rank is silent", rank=_name(event.key), why=event.message, **about)
            case PeerSuspected(suspicion=lost):
                log.warning(
                    "rank lost a peer",
                    rank=_name(event.key),
                    peer=lost.incarnation or f"{lost.role}/{lost.instance}/{lost.rank}",
                    reason=lost.reason,
                    **self._about(event.job_uid),
                )
            case _:
                pass

    def _log_commands(self, instructions: Sequence[Instruction]) -> None:
        """One line for all ranks of a job that are told the same."""
        told: dict[tuple[str, str], list[str]] = {}
        for instruction in instructions:
            match instruction:
                case StartRank(job, rank):
                    told.setdefault((job.job_uid, "start"), []).append(_name(rank.rank))
                case StopRank(job_uid, key):
                    told.setdefault((job_uid, "stop"), []).append(_name(key))
                case Drive(job, rank):
                    told.setdefault((job.job_uid, job.stage.lower()), []).append(_name(rank.rank))
                case WriteAcks():
                    pass
        for (job_uid, command), ranks in told.items():
            log.info("ranks commanded", command=command, ranks=ranks, **self._about(job_uid))

    async def _drive(self, instruction: Drive) -> None:
        job, rank = instruction.job, instruction.rank
        role = next(r for r in job.roles if r.name == rank.rank.role)
        driver = self._drivers[role.engine.driver]
        context = None
        if job.stage is AssignmentStage.PREPARE and driver.needs_context:
            context = await self._context(job.job_uid, job.epoch)
            if context is None:
                await asyncio.sleep(_RETRY_S)
                self._contexts.pop(job.job_uid, None)
                slot = (job.job_uid, rank.rank, rank.start_count)
                why = f"the store's routes are not of epoch {job.epoch}"
                self.tell(DriveFailed(*slot, job.epoch, why, final=False))
                return
        await driver.drive(instruction, context)

    async def _context(self, job_uid: str, epoch: int) -> JobContext | None:
        """Members and maps of an epoch, read once for all ranks of the job here."""
        known = self._contexts.get(job_uid)
        if known is None or known[0] != epoch:
            task = asyncio.create_task(self._read_context(job_uid, epoch))
            self._contexts[job_uid] = known = (epoch, task)
        return await asyncio.shield(known[1])

    async def _read_context(self, job_uid: str, epoch: int) -> JobContext | None:
        """None where the store has other routes: of before, when it was set back, or newer ones."""
        while True:
            try:
                record = await self._store.get(keys.routes(job_uid))
                maps = await self._store.get(keys.expert_maps(job_uid, epoch))
                if record is None:
                    return None
                routes: Routes = wire.decode(record.key, record.value)
                if routes.epoch != epoch:
                    return None
                found = JobExpertMaps(job_uid=job_uid, epoch=epoch)
                if maps is not None:
                    found = wire.decode(maps.key, maps.value)
                return JobContext(routes, found)
            except RaddleError as error:
                log.warning("cannot read the job's members", why=str(error))
                await asyncio.sleep(_RETRY_S)

    # --- the store -----------------------------------------------------------------------------

    async def _follow_assignment(self) -> None:
        key = keys.assignment(self._facts.name)
        while True:
            try:
                async for item in follow(self._store, key):
                    if isinstance(item, Snapshot):
                        # What was read before may be of a history that the store forgot.
                        self._contexts.clear()
                        self._assigned(key, item.records)
                        self._acks_doubtful.set()
                        self._health_doubtful.set()
                        continue
                    for change in item.changes:
                        self._assigned(key, (change.record,) if change.record else ())
            except RaddleError as error:
                log.warning("cannot follow the assignment; ranks go on", why=str(error))
            await asyncio.sleep(_RETRY_S)

    async def _find_acks(self) -> None:
        """Tell anew what an earlier life or an older store says of us: nobody else would."""
        prefix = keys.acks(self._facts.name, "")
        while True:
            await self._acks_doubtful.wait()
            try:
                found = await self._store.list(prefix)
            except RaddleError as error:
                log.warning("cannot read old acknowledgements", why=str(error))
                await asyncio.sleep(_RETRY_S)
                continue
            self._acks_doubtful.clear()
            self.tell(AcksFound(tuple(r.key.removeprefix(prefix) for r in found.records)))

    def _assigned(self, key: str, records: tuple[Record, ...]) -> None:
        assignment = Assignment(node=self._facts.name)
        for record in records:
            if record.key == key:
                assignment = wire.decode(key, record.value)
        listed = {job.job_uid for job in assignment.jobs}
        self._contexts = {uid: known for uid, known in self._contexts.items() if uid in listed}
        self.tell(AssignmentChanged(assignment))

    async def _write_acks(self) -> None:
        """The newest word on each job, coalesced while a write is under way."""
        while True:
            await self._ack_wanted.wait()
            self._ack_wanted.clear()
            batch, self._unwritten = self._unwritten, {}
            writes: list[Put | Delete] = []
            for job_uid, acks in batch.items():
                key = keys.acks(self._facts.name, job_uid)
                writes.append(Delete(key) if acks is None else Put(key, wire.encode(key, acks)))
            try:
                await self._store.commit(Transaction(writes=tuple(writes)))
            except RaddleError as error:
                about = [self._about(job_uid) for job_uid in batch]
                log.warning("acknowledgements wait for the store", why=str(error), jobs=about)
                self._unwritten = batch | self._unwritten
                await asyncio.sleep(_RETRY_S)
                self._ack_wanted.set()

    # --- health --------------------------------------------------------------------------------

    async def _report_health(self) -> None:
        """Registration, then health under a lease, again whenever the lease is lost."""
        while True:
            try:
                self._health_doubtful.clear()
                await self._register()
                lease = await self._store.grant(LEASE_TTL_S)
                await self._report_under(lease)
            except RaddleError as error:
                log.warning("cannot report health; ranks go on", why=str(error))
            await asyncio.sleep(_RETRY_S)

    async def _register(self) -> None:
        key = keys.registration(self._facts.name)
        registration = AgentRegistration(
            node=self._facts.name,
            boot_id=self._facts.boot_id,
            version=self._facts.version,
            drivers=tuple(sorted(self._drivers)),
            parts=self._source.parts(),
            host_memory_bytes=self._facts.host_memory_bytes,
            start_time=self._clock(),
            host=self._facts.host,
        )
        await self._store.commit(Transaction(writes=(Put(key, wire.encode(key, registration)),)))

    async def _report_under(self, lease: Lease) -> None:
        lost = asyncio.create_task(lease.wait_lost())
        faults = self._source.follow()
        change = asyncio.ensure_future(anext(faults))
        doubt = asyncio.create_task(self._health_doubtful.wait())
        held = asyncio.create_task(self._holders_changed.wait())
        try:
            while True:
                waiting = {lost, change, doubt, held}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if lost.done():
                    log.warning("lease lost; reporting anew", node=self._facts.name)
                    return
                if doubt.done():
                    self._health_doubtful.clear()
                    doubt = asyncio.create_task(self._health_doubtful.wait())
                    await self._register()
                    await self._put_health(lease)
                    continue
                if held.done():
                    self._holders_changed.clear()
                    held = asyncio.create_task(self._holders_changed.wait())
                if change.done():
                    self._faults.update(change.result(), now=self._clock())
                    change = asyncio.ensure_future(anext(faults))
                elif not self.is_reporting:
                    # A first report without the faults would call all dies healthy.
                    continue
                await self._put_health(lease)
        finally:
            self.is_reporting = False
            for task in (lost, change, doubt, held):
                task.cancel()
            # A generator that runs can't be closed.
            await asyncio.gather(lost, change, doubt, held, return_exceptions=True)
            await faults.aclose()
            await lease.revoke()

    async def _follow_holders(self, pod_resources: PodResources) -> None:
        async for holders in pod_resources.follow(self._source.parts()):
            self._faults.holders = holders
            self._holders_changed.set()

    async def _put_health(self, lease: Lease) -> None:
        key = keys.health(self._facts.name)
        value = wire.encode(key, self._faults.report())
        await self._store.commit(Transaction(writes=(Put(key, value, lease.lease_id),)))
        self.is_reporting = True


def _name(key: RankKey) -> str:
    return f"{key.role}/{key.instance}/{key.rank}"


def new_boot_id() -> str:
    """Names one life of an agent's fault log."""
    return secrets.token_hex(6)
