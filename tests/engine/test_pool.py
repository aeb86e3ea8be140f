"""The KV pool: names of blocks, who keeps them, a bounded store, and both ends of the wire."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raddle.agent.engine.reference.block_store import Block, BlockStore
from raddle.agent.engine.reference.blocks import block_hashes, cache_key
from raddle.agent.engine.reference.fences import Standing
from raddle.agent.engine.reference.places import Places
from raddle.agent.engine.reference.pool import PoolClient, PoolPeers
from raddle.agent.engine.reference.pool_service import OwnBlocksService
from raddle.agent.engine.reference.repair import PoolRepair
from raddle.agent.engine.reference.routing import Routing
from raddle.core.kvcache.pool import RAMP_S
from raddle.core.kvcache.slots import pack_slots
from raddle.model.kinds import RoleKind
from raddle.model.routes import Routes
from raddle.model.stats import KvRepair
from raddle.model.types import Fence, Member, RankKey, SequenceRestore, Why
from raddle.v1 import reference_pb2_grpc
from tests.engine.served import FENCE, Cache, cache, ignore, serving
from tests.engine.small import EPOCH, JOB, make_member

KEY = cache_key("model")
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)
NAMES = [f"{number:032x}"[::-1] for number in range(100)]
CACHES = [
    make_member(rank, kind=RoleKind.CACHE, node=f"n{rank // 2}", engine=f"h:{rank}")
    for rank in range(8)
]
A, B, C = NAMES[:3]
ONE = Block.of(b"1")
WRITER = RankKey(role="decode", instance=0, rank=0)


# --- names ---------------------------------------------------------------------------------------


@given(before=TOKENS, one=TOKENS, other=TOKENS, size=st.integers(1, 8))
def test_blocks_are_shared_as_far_as_the_tokens_are(
    before: list[int], one: list[int], other: list[int], size: int
) -> None:
    """Two sequences have the same names for the full blocks of their common prefix, no others."""
    left, right = before + one, before + other
    pairs = list(zip(left, right, strict=False))
    common = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs)) // size
    names, others = block_hashes(KEY, left, size), block_hashes(KEY, right, size)
    assert len(names) == len(left) // size
    assert names[:common] == others[:common]
    assert not set(names[common:]) & set(others[common:])
    assert len(set(names)) == len(names)


def test_names_cover_the_model_and_the_tenant() -> None:
    """Another model, another tenant or another block size shares no block."""
    keys = [cache_key("model"), cache_key("other"), cache_key("model", "tenant")]
    names = [block_hashes(key, range(16), size) for key in keys for size in (4, 8)]
    flat = [name for found in names for name in found]
    assert len(set(flat)) == len(flat) == 3 * (4 + 2)


def test_names_stay_what_they_are() -> None:
    """Blocks outlive the process that named them: a name is the same in every one."""
    assert block_hashes(KEY, [1, 2, 3, 4, 5], 2) == [
        "0c7d55a41b337e2d770d6b52eacd6141",
        "a9a411133b5600fe72fd8602f2d85b36",
    ]


# --- keepers -------------------------------------------------------------------------------------


def places(members: Sequence[Member], replicas: int = 1) -> Places:
    made = Places(lambda: 0.0)
    made.set_members([replace(member, kv_replicas=replicas) for member in members])
    return made


def kept(members: Sequence[Member], node: str, replicas: int = 1) -> list[set[RankKey]]:
    made = places(members, replicas)
    picked = [made.pick(ranking, writer_node=node) for ranking in made.rankings(NAMES)]
    return [{made.members[number].rank for number in numbers} for numbers in picked]


@settings(deadline=None)
@given(gone=st.integers(0, 7), node=st.sampled_from(["n0", "n1", "elsewhere"]), data=st.data())
def test_a_leaving_member_moves_only_its_own_blocks(
    gone: int, node: str, data: st.DataObject
) -> None:
    """Keepers depend on no order of members, and only the blocks of one that left change theirs."""
    members = data.draw(st.permutations(CACHES))
    left = [member for member in members if member.rank.rank != gone]
    assert kept(CACHES, node) == kept(members, node)
    for was, now in zip(kept(CACHES, node), kept(left, node), strict=True):
        assert now == was or {key.rank for key in was} == {gone}


def test_a_block_is_kept_on_another_node_or_not_at_all() -> None:
    """A node's loss never takes a rank and its only copies; every member elsewhere has a share."""
    ranks = {key.rank for found in kept(CACHES, "n1") for key in found}
    assert ranks == {0, 1, 4, 5, 6, 7}
    assert kept(CACHES[:2], "n0") == [set()] * len(NAMES)


def test_copies_are_on_different_nodes() -> None:
    """Two copies, two nodes, whoever wrote them."""
    for found in kept(CACHES, "n1", replicas=2):
        assert len({key.rank // 2 for key in found}) == 2


def test_a_restarted_member_keeps_its_blocks() -> None:
    """Who keeps a block hangs on the rank, not on the process or its address."""
    again = [replace(m, incarnation=f"new-{m.rank.rank}", engine_address="new:1") for m in CACHES]
    assert kept(CACHES, "n9") == kept(again, "n9")


def test_slots_say_who_keeps_a_block() -> None:
    """Members keep what their slots say, a drained one nothing; without slots the ranking does."""
    slots = [pack_slots([n]) for n in range(7)] + [b""]
    members = [replace(m, kv_slots=kv_slots) for m, kv_slots in zip(CACHES, slots, strict=True)]
    made = places(members)
    first = [ranking[0] for ranking in made.rankings(NAMES)]
    assert set(first) == set(range(7))
    again = places([*members[:3], replace(members[3], kv_draining=True), *members[4:]])
    for number, ranking in zip(first, again.rankings(NAMES), strict=True):
        (keeper,) = again.pick(ranking)
        assert keeper != 3
        assert number in {keeper, 3}


def test_a_member_without_room_is_asked_again_a_little_later() -> None:
    """For a second it counts as full; a new set of members knows nothing of that."""
    now = 0.0
    made = Places(lambda: now)
    made.set_members(CACHES[:3])
    made.is_full(1)
    assert made.with_room() == [True, False, True]
    now = 2.0
    assert made.with_room() == [True, True, True]
    made.is_full(0)
    made.set_members(CACHES[:3])
    assert made.with_room() == [True, True, True]


# --- the store -----------------------------------------------------------------------------------


def test_blocks_are_put_once_and_read_back() -> None:
    """A put counts what is new and keeps the first bytes of a name; a get leaves out the rest."""
    told: list[tuple[str, tuple[str, ...]]] = []
    one, two, three = (Block.of(payload) for payload in (b"1", b"2", b"3"))
    store = BlockStore(100, lambda kind, names: told.append((kind, names)))
    assert store.put([("a", one), ("b", two)]) == (2, ())
    assert store.put([("b", three), ("c", three)]) == (1, ())
    assert store.put([("a", one)]) == (0, ())
    assert store.get(["c", "nothing", "b"]) == [("c", three), ("b", two)]
    assert told == [("STORED", ("a", "b")), ("STORED", ("c",))]


_PUTS = st.lists(st.integers(0, 11), min_size=1, max_size=6, unique=True)
_GETS = st.lists(st.integers(0, 11), max_size=4)


@given(steps=st.lists(st.tuples(st.booleans(), st.one_of(_PUTS, _GETS)), max_size=40))
@settings(deadline=None)
@example([(True, [0, 1, 2]), (False, [0]), (True, [7])])
def test_a_full_store_drops_the_longest_unused(steps: list[tuple[bool, list[int]]]) -> None:
    """Within its bytes it holds the blocks used last, and its reports replay to what is there."""
    limit, replayed = 20, set[str]()
    model: OrderedDict[str, Block] = OrderedDict()

    def changed(kind: str, names: tuple[str, ...]) -> None:
        if kind == "STORED":
            replayed.update(names)
        else:
            replayed.difference_update(names)

    store = BlockStore(limit, changed)
    for put, numbers in steps:
        # Block 11 alone is larger than the store.
        blocks = [(NAMES[n], Block.of(bytes(25 if n == 11 else n))) for n in dict.fromkeys(numbers)]
        if put:
            store.put(blocks)
            for name, block in blocks:
                if name in model or len(block.payload) > limit:
                    continue
                while sum(len(b.payload) for b in (*model.values(), block)) > limit:
                    model.popitem(last=False)
                model[name] = block
        else:
            wanted = [(name, model[name]) for name, _ in blocks if name in model]
            assert store.get([name for name, _ in blocks]) == wanted
            for name, _ in wanted:
                model.move_to_end(name)
        assert store.names() == tuple(model)
        assert replayed == set(model)


def test_a_store_of_no_bytes_holds_nothing() -> None:
    """A cache rank without memory refuses every block."""
    store = BlockStore(0, ignore)
    assert store.put([("a", Block.of(b"1"))]) == (0, ("a",))
    assert store.get(["a"]) == []


def test_room_is_made_of_what_is_colder_only() -> None:
    """A put says how long what goes must have been idle; without that nothing goes."""
    now = 0.0
    store = BlockStore(2, ignore, lambda: now)
    blocks = [(name, Block.of(b"1")) for name in (A, B, C)]
    store.put(blocks[:1])
    now = 10.0
    store.put(blocks[1:2])
    assert store.put(blocks[2:], evict_idle_s=None) == (0, (C,))
    assert store.put(blocks[2:], evict_idle_s=11.0) == (0, (C,))
    assert store.put(blocks[2:], evict_idle_s=5.0) == (1, ())
    assert store.names() == (B, C)
    assert store.idle_s(B) == 0.0


def test_a_store_may_use_a_share_of_its_room() -> None:
    """What an empty member takes grows with its share; what it has stays."""
    store, share = BlockStore(10, ignore), 0.2
    store.room_share = lambda: share
    blocks = [(name, Block.of(b"1")) for name in NAMES[:5]]
    assert store.put(blocks, evict_idle_s=None) == (2, tuple(NAMES[2:5]))
    share = 0.4
    assert store.put(blocks, evict_idle_s=None) == (2, tuple(NAMES[4:5]))


# --- over the wire -------------------------------------------------------------------------------


@asynccontextmanager
async def client(node: str, *members: object) -> AsyncIterator[PoolClient]:
    made = PoolClient(WRITER, node)
    made.set_members([m for m in members if isinstance(m, type(CACHES[0]))])
    try:
        yield made
    finally:
        await made.close()


async def test_blocks_spread_over_members_come_back_to_any_node() -> None:
    """A hundred blocks go to both members, and a rank of any node reads all of them."""
    blocks = {name: Block.of(name.encode()) for name in NAMES}
    async with cache(0, node="n1") as one, cache(1, node="n2") as two:
        async with client("n0", one.member, two.member) as writer:
            await writer.put(FENCE, blocks)
        held = [set(one.blocks.names()), set(two.blocks.names())]
        assert all(held)
        assert held[0] | held[1] == set(NAMES)
        assert not held[0] & held[1]
        for node in ("n0", "n1", "n2"):
            async with client(node, one.member, two.member) as reader:
                assert await reader.get(FENCE, ["f" * 32, *NAMES]) == blocks


async def test_blocks_do_not_stay_on_their_writers_node() -> None:
    """A rank on a member's own node gives that member nothing."""
    async with cache(0, node="n1") as one, cache(1, node="n2") as two:
        async with client("n1", one.member, two.member) as writer:
            await writer.put(FENCE, dict.fromkeys(NAMES, ONE))
        assert (len(one.blocks.names()), len(two.blocks.names())) == (0, 100)


async def test_a_dead_member_costs_blocks_but_no_error() -> None:
    """Puts and gets go on with the members that answer; what the dead one kept is missing."""
    async with cache(0, node="n1") as dead:
        pass
    async with cache(1, node="n2") as live, client("n0", dead.member, live.member) as rank:
        await rank.put(FENCE, dict.fromkeys(NAMES, ONE))
        assert set(await rank.get(FENCE, NAMES)) == set(live.blocks.names())
        assert 0 < len(live.blocks.names()) < 100


@pytest.mark.parametrize(
    "stale", [Fence(job_uid=JOB, epoch=EPOCH - 1), Fence(job_uid="j-2", epoch=EPOCH + 1)], ids=str
)
async def test_a_writer_of_the_past_changes_nothing(stale: Fence) -> None:
    """An older epoch or another job neither writes, nor reads, nor moves the member's epoch."""
    async with cache() as pool, client("n0", pool.member) as rank:
        await rank.put(FENCE, {A: Block.of(b"1")})
        await rank.put(stale, {B: Block.of(b"2")})
        assert await rank.get(stale, [A]) == {}
        assert pool.blocks.names() == (A,)
        assert pool.standing.epoch == EPOCH


@pytest.mark.parametrize("by", ["put", "get"])
async def test_the_first_call_of_a_newer_epoch_shuts_the_older_one_out(by: str) -> None:
    """Blocks outlive an epoch, its writers do not."""
    newer = replace(FENCE, epoch=EPOCH + 1)
    async with cache() as pool, client("n0", pool.member) as rank:
        await rank.put(FENCE, {A: Block.of(b"1")})
        if by == "put":
            await rank.put(newer, {B: Block.of(b"2")})
        assert (await rank.get(newer, [A])) == {A: Block.of(b"1")}
        await rank.put(FENCE, {C: Block.of(b"3")})
        assert await rank.get(newer, [C]) == {}
        assert pool.standing.epoch == EPOCH + 1


# --- checksums and repair ------------------------------------------------------------------------


def two_copies(*caches: Cache) -> list[Member]:
    return [replace(one.member, kv_replicas=2) for one in caches]


def spoil(one: Cache, name: str) -> None:
    """A bit of the block flips in the member's memory."""
    kept = one.blocks._blocks[name]
    kept.block = kept.block._replace(payload=bytes([kept.block.payload[0] ^ 1]))


async def test_a_broken_block_is_not_stored_and_not_served() -> None:
    """Bytes that are not those of their checksum are refused; a reader takes the other copy."""
    async with cache(0, node="n1") as one, cache(1, node="n2") as two:
        peers = PoolPeers(WRITER, "n0")
        blocks = [(A, Block(b"x", 0)), (B, Block.of(b"2"))]
        assert await peers.put(FENCE, one.member, blocks) is None
        assert one.blocks.names() == (B,)
        await peers.close()
        async with client("n0", *two_copies(one, two)) as rank:
            await rank.put(FENCE, {A: Block.of(b"1")})
            spoil(one, A)
            assert await rank.get(FENCE, [A]) == {A: Block.of(b"1")}
            spoil(two, A)
            assert await rank.get(FENCE, [A]) == {}


async def repaired(one: Cache, members: Sequence[Member], bytes_per_s: float = 1e9) -> int:
    """One pass of a member's repair."""
    peers = PoolPeers(one.member.rank, one.member.node)
    repair = PoolRepair(one.member.rank, one.blocks, peers, lambda: FENCE, bytes_per_s=bytes_per_s)
    repair.set_members(members, EPOCH)
    try:
        return await repair.make_one_pass()
    finally:
        await peers.close()


async def test_lost_copies_are_made_again_once() -> None:
    """After a member's loss the others give its blocks to those that should have them now."""
    async with (
        cache(0, node="n0") as zero,
        cache(1, node="n1") as one,
        cache(2, node="n2") as two,
        cache(3, node="n3") as three,
    ):
        async with client("n9", *two_copies(zero, one, two, three)) as rank:
            await rank.put(FENCE, {name: Block.of(name.encode()) for name in NAMES})
        lost = set(zero.blocks.names())
        left = two_copies(one, two, three)
        made = [await repaired(each, left) for each in (one, two, three)]
        held = [name for each in (one, two, three) for name in each.blocks.names()]
        assert sum(made) == len(lost) > 0
        assert all(held.count(name) == 2 for name in NAMES)
        assert [await repaired(each, left) for each in (one, two, three)] == [0, 0, 0]
        for each in (one, two, three):
            for name in each.blocks.names():
                made_of = Block.of(name.encode())
                assert each.blocks.peek(name) == made_of._replace(writer_node="n9")


async def test_the_most_recently_used_blocks_are_repaired_first() -> None:
    """A new empty member gets the blocks of the last use first."""
    async with cache(0, node="n0") as zero, cache(1, node="n1") as one:
        zero.blocks.put([(name, Block.of(name.encode())) for name in NAMES])
        zero.blocks.get([B])
        assert await repaired(zero, two_copies(zero, one)) == len(NAMES)
        assert one.blocks.names()[:2] == (B, NAMES[-1])


async def test_one_copy_needs_no_repair() -> None:
    """With single copies, or a single member, nothing is copied."""
    async with cache(0, node="n0") as zero, cache(1, node="n1") as one:
        zero.blocks.put([(A, Block.of(b"1"))])
        assert await repaired(zero, [zero.member, one.member]) == 0
        assert await repaired(zero, two_copies(zero)) == 0
        assert one.blocks.names() == ()


async def test_a_member_that_does_not_answer_is_asked_again() -> None:
    """Its copies stay due: once it is there they are made."""
    async with cache(1, node="n1") as gone:
        pass
    async with cache(0, node="n0") as zero, cache(1, node="n1") as back:
        zero.blocks.put([(A, Block.of(b"1"))])
        peers = PoolPeers(zero.member.rank, "n0")
        repair = PoolRepair(zero.member.rank, zero.blocks, peers, lambda: FENCE)
        repair.set_members(two_copies(zero, gone), EPOCH)
        assert await repair.make_one_pass() == 0
        repair.set_members(two_copies(zero, back), EPOCH)
        assert await repair.make_one_pass() == 1
        assert repair.progress.copies_made == 1
        await peers.close()


# --- members without room, members that leave ----------------------------------------------------


async def test_a_full_member_passes_blocks_on() -> None:
    """What a keeper has no room for goes to the next of the ranking; nothing is dropped for it."""
    async with (
        cache(0, node="n1", bytes_max=20) as small,
        cache(1, node="n2") as one,
        cache(2, node="n3") as two,
    ):
        members = [small.member, one.member, two.member]
        async with client("n0", *members) as rank:
            await rank.put(FENCE, dict.fromkeys(NAMES, ONE))
            held = [name for each in (small, one, two) for name in each.blocks.names()]
            assert sorted(held) == sorted(NAMES)
            assert len(small.blocks.names()) == 20
            first = small.blocks.names()[0]
            assert await rank.get(FENCE, NAMES) == dict.fromkeys(NAMES, ONE)
            assert small.blocks.peek(first) is not None


async def test_when_nobody_has_room_the_keepers_make_some() -> None:
    """In a full pool a new block displaces what was not used for longest, at its keeper."""
    async with (
        cache(0, node="n1", bytes_max=30) as one,
        cache(1, node="n2", bytes_max=30) as two,
        client("n0", one.member, two.member) as rank,
    ):
        await rank.put(FENCE, dict.fromkeys(NAMES, ONE))
        assert len(one.blocks.names()) == len(two.blocks.names()) == 30
        await rank.put(FENCE, {"e" * 32: ONE})
        assert await rank.get(FENCE, ["e" * 32]) == {"e" * 32: ONE}
        assert len(one.blocks.names()) == len(two.blocks.names()) == 30


async def test_a_repair_displaces_nothing_that_is_hotter() -> None:
    """A copy that no member has room for is made only where colder blocks are."""
    async with cache(0, node="n0") as zero, cache(1, node="n1", bytes_max=1) as one:
        zero.blocks.put([(A, ONE)])
        zero.blocks._blocks[A].used_s -= 100.0
        one.blocks.put([(B, ONE)])
        peers = PoolPeers(zero.member.rank, "n0")
        repair = PoolRepair(zero.member.rank, zero.blocks, peers, lambda: FENCE)
        repair.set_members(two_copies(zero, one), EPOCH)
        assert await repair.make_one_pass() == 0
        assert one.blocks.names() == (B,)
        assert repair.progress.copies_without_room == 1
        await peers.close()


def leaving(one: Cache, *others: Cache, replicas: int = 1) -> list[Member]:
    members = [replace(each.member, kv_replicas=replicas) for each in (one, *others)]
    return [replace(members[0], kv_draining=True), *members[1:]]


@pytest.mark.parametrize("replicas", [1, 2])
async def test_a_drained_member_hands_all_its_blocks_on(replicas: int) -> None:
    """Every block has its copies on the others when it says so; it gets no new ones."""
    async with (
        cache(0, node="n0") as zero,
        cache(1, node="n1") as one,
        cache(2, node="n2") as two,
    ):
        members = [replace(each.member, kv_replicas=replicas) for each in (zero, one, two)]
        async with client("n9", *members) as rank:
            await rank.put(FENCE, {name: Block.of(name.encode()) for name in NAMES})
        told: list[tuple[int, KvRepair]] = []
        peers = PoolPeers(zero.member.rank, "n0")
        repair = PoolRepair(
            zero.member.rank, zero.blocks, peers, lambda: FENCE, lambda *word: told.append(word)
        )
        had = set(zero.blocks.names())
        repair.set_members(leaving(zero, one, two, replicas=replicas), EPOCH)
        assert not repair.progress.is_handed_on
        for each in (one, two):
            await repaired(each, leaving(zero, one, two, replicas=replicas))
        made = await repair.make_one_pass()
        held = [name for each in (one, two) for name in each.blocks.names()]
        assert all(held.count(name) == replicas for name in NAMES)
        assert made == (len(had) if replicas == 1 else 0)
        assert (told[-1][0], told[-1][1].is_handed_on) == (EPOCH, True)
        async with client("n9", *leaving(zero, one, two, replicas=replicas)) as rank:
            await rank.put(FENCE, {"e" * 32: ONE})
        assert set(zero.blocks.names()) == had
        await peers.close()


@pytest.mark.parametrize("others", [2, 1])
async def test_a_drain_leaves_the_only_copy_off_its_writers_node(others: int) -> None:
    """Single copies go where their writer is not, and there only when there is no other place."""
    async with (
        cache(0, node="n0") as zero,
        cache(1, node="n1") as one,
        cache(2, node="n2") as two,
    ):
        async with client("n1", zero.member, two.member) as rank:
            await rank.put(FENCE, {name: Block.of(name.encode()) for name in NAMES})
        had = set(zero.blocks.names())
        assert await repaired(zero, leaving(zero, *(one, two)[:others])) == len(had)
        assert set(one.blocks.names()) == (had if others == 1 else set())


async def test_a_drained_member_waits_for_whom_it_cannot_reach() -> None:
    """While another member does not answer, nothing says that it may end."""
    async with cache(1, node="n1") as gone:
        pass
    async with cache(0, node="n0") as zero:
        zero.blocks.put([(A, ONE)])
        peers = PoolPeers(zero.member.rank, "n0")
        repair = PoolRepair(zero.member.rank, zero.blocks, peers, lambda: FENCE)
        repair.set_members(leaving(zero, gone), EPOCH)
        assert await repair.make_one_pass() == 0
        assert not repair.progress.is_handed_on
        await peers.close()


async def test_a_later_members_room_grows() -> None:
    """One that came to a pool with blocks may use a tenth at first; one of the beginning, all."""
    now = 0.0
    async with cache(0, node="n0") as zero, cache(1, node="n1", bytes_max=100) as one:
        members = [zero.member, replace(one.member, start_epoch=7)]
        peers = PoolPeers(one.member.rank, "n1")
        repair = PoolRepair(one.member.rank, one.blocks, peers, lambda: FENCE, clock=lambda: now)
        repair.set_members(members, EPOCH)
        assert one.blocks.room_share() == pytest.approx(0.1)
        now = RAMP_S
        assert one.blocks.room_share() == 1.0
        first = PoolRepair(zero.member.rank, zero.blocks, peers, lambda: FENCE, clock=lambda: 0.0)
        first.set_members(members, EPOCH)
        assert zero.blocks.room_share() == 1.0
        await peers.close()


# --- blocks in ranks' own memory -----------------------------------------------------------------


async def test_peers_read_a_ranks_own_blocks_and_write_none() -> None:
    """Also at an epoch that it does not know yet, which it does not take over; not at an older."""
    standing, blocks = Standing(JOB, EPOCH), BlockStore(100, ignore)
    blocks.put([(A, ONE)])

    def add(server: grpc.aio.Server) -> None:
        service: Any = OwnBlocksService(standing, blocks)
        reference_pb2_grpc.add_PoolMemberServicer_to_server(service, server)

    async with serving(add) as address, client("n0") as rank:
        peer = make_member(1, engine=address)
        newer, older = (replace(FENCE, epoch=EPOCH + step) for step in (1, -1))
        assert await rank.get_from(FENCE, [peer], [A, B]) == {A: ONE}
        assert await rank.get_from(newer, [peer], [A]) == {A: ONE}
        assert standing.epoch == EPOCH
        assert await rank.get_from(older, [peer], [A]) == {}
        assert await rank.get_from(replace(FENCE, job_uid="j-2"), [peer], [A]) == {}
        peers = PoolPeers(WRITER, "n0")
        assert await peers.put(FENCE, peer, [(B, ONE)]) is None
        assert blocks.names() == (A,)
        await peers.close()


async def test_peers_are_asked_for_what_is_missing_until_all_is_there() -> None:
    """The first one gives what it has, broken blocks aside, the second the rest."""
    async with cache(0) as one, cache(1) as two, client("n0") as rank:
        for each, names in ((one, (A, B)), (two, (A, B, C))):
            each.blocks.put([(name, Block.of(name.encode())) for name in names])
        spoil(one, B)
        found = await rank.get_from(FENCE, [one.member, two.member], [A, B, C])
        assert found == {name: Block.of(name.encode()) for name in (A, B, C)}


def test_a_sequence_that_the_plan_gave_up_is_told_why() -> None:
    """The front door ends it with the plan's sentence; others are not touched."""
    routing = Routing("frontdoor", ["h:1"], "default", "job", "digest")
    gone = SequenceRestore(sequence_id="s", why=Why(reason="GIVE_UP", message="too late"))
    routes = Routes(restores=(gone, SequenceRestore(sequence_id="t", why=Why(reason="RESTORE"))))
    assert routing.given_up(routes, "s") == "too late"
    assert (routing.given_up(routes, "t"), routing.given_up(routes, "u")) == ("", "")
