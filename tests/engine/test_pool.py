"""The KV pool: names of blocks, who keeps them, a bounded store, and both ends of the wire."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raddle.agent.engine.reference.blocks import block_hashes, cache_key, keeper
from raddle.agent.engine.reference.pool import BlockStore, PoolClient
from raddle.model.kinds import RoleKind
from raddle.model.types import Fence, RankKey
from tests.engine.served import FENCE, cache, ignore
from tests.engine.small import EPOCH, JOB, make_member

KEY = cache_key("model")
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)
NAMES = [f"{number:032x}" for number in range(100)]
CACHES = [make_member(rank, kind=RoleKind.CACHE, node=f"n{rank // 2}") for rank in range(8)]
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


@given(gone=st.integers(0, 7), node=st.sampled_from(["n0", "n1", "elsewhere"]), data=st.data())
def test_a_leaving_member_moves_only_its_own_blocks(
    gone: int, node: str, data: st.DataObject
) -> None:
    """Keepers depend on no order of members, and only the blocks of one that left change theirs."""
    members = data.draw(st.permutations(CACHES))
    left = [member for member in members if member.rank.rank != gone]
    for name in NAMES:
        was, now = keeper(name, CACHES, node), keeper(name, left, node)
        assert was is not None
        assert was == keeper(name, members, node)
        assert now == was or was.rank.rank == gone


def test_a_block_is_kept_on_another_node_or_not_at_all() -> None:
    """A node's loss never takes a rank and its blocks; every member elsewhere gets its share."""
    kept = [keeper(name, CACHES, "n1") for name in NAMES]
    assert {member.node for member in kept if member is not None} == {"n0", "n2", "n3"}
    assert keeper(NAMES[0], CACHES[:2], "n0") is None


def test_a_restarted_member_keeps_its_blocks() -> None:
    """Who keeps a block hangs on the rank, not on the process or its address."""
    again = [replace(member, incarnation="new", engine_address="new:1") for member in CACHES]
    for name in NAMES:
        was, now = keeper(name, CACHES, "n9"), keeper(name, again, "n9")
        assert was is not None
        assert now is not None
        assert was.rank == now.rank


# --- the store -----------------------------------------------------------------------------------


def test_blocks_are_put_once_and_read_back() -> None:
    """A put counts what is new and keeps the first bytes of a name; a get leaves out the rest."""
    told: list[tuple[str, tuple[str, ...]]] = []
    store = BlockStore(100, lambda kind, names: told.append((kind, names)))
    assert store.put([("a", b"1"), ("b", b"2")]) == 2
    assert store.put([("b", b"x"), ("c", b"3")]) == 1
    assert store.put([("a", b"1")]) == 0
    assert store.get(["c", "nothing", "b"]) == [("c", b"3"), ("b", b"2")]
    assert told == [("STORED", ("a", "b")), ("STORED", ("c",))]


_PUTS = st.lists(st.integers(0, 11), min_size=1, max_size=6, unique=True)
_GETS = st.lists(st.integers(0, 11), max_size=4)


@given(steps=st.lists(st.tuples(st.booleans(), st.one_of(_PUTS, _GETS)), max_size=40))
@settings(deadline=None)
@example([(True, [0, 1, 2]), (False, [0]), (True, [7])])
def test_a_full_store_drops_the_longest_unused(steps: list[tuple[bool, list[int]]]) -> None:
    """Within its bytes it holds the blocks used last, and its reports replay to what is there."""
    limit, replayed = 20, set[str]()
    model: OrderedDict[str, bytes] = OrderedDict()

    def changed(kind: str, names: tuple[str, ...]) -> None:
        if kind == "STORED":
            replayed.update(names)
        else:
            replayed.difference_update(names)

    store = BlockStore(limit, changed)
    for put, numbers in steps:
        # Block 11 alone is larger than the store.
        blocks = [(NAMES[n], bytes(25 if n == 11 else n)) for n in dict.fromkeys(numbers)]
        if put:
            store.put(blocks)
            model.update({name: payload for name, payload in blocks if name not in model})
            while sum(map(len, model.values())) > limit:
                model.popitem(last=False)
        else:
            wanted = [(name, model[name]) for name, _ in blocks if name in model]
            assert store.get([name for name, _ in blocks]) == wanted
            for name, _ in wanted:
                model.move_to_end(name)
        assert store.names() == tuple(model)
        assert replayed == set(model)


def test_a_store_of_no_bytes_holds_nothing() -> None:
    """A cache rank without memory takes blocks and forgets them at once."""
    store = BlockStore(0, ignore)
    store.put([("a", b"1")])
    assert store.get(["a"]) == []


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
    blocks = {name: name.encode() for name in NAMES}
    async with cache(0, node="n1") as one, cache(1, node="n2") as two:
        async with client("n0", one.member, two.member) as writer:
            await writer.put(FENCE, blocks)
        held = [set(one.blocks.names()), set(two.blocks.names())]
        assert all(held)
        assert held[0] | held[1] == set(NAMES)
        assert not held[0] & held[1]
        for node in ("n0", "n1", "n2"):
            async with client(node, one.member, two.member) as reader:
                assert await reader.get(FENCE, ["nothing", *NAMES]) == blocks


async def test_blocks_do_not_stay_on_their_writers_node() -> None:
    """A rank on a member's own node gives that member nothing."""
    async with cache(0, node="n1") as one, cache(1, node="n2") as two:
        async with client("n1", one.member, two.member) as writer:
            await writer.put(FENCE, dict.fromkeys(NAMES, b"1"))
        assert (len(one.blocks.names()), len(two.blocks.names())) == (0, 100)


async def test_a_dead_member_costs_blocks_but_no_error() -> None:
    """Puts and gets go on with the members that answer; what the dead one kept is missing."""
    async with cache(0, node="n1") as dead:
        pass
    async with cache(1, node="n2") as live, client("n0", dead.member, live.member) as rank:
        await rank.put(FENCE, dict.fromkeys(NAMES, b"1"))
        assert set(await rank.get(FENCE, NAMES)) == set(live.blocks.names())
        assert 0 < len(live.blocks.names()) < 100


@pytest.mark.parametrize(
    "stale", [Fence(job_uid=JOB, epoch=EPOCH - 1), Fence(job_uid="j-2", epoch=EPOCH + 1)], ids=str
)
async def test_a_writer_of_the_past_changes_nothing(stale: Fence) -> None:
    """An older epoch or another job neither writes, nor reads, nor moves the member's epoch."""
    async with cache() as pool, client("n0", pool.member) as rank:
        await rank.put(FENCE, {"a": b"1"})
        await rank.put(stale, {"b": b"2"})
        assert await rank.get(stale, ["a"]) == {}
        assert pool.blocks.names() == ("a",)
        assert pool.standing.epoch == EPOCH


@pytest.mark.parametrize("by", ["put", "get"])
async def test_the_first_call_of_a_newer_epoch_shuts_the_older_one_out(by: str) -> None:
    """Blocks outlive an epoch, its writers do not."""
    newer = replace(FENCE, epoch=EPOCH + 1)
    async with cache() as pool, client("n0", pool.member) as rank:
        await rank.put(FENCE, {"a": b"1"})
        if by == "put":
            await rank.put(newer, {"b": b"2"})
        assert (await rank.get(newer, ["a"])) == {"a": b"1"}
        await rank.put(FENCE, {"c": b"3"})
        assert await rank.get(newer, ["c"]) == {}
        assert pool.standing.epoch == EPOCH + 1
