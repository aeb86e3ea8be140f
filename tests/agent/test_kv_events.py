"""KV events of other engines: exact bytes over ZeroMQ, gaps, restarts, dead publishers, garbage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from raddle.agent.engine.kv_events.source import KvSource, read_sources
from raddle.agent.engine.kv_events.subscriber import KvSubscriber
from raddle.agent.engine.kv_events.wire import decode_batch
from raddle.core.kvcache.index import BlockIndex, block_event, block_keys
from raddle.model.errors import PermanentError
from raddle.model.kv import BlockSpace, KvEventKind, KvTier
from raddle.model.stats import KvEvent, RankStats
from raddle.model.types import RankKey
from raddle.store.ports import free_port

SPACE = BlockSpace(model_digest="m")
# vLLM 0.33: [1.5, [{"type": "BlockStored", ...}, {"type": "BlockRemoved", ...},
# {"type": "AllBlocksCleared"}], 3], as its encoder writes it.
VLLM_MAPS = bytes.fromhex(
    "93cb3ff80000000000009388a474797065ab426c6f636b53746f726564ac626c6f636b5f686173686573920102"
    "b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f696473920304aa626c6f636b5f73697a6502"
    "a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c083a474797065ac426c6f636b52"
    "656d6f766564ac626c6f636b5f6861736865739101a66d656469756da347505581a474797065b0416c6c426c"
    "6f636b73436c656172656403"
)


def batch(*events: Any, rank: int | None = 0) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), rank])


def stored(*hashes: Any, **more: Any) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": None,
        "token_ids": [1, 2],
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        **more,
    }


def removed(*hashes: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU"}


def envelope(kind: str, *hashes: int, **more: Any) -> dict[str, Any]:
    return {
        "event_id": 42,
        "timestamp": 1739145600000,
        "event_type": kind,
        "model_name": "llama",
        "block_size": 64,
        "additional_salt": None,
        "lora_name": None,
        "tenant_id": "default",
        "backend_id": "worker-0",
        "medium": "cpu",
        "dp_rank": 0,
        "seq_hashes": list(hashes),
        "base_block_idx": 5,
        "parent_hash": 9,
        "token_ids": None,
        **more,
    }


def numbered(*events: dict[str, Any], first: int = 1) -> list[dict[str, Any]]:
    """Events as one stream numbers them."""
    return [event | {"event_id": first + number} for number, event in enumerate(events)]


# --- encodings -----------------------------------------------------------------------------------


def test_the_bytes_of_a_map_encoding_are_read() -> None:
    """vLLM 0.33 and SGLang: maps tagged by type; the rank is the batch's."""
    found = decode_batch(VLLM_MAPS)
    assert found.dp_rank == 3
    kinds = [(e.event.kind, e.event.block_hashes, e.event.tier) for e in found.events]
    assert kinds == [
        (KvEventKind.STORED, ("0" * 15 + "1", "0" * 15 + "2"), KvTier.HBM),
        (KvEventKind.REMOVED, ("0" * 15 + "1",), KvTier.HBM),
        (KvEventKind.CLEARED, (), KvTier.HBM),
    ]


def test_the_array_encoding_says_the_same() -> None:
    """Older vLLM: fields by their places; fields that a release appends are left out."""
    arrays = batch(
        ["BlockStored", [1, 2], None, [3, 4], 2, None, "GPU", None, None, 1, "new", "newer"],
        ["BlockRemoved", [b"\x01" * 32], "CPU"],
        ["BlockStored", [-1], None, [3, 4], 2, None],
        ["AllBlocksCleared"],
    )
    events = [e.event for e in decode_batch(arrays).events]
    assert events[0].block_hashes == ("0" * 15 + "1", "0" * 15 + "2")
    assert (events[0].kv_group, events[0].tier) == (1, KvTier.HBM)
    assert (events[1].block_hashes, events[1].tier) == (("01" * 32,), KvTier.DRAM)
    assert events[2].block_hashes == ("f" * 16,)
    assert events[3].kind is KvEventKind.CLEARED


def test_the_conductors_envelope_is_read() -> None:
    """Model, tenant, salt, adapter, backend and medium come with each event."""
    one, two = decode_batch(
        batch(
            envelope("stored", 7, additional_salt="w8a8", lora_name="sql"),
            envelope("cleared", medium="disk"),
            rank=None,
        )
    ).events
    assert (one.model_name, one.backend_id) == ("llama", "worker-0")
    assert one.event == KvEvent(
        kind=KvEventKind.STORED,
        block_hashes=("0" * 15 + "7",),
        tier=KvTier.DRAM,
        lora="sql",
        tenant_salt="|w8a8",
        block_tokens=64,
    )
    assert (two.event.kind, two.event.tier) == (KvEventKind.CLEARED, KvTier.STORAGE)
    assert two.event.tenant_salt == ""


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"ts": 1}),
        msgspec.msgpack.encode([1.5]),
        msgspec.msgpack.encode([1.5, "events"]),
        batch(stored("text")),
        batch(stored(b"")),
        batch(stored(1.5)),
        batch({"type": "BlockStored"}),
        batch({"type": "Unknown"}),
        batch(["Unknown"]),
        batch([]),
        batch(7),
        batch(stored(1, medium=7)),
        batch(stored(1, group_idx=-1)),
        batch(envelope("moved", 1)),
        batch(envelope("stored", 1, tenant_id=["t"])),
        batch(envelope("stored", 1, event_id="1")),
        batch(stored(1), rank=-1),
        b"\x91" * 1_100,
        batch([[[1]]]),
        batch([{}]),
        b"\x93\x01\x91\x81\x91\x01\x01\xc0",
    ],
    ids=lambda payload: payload.hex()[:24],
)
def test_garbage_is_an_error(payload: bytes) -> None:
    """Whatever is no batch of a known encoding is refused whole."""
    with pytest.raises(ValueError, match=r"\w"):
        decode_batch(payload)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2**32) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 9), inner),
    max_leaves=12,
)


@given(st.binary(max_size=200) | st.lists(VALUES).map(lambda events: batch(*events)))
def test_any_bytes_are_a_batch_or_garbage(payload: bytes) -> None:
    """No input raises anything else, or yields hashes that the index cannot take."""
    try:
        found = decode_batch(payload)
    except ValueError:
        return
    for event in found.events:
        block_keys(event.event.block_hashes)


# --- which publishers ----------------------------------------------------------------------------


def test_sources_are_read_from_a_file(tmp_path: Path) -> None:
    """A YAML list; a wrong field is named, a missing file too."""
    file = tmp_path / "kv.yaml"
    file.write_text("- {job_uid: j-1, endpoint: 'tcp://h:5557', role: decode, rank: 3}")
    assert read_sources("") == []
    assert read_sources(str(file)) == [
        KvSource(job_uid="j-1", endpoint="tcp://h:5557", role="decode", rank=3)
    ]
    file.write_text("- {job_uid: j-1, endpoint: 7}")
    with pytest.raises(PermanentError, match="endpoint"):
        read_sources(str(file))
    with pytest.raises(PermanentError, match="nowhere"):
        read_sources(str(tmp_path / "nowhere"))


# --- over ZeroMQ ---------------------------------------------------------------------------------


class Publisher:
    """A PUB socket and a replay ROUTER as vLLM binds them, with a buffer of its last messages."""

    def __init__(self, context: zmq.asyncio.Context, ports: tuple[int, int] | None = None) -> None:
        # Nobody else is given them while a test lets go of them and binds them again.
        ports = ports or (free_port(), free_port())
        self._pub = context.socket(zmq.XPUB)
        self._router = context.socket(zmq.ROUTER)
        for socket in (self._pub, self._router):
            socket.setsockopt(zmq.LINGER, 0)
        self._pub.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._pub.bind(f"tcp://127.0.0.1:{ports[0]}")
        self._router.bind(f"tcp://127.0.0.1:{ports[1]}")
        self.endpoint = self._pub.getsockopt_string(zmq.LAST_ENDPOINT)
        self.replay_endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self.buffer: dict[int, bytes] = {}
        self.replays: list[int] = []
        self._task = asyncio.ensure_future(self._answer())

    @property
    def ports(self) -> tuple[int, int]:
        return int(self.endpoint.rsplit(":", 1)[1]), int(self.replay_endpoint.rsplit(":", 1)[1])

    async def subscribed(self) -> None:
        """Wait until a subscriber is there."""
        assert (await self._pub.recv())[0] == 1

    async def send(self, number: int, payload: bytes, *, keep: bool = True) -> None:
        if keep:
            self.buffer[number] = payload
        await self._pub.send_multipart([b"kv-events", number.to_bytes(8, "big"), payload])

    async def send_frames(self, *frames: bytes) -> None:
        await self._pub.send_multipart(list(frames))

    async def _answer(self) -> None:
        while True:
            client, _, start = await self._router.recv_multipart()
            self.replays.append(int.from_bytes(start, "big"))
            for number in sorted(n for n in self.buffer if n >= self.replays[-1]):
                frames = [client, b"", b"kv-events", number.to_bytes(8, "big")]
                await self._router.send_multipart([*frames, self.buffer[number]])
            end = (-1).to_bytes(8, "big", signed=True)
            await self._router.send_multipart([client, b"", b"", end, b""])

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._pub.close()
        self._router.close()


class Listener:
    """A subscriber whose reports go into an index, as the leader takes them."""

    def __init__(self, context: zmq.asyncio.Context, source: KvSource) -> None:
        self.index = BlockIndex()
        self.subscriber = KvSubscriber(source, self._report, context=context, replay_timeout_s=2)
        self._changed = asyncio.Event()
        #: The next report fails.
        self.broken = False
        self.task = asyncio.ensure_future(self.subscriber.run())

    def _report(self, job_uid: str, stats: RankStats) -> None:
        if self.broken:
            self.broken = False
            self.index = BlockIndex()
            raise RuntimeError("as if there were a fault in what reads events")
        for event in stats.kv_events:
            taken = block_event(event, SPACE)  # one space: adapters are not what is tested
            assert self.index.apply((job_uid, stats.rank), stats.incarnation, taken)
        assert self.index.gaps == 0
        self._changed.set()

    def held(self, *numbers: int, rank: int = 0) -> list[int]:
        member = ("j-1", RankKey(role="decode", instance=0, rank=rank))
        return [
            number
            for number in numbers
            if any(p.member == member for p in self.index.places(SPACE, f"{number:016x}"))
        ]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
def context() -> Any:
    made = zmq.asyncio.Context()
    yield made
    made.destroy(linger=0)


@asynccontextmanager
async def heard(
    context: zmq.asyncio.Context, *, replay: bool = True, **more: Any
) -> AsyncIterator[tuple[Publisher, Listener]]:
    """A publisher with a listener that has connected and asked for a replay."""
    publisher = Publisher(context)
    source = KvSource(
        job_uid="j-1",
        endpoint=publisher.endpoint,
        replay_endpoint=publisher.replay_endpoint if replay else "",
        role="decode",
        **more,
    )
    listener = Listener(context, source)
    try:
        await publisher.subscribed()
        await publisher.send(0, batch(stored(1000, block_size=more.get("block_tokens", 2))))
        await listener.until(lambda: listener.held(1000) == [1000])
        yield publisher, listener
    finally:
        await listener.close()
        await publisher.close()


async def test_stored_and_removed_blocks_arrive_in_the_index(context: Any) -> None:
    """Exact bytes on the wire end as places of blocks."""
    async with heard(context) as (publisher, listener):
        await publisher.send(1, batch(stored(1, 2, 3)))
        await publisher.send(2, batch(removed(2), ["BlockStored", [4], None, [1], 2, None, "GPU"]))
        await listener.until(lambda: listener.held(4) == [4])
        assert listener.held(1, 2, 3, 4) == [1, 3, 4]


async def test_a_gap_is_filled_by_the_replay(context: Any) -> None:
    """Missed messages come from the publisher's buffer, and nothing is applied twice."""
    async with heard(context) as (publisher, listener):
        publisher.buffer |= {1: batch(stored(1)), 2: batch(removed(1000), stored(2))}
        await publisher.send(3, batch(stored(3)))
        await publisher.send(4, batch(stored(4)))
        await listener.until(lambda: listener.held(4) == [4])
        assert listener.held(1000, 1, 2, 3) == [1, 2, 3]
        assert listener.subscriber.counts.gaps_filled == 1
        assert publisher.replays[-1] == 1


async def test_a_gap_beyond_the_buffer_voids_what_was_known(context: Any) -> None:
    """Message 1 is nowhere: it may have removed anything, so only what follows counts."""
    async with heard(context) as (publisher, listener):
        await publisher.send(2, batch(stored(2)))
        await listener.until(lambda: listener.held(2) == [2])
        assert listener.held(1000) == []
        assert listener.subscriber.counts.gaps_lost == 1


async def test_without_a_replay_every_gap_voids(context: Any) -> None:
    """A publisher without a replay endpoint is believed as far as it is heard."""
    async with heard(context, replay=False) as (publisher, listener):
        await publisher.send(5, batch(stored(5)))
        await listener.until(lambda: listener.held(5) == [5])
        assert listener.held(1000) == []


async def test_late_and_repeated_messages_change_nothing(context: Any) -> None:
    """2 before 1: the replay brings 1 in time; both are ignored when they come once more."""
    async with heard(context) as (publisher, listener):
        one, two = batch(stored(1)), batch(removed(1), stored(2))
        publisher.buffer |= {1: one, 2: two}
        await publisher.send(2, two)
        await publisher.send(1, one)
        await publisher.send(2, two)
        await publisher.send(3, batch(stored(3)), keep=False)
        await listener.until(lambda: listener.held(3) == [3])
        assert listener.held(1, 2) == [2]
        assert listener.subscriber.counts.duplicates >= 2


async def test_a_publisher_that_counts_anew_began_anew(context: Any) -> None:
    """Number 0 with other bytes is another process: what the old one held is void."""
    async with heard(context) as (publisher, listener):
        await publisher.send(1, batch(stored(1)))
        await publisher.send(0, batch(stored(7)))
        await publisher.send(1, batch(stored(8)))
        await listener.until(lambda: listener.held(8) == [8])
        assert listener.held(1000, 1, 7) == [7]
        assert listener.subscriber.counts.restarts == 1


async def test_a_dead_publisher_holds_nothing_and_one_that_returns_is_asked(context: Any) -> None:
    """Its connection breaks: no block of it is served. It comes back: its buffer is replayed."""
    async with heard(context) as (publisher, listener):
        ports = publisher.ports
        await publisher.close()
        await listener.until(lambda: listener.held(1000) == [])
        again = Publisher(context, ports)
        again.buffer = {0: batch(stored(5)), 1: batch(stored(6))}
        await listener.until(lambda: listener.held(5, 6) == [5, 6])
        assert listener.held(1000) == []
        await again.close()


async def test_garbage_voids_and_is_survived(context: Any) -> None:
    """What cannot be read may have been a removal; what follows counts again."""
    async with heard(context) as (publisher, listener):
        await publisher.send_frames(b"kv-events", b"12", b"")
        await listener.until(lambda: listener.held(1000) == [])
        await publisher.send(1, batch(stored(1)))
        await listener.until(lambda: listener.held(1) == [1])
        await publisher.send(2, b"\xc1")
        await listener.until(lambda: listener.held(1) == [])
        await publisher.send(3, batch(stored(3)))
        await listener.until(lambda: listener.held(3) == [3])
        assert listener.subscriber.counts.garbage == 2


async def test_a_publisher_is_followed_anew_after_an_error(context: Any) -> None:
    """What goes wrong at one publisher does not end its agent, and the publisher is asked again."""
    async with heard(context) as (publisher, listener):
        listener.broken = True
        await publisher.send(1, batch(stored(1)))
        await listener.until(lambda: not listener.broken and listener.held(1) == [1])
        assert publisher.replays[-1] == 0


async def test_a_publisher_speaks_of_one_model(context: Any) -> None:
    """Where the source names none, the first model and size that are named are its own."""
    async with heard(context) as (publisher, listener):
        await publisher.send(
            1,
            batch(
                *numbered(
                    envelope("stored", 7, block_size=2),
                    envelope("removed", 7, block_size=2, model_name="qwen"),
                    envelope("stored", 8, block_size=16),
                    envelope("stored", 9, block_size=2),
                )
            ),
        )
        await listener.until(lambda: listener.held(9) == [9])
        assert listener.held(7, 8, 9) == [7, 9]
        assert listener.subscriber.counts.left_out == 2


async def test_a_missing_event_voids_what_was_known(context: Any) -> None:
    """Where events are numbered one may be missing though no message is: it may have removed."""
    async with heard(context, block_tokens=64) as (publisher, listener):
        await publisher.send(1, batch(*numbered(envelope("stored", 1), envelope("stored", 2))))
        later = numbered(envelope("stored", 3), first=3) + numbered(envelope("stored", 9), first=9)
        await publisher.send(2, batch(*later))
        await listener.until(lambda: listener.held(9) == [9])
        assert listener.held(1000, 1, 2, 3, 9) == [9]
        await publisher.send(3, batch(*numbered(envelope("stored", 10), first=10)))
        await listener.until(lambda: listener.held(10) == [10])
        assert listener.held(9, 10) == [9, 10]
        assert listener.subscriber.counts.gaps_lost == 1


async def test_a_new_leader_is_told_everything_again(context: Any) -> None:
    """On request all is cleared and replayed from the first number."""
    async with heard(context) as (publisher, listener):
        listener.index = BlockIndex()
        listener.subscriber.report_again()
        await listener.until(lambda: listener.held(1000) == [1000])
        assert publisher.replays[-1] == 0


async def test_a_store_speaks_for_several_owners(context: Any) -> None:
    """Mooncake's events name their backend; other models and unknown backends are left out."""
    names = {"worker-0": 0, "worker-1": 1}
    async with heard(
        context, ranks_by_backend={"": 0, **names}, model_name="llama", block_tokens=64
    ) as (publisher, listener):
        await publisher.send(
            1,
            batch(
                *numbered(
                    envelope("stored", 1),
                    envelope("stored", 2, backend_id="worker-1"),
                    envelope("stored", 3, backend_id="worker-9"),
                    envelope("stored", 4, model_name="qwen"),
                    envelope("stored", 5, block_size=16),
                    envelope("stored", 6),
                    envelope("removed", 1),
                )
            ),
        )
        await listener.until(lambda: listener.held(6) == [6])
        assert listener.subscriber.counts.left_out == 3
        assert listener.held(1, 2, 3, 4, 5, 6) == [6]
        assert listener.held(1, 2, 3, 4, 5, 6, rank=1) == [2]
