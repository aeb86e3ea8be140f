"""One term of leadership: events into the machine, its instructions out, one commit at a time.

While a commit is under way events pile up; the next decision takes them all at once, so many
decisions share a transaction when there is much to do. Nothing leaves before its commit
succeeded. When a commit fails, the machine is thrown away: either we are deposed, or it is built
anew from the store.

A request that meets a mistake of the program must not end the term. All that a decision writes is
encoded before the first of it leaves, so after an unforeseen error the store is as it was; the
machine, which may hold half a decision, is thrown away. The same events are taken again with one
request at a time, and the one that fails alone is answered with INTERNAL.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import structlog

from raddle.core.context import Context
from raddle.core.events import (
    Committed,
    Event,
    NodeProbed,
    RecordChanged,
    RequestReceived,
    StoreLeaderChanged,
    Woken,
)
from raddle.core.instructions import Commit, Instruction, ProbeNode, ProbeRank, Reply, WakeAt
from raddle.core.machine import RECORD_SET_ASIDE, Machine
from raddle.core.nodes import NodeTracker
from raddle.core.requests import Request
from raddle.model import keys
from raddle.model.errors import PermanentError, RaddleError, Reason, TemporaryError
from raddle.model.types import Why
from raddle.scheduler.metrics import Metrics
from raddle.scheduler.mirror import Mirror
from raddle.scheduler.probes import RankProber
from raddle.scheduler.quiet import QuietNodes
from raddle.scheduler.subjects import subjects
from raddle.store.election import Term
from raddle.store.protocol import Compare, Delete, Put, Store, Transaction
from raddle.wire import records as wire

EVENTS_MAX = 100_000
COMMIT_TIMEOUT_S = 5.0
#: One instruction with the encoded writes of a commit.
Step = tuple[Instruction, tuple[Put | Delete, ...]]
log = structlog.get_logger()


def steady_clock() -> Callable[[], float]:
    """Seconds since 1970 as they were when a term began, carried on by the monotonic clock.

    Decisions measure time with it: a step of the host's wall clock must not hold a recovery up.
    """
    began_s, began_monotonic_s = time.time(), time.monotonic()
    return lambda: began_s + time.monotonic() - began_monotonic_s


class Deposed(Exception):  # noqa: N818 - an event of a leader's life, not a mistake
    """Another replica leads, or our lease is past its local deadline."""


class Outdated(Deposed):
    """A newer version wrote what this one cannot read."""


class Leader:
    """The machine and its hands for one term."""

    def __init__(
        self,
        store: Store,
        mirror: Mirror,
        term: Term,
        prober: RankProber,
        metrics: Metrics,
        *,
        clock: Callable[[], float] | None = None,
        make_machine: Callable[..., Machine] = Machine,
        decided: Callable[[], None] = lambda: None,
    ) -> None:
        self._decided = decided
        self._store = store
        self._mirror = mirror
        self._term = term
        self._prober = prober
        self._metrics = metrics
        self._clock = clock or steady_clock()
        self._quiet_nodes = QuietNodes(store, mirror, self._clock, self._leased_nodes)
        self._make_machine = make_machine
        self._store_term = mirror.store_term
        self._queue: asyncio.Queue[Event] = asyncio.Queue(EVENTS_MAX)
        self._replies: dict[str, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._next_request = 0
        self._current: Machine | None = None

    def tell(self, event: Event) -> bool:
        """Queue one event; False if there is no room. What the store tells it will tell again."""
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            log.critical(
                "event queue is full; an event is dropped", event_type=type(event).__name__
            )
            return False
        return True

    def take_report(self, event: Event) -> None:
        """Queue what a stream reports.

        Raises:
            TemporaryError: LIMIT_EXCEEDED: no room; the stream must end, its next one tells all.
        """
        if not self.tell(event):
            raise TemporaryError(
                Reason.LIMIT_EXCEEDED, "more is reported than is taken; report all of it again."
            )

    async def ask(self, request: Request, identity: str, timeout_s: float) -> Any:
        """Put a request before the machine and wait for the answer that was committed.

        Raises:
            RaddleError: the refusal, or DEADLINE_EXCEEDED when nothing was committed in time.
        """
        self._next_request += 1
        name = f"r-{self._next_request}"
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._replies[name] = future
        self.tell(RequestReceived(name, identity, request))
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError as error:
            raise TemporaryError(
                Reason.DEADLINE_EXCEEDED,
                "the store did not take the change before the deadline; repeat with the same"
                " idempotency key.",
            ) from error
        finally:
            self._replies.pop(name, None)

    async def run(self) -> None:
        """Lead until another replica takes over or this one may not go on: its `_end_with`s.

        Raises:
            Deposed: always, in the end.
        """
        parts = {
            asyncio.create_task(self._end_with_lease()),
            asyncio.create_task(self._end_with_history()),
            asyncio.create_task(self._end_with_newer_record()),
            asyncio.create_task(self._work()),
        }
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            for task in (*parts, *self._tasks):
                task.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            if self._timer is not None:
                self._timer.cancel()
            self._fail_all()

    async def _end_with_lease(self) -> None:
        await self._term.lease.wait_lost()
        raise Deposed("the leader's lease is past its local deadline")

    async def _end_with_history(self) -> None:
        """A store restored from an older state forgot decisions that this term stands on."""
        await self._mirror_holds_term()
        await self._mirror.wait_set_back()
        raise Deposed("the store was set back to an older state; a new term begins from there")

    async def _end_with_newer_record(self) -> None:
        """This version would drop fields of what a newer one wrote."""
        key = await self._mirror.wait_too_new()
        raise Outdated(f"{key} is of a newer schema")

    async def _mirror_holds_term(self) -> None:
        """No decision before what we know is at least as new as our taking the lead."""
        await self._mirror.wait_record(keys.LEADER, self._term.revision)

    def _record_changed(self, key: str, value: Any, _revision: int) -> None:
        if self._mirror.store_term > self._store_term:
            # Told before the change: the lease that ended may have ended for this alone.
            if self._store_term:
                self.tell(StoreLeaderChanged())
            self._store_term = self._mirror.store_term
        if key.startswith(keys.AGENTS):
            self.tell(RecordChanged(key, value))

    async def _work(self) -> None:
        await self._mirror_holds_term()
        stop = self._mirror.listen(self._record_changed)
        try:
            await self._decide()
        finally:
            stop()

    async def _decide(self) -> None:
        machine = self._machine()
        batches: deque[list[Event]] = deque()
        while True:
            events = batches.popleft() if batches else await self._next_events()
            self._require_lease()
            try:
                steps = self._steps(machine, events)
            except Exception as error:  # noqa: BLE001 - a request must not end the term
                batches.extendleft(reversed(self._without_culprit(events, error)))
                machine = self._machine()
                continue
            try:
                for instruction, writes in steps:
                    await self._carry_out(instruction, writes)
                self._decided()
            except TemporaryError as error:
                log.warning("a commit is not settled; the machine is built anew", why=str(error))
                machine = await self._recover()

    async def _next_events(self) -> list[Event]:
        """All events that are pending, at least one."""
        events = [await self._queue.get()]
        while not self._queue.empty():
            events.append(self._queue.get_nowait())
        return events

    def _steps(self, machine: Machine, events: list[Event]) -> list[Step]:
        """Decide, and encode all that is to be written: what is left to fail is the store."""
        started = time.thread_time()
        instructions = machine.handle(events, now=self._clock())
        self._metrics.decided(len(events), time.thread_time() - started)
        return [(i, _encoded(i) if isinstance(i, Commit) else ()) for i in instructions]

    def _without_culprit(self, events: list[Event], error: Exception) -> list[list[Event]]:
        """The events to take again after an unforeseen error: one request at a time, or none.

        Raises the error when no request can have caused it.
        """
        suspects = [event for event in events if isinstance(event, RequestReceived)]
        if not suspects:
            raise error
        if len(suspects) > 1:
            return _one_request_each(events)
        self._refuse_poison(suspects[0], error)
        return [rest] if (rest := [event for event in events if event is not suspects[0]]) else []

    def _refuse_poison(self, event: RequestReceived, error: Exception) -> None:
        what, name = type(event.request).__name__, f"{self._term.revision}-{event.request_id}"
        self._metrics.unforeseen.inc()
        log.error(
            "a request failed in an unforeseen way; the machine is built anew",
            request=name,
            request_type=what,
            caller=event.identity,
            exc_info=error,
        )
        message = (
            f"{what} failed in an unforeseen way and changed nothing: report it with the line of"
            f" the leader's log that names request {name}."
        )
        self._fail(event.request_id, PermanentError(Reason.INTERNAL, message, request=name))

    def nodes(self) -> NodeTracker | None:
        """What this term believes of the nodes; None before its first decision."""
        return self._current.context.nodes if self._current is not None else None

    def context(self) -> Context | None:
        """What this term knows, for reading only; None before its first decision."""
        return self._current.context if self._current is not None else None

    def waits_for(self, job_uid: str) -> Why | None:
        """What a job waits for by the newest decision; None if it does not wait."""
        if self._current is None:
            return None
        return self._current.context.state.waiting.why(job_uid)

    def _machine(self) -> Machine:
        """One of the records as they are, which knows what the one before was told beside them."""
        machine = self._make_machine(
            self._mirror.records(), now=self._clock(), term=self._term.lease.lease_id
        )
        if self._current is not None:
            machine.remember(self._current)
        self._current = machine
        self.tell(Woken())
        return machine

    def _require_lease(self) -> None:
        if not self._term.lease.alive:
            raise Deposed("the leader's lease is past its local deadline")

    async def _recover(self) -> Machine:
        """Read the store anew, if we still lead; the store may be away for long."""
        self._fail_all()
        while True:
            self._require_lease()
            try:
                record = await self._store.get(keys.LEADER)
                if record is None or record.mod_revision != self._term.fence.mod_revision:
                    raise Deposed("another replica leads")
                await self._mirror.refresh()
                return self._machine()
            except TemporaryError as error:
                log.warning("the store is away; decisions wait", why=str(error))
                await asyncio.sleep(0.2)

    async def _carry_out(self, instruction: Instruction, writes: tuple[Put | Delete, ...]) -> None:
        if self._mirror.too_new:
            raise Outdated("a record is of a newer schema; it is not written over")
        match instruction:
            case Commit():
                await self._commit(instruction, writes)
            case Reply():
                self._send(instruction)
            case WakeAt(time_s):
                self._wake_at(time_s)
            case ProbeNode():
                self._start(self._probe_node(instruction))
            case ProbeRank():
                self._start(self._prober.rank(instruction))

    async def _probe_node(self, probe: ProbeNode) -> NodeProbed:
        probed, quiet_nodes = await asyncio.gather(
            self._prober.node(probe), self._quiet_nodes.found()
        )
        return replace(probed, quiet_nodes=quiet_nodes)

    def _leased_nodes(self) -> list[str]:
        nodes = self.nodes()
        return [n.name for n in nodes.nodes.values() if n.has_lease] if nodes is not None else []

    async def _commit(self, commit: Commit, writes: tuple[Put | Delete, ...]) -> None:
        expected = [Compare(w.key, self._mirror.mod_revision(w.key)) for w in writes]
        about = subjects(commit.writes, self._mirror)
        started = time.monotonic()
        transaction = Transaction((self._term.fence, *expected), writes)
        try:
            result = await self._store.commit(transaction, timeout_s=COMMIT_TIMEOUT_S)
        except RaddleError as error:
            for reply in commit.replies:
                self._fail(reply.request_id, error)
            log.warning("not committed", why=str(error), **about)
            raise TemporaryError(Reason.STORE_UNAVAILABLE, str(error)) from error
        if not result.succeeded:
            why = "a record changed under the decision"
            log.warning("not committed", why=why, **about)
            raise TemporaryError(Reason.STALE_REVISION, why)
        self._metrics.committed(len(writes), time.monotonic() - started)
        self._mirror.apply_own(commit.writes, result.revision)
        for reply in commit.replies:
            self._send(reply)
        if about:
            log.info("committed", revision=result.revision, **about)
        _log_set_aside(commit)
        if commit.stimulus:
            self.tell(Committed(commit.stimulus))

    def _send(self, reply: Reply) -> None:
        future = self._replies.get(reply.request_id)
        if future is None or future.done():
            return
        if reply.error is not None:
            future.set_exception(reply.error)
        else:
            future.set_result(reply.value)

    def _fail(self, request_id: str, error: RaddleError) -> None:
        future = self._replies.get(request_id)
        if future is not None and not future.done():
            future.set_exception(error)

    def _fail_all(self) -> None:
        error = TemporaryError(
            Reason.STORE_UNAVAILABLE,
            "the decision was not committed; repeat with the same idempotency key.",
        )
        for name in list(self._replies):
            self._fail(name, error)

    def _wake_at(self, time_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay = max(0.0, time_s - self._clock())
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(delay, lambda: self.tell(Woken()))

    def _start(self, probe: Any) -> None:
        async def run() -> None:
            self.tell(await probe)

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _log_set_aside(commit: Commit) -> None:
    """What is refused is for the log too, not only for the history that the commit wrote."""
    for write in commit.writes:
        event = write.value if write.key.startswith(keys.AUDIT) else None
        if event is not None and event.kind == RECORD_SET_ASIDE:
            log.error("record set aside", node=event.subject, why=event.message)


def _encoded(commit: Commit) -> tuple[Put | Delete, ...]:
    return tuple(
        Delete(w.key) if w.value is None else Put(w.key, wire.encode(w.key, w.value))
        for w in commit.writes
    )


def _one_request_each(events: list[Event]) -> list[list[Event]]:
    """The same events in order, cut after each request."""
    batches: list[list[Event]] = [[]]
    for event in events:
        batches[-1].append(event)
        if isinstance(event, RequestReceived):
            batches.append([])
    return [batch for batch in batches if batch]
