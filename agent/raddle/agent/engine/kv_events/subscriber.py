"""One publisher of KV events: its messages in order, gaps filled by its replay.

In go ZeroMQ messages `[topic, sequence, payload]`, out go numbered events of the rank that they
are of. Whenever something may have been missed for good - a gap that the replay does not fill, a
lost connection, a publisher that began anew, garbage - a CLEARED is told first: nothing is known
until it is said again. After each connection the publisher is asked to replay all it still has.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import structlog
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from raddle.agent.engine.kv_events.source import KvSource
from raddle.agent.engine.kv_events.wire import WireBatch, WireEvent, decode_batch
from raddle.model.kv import KvEventKind, KvTier
from raddle.model.stats import KvEvent, RankStats
from raddle.model.types import RankKey

REPLAY_TIMEOUT_S = 5.0
_ANEW_S = 1.0
_FRAMES = 3
_END = b"\xff" * 8
# Messages remembered to tell a late one from one of a publisher that began anew.
_SEEN_MAX = 4_096
_HIGH_WATER = 100_000
log = structlog.get_logger()


@dataclass(slots=True)
class Counts:
    """What happened at one publisher."""

    batches: int = 0
    duplicates: int = 0
    gaps_filled: int = 0
    gaps_lost: int = 0
    restarts: int = 0
    garbage: int = 0
    left_out: int = 0


class Ordering:
    """Which message comes next; pure. `step` says what to do with one that arrived."""

    def __init__(self) -> None:
        self.expected: int | None = None
        self._seen: OrderedDict[int, int] = OrderedDict()
        self._low: int | None = None

    def step(self, number: int, payload: bytes) -> str:
        """NEXT, GAP (something before it is missing), DUPLICATE, LATE or RESTART."""
        if self.expected is None or number == self.expected:
            return "NEXT"
        if number > self.expected:
            return "GAP"
        if self._seen.get(number) == hash(payload):
            return "DUPLICATE"
        # Lower numbers with other bytes: a publisher that counts anew, if they go on like that.
        anew = number == 0 or number - 1 == self._low
        self._low = number
        return "RESTART" if anew else "LATE"

    def took(self, number: int, payload: bytes) -> None:
        self.expected = number + 1
        self._low = None
        self._seen[number] = hash(payload)
        self._seen.move_to_end(number)
        if len(self._seen) > _SEEN_MAX:
            self._seen.popitem(last=False)

    def forget(self) -> None:
        self.expected = self._low = None
        self._seen.clear()


class KvSubscriber:
    """Follows one publisher for ever and reports to `report(job uid, stats)`."""

    def __init__(
        self,
        source: KvSource,
        report: Callable[[str, RankStats], None],
        *,
        context: zmq.asyncio.Context | None = None,
        replay_timeout_s: float = REPLAY_TIMEOUT_S,
    ) -> None:
        self._source = source
        self._report = report
        self._context = context or zmq.asyncio.Context.instance()
        self._replay_timeout_s = replay_timeout_s
        self._order = Ordering()
        # Numbers begin anew with each process of an agent.
        self._incarnation = f"{source.endpoint}#{secrets.token_hex(4)}"
        self._numbers: dict[RankKey, int] = dict.fromkeys(self._ranks(), 0)
        self._again = asyncio.Event()
        #: The newest event of a stream that numbers its events.
        self._event_id: int | None = None
        # Whose blocks are taken: the source's word, else the first that the publisher names.
        self._model = source.model_name
        self._block_tokens = source.block_tokens
        self.counts = Counts()

    def _ranks(self) -> list[RankKey]:
        source = self._source
        ranks = list(source.ranks_by_backend.values()) or [source.rank]
        return [RankKey(role=source.role, instance=source.instance, rank=rank) for rank in ranks]

    def report_again(self) -> None:
        """A new leader knows nothing: clear, and have all replayed that the publisher has."""
        self._again.set()

    # --- the wire ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled, whatever the publisher sends: its agent has more to do."""
        while True:
            try:
                await self._follow()
            except Exception:
                log.exception("a KV publisher is followed anew", endpoint=self._source.endpoint)
            self._void()
            await asyncio.sleep(_ANEW_S)

    async def _follow(self) -> None:
        """ZeroMQ connects again by itself."""
        socket = self._context.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.subscribe(self._source.topic)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        socket.connect(self._source.endpoint)
        parts = [
            asyncio.ensure_future(self._receive(socket)),
            asyncio.ensure_future(self._watch(monitor)),
        ]
        try:
            await asyncio.gather(*parts)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            socket.disable_monitor()
            socket.close()

    async def _watch(self, monitor: Any) -> None:
        """A lost connection voids what was known, a new one begins with a replay."""
        while True:
            event = (await recv_monitor_message(monitor))["event"]
            if event == zmq.EVENT_DISCONNECTED:
                log.info("a KV publisher is gone", endpoint=self._source.endpoint)
                self._void()
            else:
                self._again.set()

    async def _receive(self, socket: Any) -> None:
        while True:
            receiving = asyncio.ensure_future(socket.recv_multipart())
            waiting = asyncio.ensure_future(self._again.wait())
            try:
                await asyncio.wait({receiving, waiting}, return_when=asyncio.FIRST_COMPLETED)
                if self._again.is_set():
                    self._again.clear()
                    await self._begin()
                frames = await receiving
            finally:
                receiving.cancel()
                waiting.cancel()
            await self.take(frames)

    async def _begin(self) -> None:
        """Nothing is known; then whatever the publisher still has."""
        self._void()
        for number, payload in await self._replay(0) or ():
            self._in_order(number, payload)

    # --- order ---------------------------------------------------------------------------------

    async def take(self, frames: list[bytes]) -> None:
        """One message of the publisher, whatever it holds."""
        if len(frames) != _FRAMES or len(frames[1]) != len(_END):
            self._garbage("a message has three frames: topic, 8 bytes of number, payload")
            return
        number, payload = int.from_bytes(frames[1], "big"), frames[2]
        match self._order.step(number, payload):
            case "NEXT":
                self._apply(number, payload)
            case "GAP":
                await self._fill(number, payload)
            case "RESTART":
                self.counts.restarts += 1
                self._void()
                self._apply(number, payload)
            case _:
                self.counts.duplicates += 1

    async def _fill(self, number: int, payload: bytes) -> None:
        """Messages before this one are missing: replay them, or know nothing."""
        assert self._order.expected is not None
        for old, replayed in await self._replay(self._order.expected) or ():
            if not self._in_order(old, replayed):
                break
        if self._order.step(number, payload) == "DUPLICATE":
            self.counts.gaps_filled += 1
            return
        if self._order.expected == number:
            self.counts.gaps_filled += 1
        else:
            self.counts.gaps_lost += 1
            self._void()
        self._apply(number, payload)

    def _in_order(self, number: int, payload: bytes) -> bool:
        """Apply a replayed message if it is the next one; the first may have any number."""
        if self._order.step(number, payload) == "NEXT":
            self._apply(number, payload)
            return True
        return self._order.step(number, payload) == "DUPLICATE"

    async def _replay(self, start: int) -> list[tuple[int, bytes]] | None:
        """(number, payload) of what the publisher still has from `start` on; None if it is mute."""
        if not self._source.replay_endpoint:
            return None
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self._source.replay_endpoint)
        found: list[tuple[int, bytes]] = []
        try:
            async with asyncio.timeout(self._replay_timeout_s):
                await socket.send_multipart([b"", start.to_bytes(8, "big")])
                while True:
                    frames = await socket.recv_multipart()
                    if _END in frames[-2:]:
                        return found
                    if len(frames) < _FRAMES or len(frames[-2]) != len(_END):
                        return None
                    found.append((int.from_bytes(frames[-2], "big"), frames[-1]))
        except TimeoutError:
            log.info("a KV publisher does not replay", endpoint=self._source.replay_endpoint)
            return None
        finally:
            with contextlib.suppress(zmq.ZMQError):
                socket.close()

    # --- events --------------------------------------------------------------------------------

    def _apply(self, number: int, payload: bytes) -> None:
        self._order.took(number, payload)
        try:
            batch = decode_batch(payload)
        except ValueError as error:
            self._garbage(str(error))
            return
        self.counts.batches += 1
        self._tell(batch)

    def _garbage(self, why: str) -> None:
        """It may have been a removal: what was known counts no more."""
        self.counts.garbage += 1
        log.warning("garbage from a KV publisher", endpoint=self._source.endpoint, why=why)
        self._void_within()

    def _void_within(self) -> None:
        """Nothing is known, but the next message is: the stream of messages has no gap."""
        expected = self._order.expected
        self._void()
        self._order.expected = expected

    def _follows(self, event: WireEvent) -> bool:
        """Is it the event after the newest one, as far as events are numbered?"""
        newest, number = self._event_id, event.event_id
        return newest is None or number is None or number == newest + 1

    def _tell(self, batch: WireBatch) -> None:
        by_rank: dict[RankKey, list[KvEvent]] = {}
        for event in batch.events:
            if not self._follows(event):
                # The publisher itself lost some: what came before it counts no more.
                self.counts.gaps_lost += 1
                self._send_all(by_rank)
                self._void_within()
            self._event_id = event.event_id
            key = self._owner(event)
            if key is None:
                self.counts.left_out += 1
            else:
                by_rank.setdefault(key, []).append(self._numbered(key, event.event))
        self._send_all(by_rank)

    def _send_all(self, by_rank: dict[RankKey, list[KvEvent]]) -> None:
        for key, events in by_rank.items():
            self._send(key, events)
        by_rank.clear()

    def _owner(self, wire: WireEvent) -> RankKey | None:
        source = self._source
        self._model = self._model or wire.model_name
        self._block_tokens = self._block_tokens or wire.event.block_tokens
        other_model = wire.model_name not in ("", self._model)
        other_size = wire.event.block_tokens not in (0, self._block_tokens)
        if other_model or other_size:
            return None
        rank: int | None = source.rank
        if source.ranks_by_backend:
            rank = source.ranks_by_backend.get(wire.backend_id)
        if rank is None:
            return None
        return RankKey(role=source.role, instance=source.instance, rank=rank)

    def _numbered(self, key: RankKey, event: KvEvent) -> KvEvent:
        number = self._numbers[key]
        self._numbers[key] = number + 1
        return replace(event, sequence=number)

    def _void(self) -> None:
        """Nothing of this publisher is known from now on."""
        self._order.forget()
        self._event_id = None
        for key in self._ranks():
            cleared = KvEvent(kind=KvEventKind.CLEARED, tier=KvTier.UNSPECIFIED)
            self._send(key, [self._numbered(key, cleared)])

    def _send(self, key: RankKey, events: list[KvEvent]) -> None:
        stats = RankStats(rank=key, incarnation=self._incarnation, kv_events=tuple(events))
        self._report(self._source.job_uid, stats)
