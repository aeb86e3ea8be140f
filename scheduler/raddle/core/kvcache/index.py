"""Which member (rank or pool host, and tier) holds which KV block, as the members themselves said.

In go the members' numbered events, out come the lengths of prefixes and the places of blocks. A
block is named by its hash within a `BlockSpace`: everything else that its bytes depend on. So two
models, data types, adapters or tenants never share a block, even when their hashes are equal.

A block counts as present only where its owner reported it in the newest incarnation of its
process, with no event missing since. A clear, a gap or a new incarnation voids all of a member's
blocks at once; a full report is a clear and everything stored again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field

import numpy as np
from numpy.typing import NDArray

from raddle.core.kvcache.rows import Flags, Keys, Owners
from raddle.core.kvcache.table import OWNERS_MAX, BlockTable
from raddle.model.kv import BlockSpace, KvEventKind, KvTier
from raddle.model.stats import KvEvent
from raddle.model.types import RankKey

#: Distinct blocks; at 20 bytes a row and a load of at least 0.43 less than 0.8 GB.
BLOCKS_MAX = 16_000_000
SPACES_MAX = 65_536
_RETIRED_MAX = 16
# With fewer owners' numbers left than this, those of the dead are collected.
_FREE_LOW = OWNERS_MAX // 4
_KEY_DIGITS = 16
# Odd multipliers of a bijective mix (the constants of splitmix64, public domain).
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT = np.uint64(29)
_ONE = np.uint64(1)

#: A job and one of its ranks.
MemberName = tuple[str, RankKey]


def block_keys(hashes: Sequence[str]) -> Keys:
    """64-bit keys of hexadecimal block hashes: their first 16 digits.

    Raises:
        ValueError: a hash is shorter, or no hexadecimal number.
    """
    digits = "".join([name[:_KEY_DIGITS] for name in hashes])
    if len(digits) != _KEY_DIGITS * len(hashes):
        raise ValueError(f"a block's hash has fewer than {_KEY_DIGITS} digits")
    return np.frombuffer(bytes.fromhex(digits), dtype=">u8").astype(np.uint64)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEvent:
    """One numbered change of a member; `keys` are of one space and one tier."""

    kind: KvEventKind
    sequence: int
    space: BlockSpace
    keys: Keys
    tier: KvTier = KvTier.DRAM


def block_event(event: KvEvent, space: BlockSpace) -> BlockEvent:
    """A member's event as the index takes it.

    Raises:
        ValueError: a hash is no hexadecimal number of at least 16 digits.
    """
    keys = block_keys(event.block_hashes)
    tier = KvTier.DRAM if event.tier is KvTier.UNSPECIFIED else event.tier
    return BlockEvent(kind=event.kind, sequence=event.sequence, space=space, keys=keys, tier=tier)


@dataclass(slots=True)
class _Member:
    incarnation: str
    #: Number of the event that comes next; None before the first.
    expected: int | None = None
    #: Its owner's number in the table, by tier.
    owners: dict[KvTier, int] = field(default_factory=dict[KvTier, int])
    #: Earlier processes of this member; what arrives late from them is ignored.
    retired: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True)
class Place:
    """Where one copy of a block is."""

    member: MemberName
    tier: KvTier


class BlockIndex:
    """Blocks of all jobs by member."""

    def __init__(self, blocks_max: int = BLOCKS_MAX) -> None:
        self.table = BlockTable(blocks_max)
        self._members: dict[MemberName, _Member] = {}
        self._places: dict[int, Place] = {}
        self._free = list(range(OWNERS_MAX, 0, -1))
        #: Owners whose locations may still stand in the table, and how many layouts of it had
        #: been begun when they died.
        self._dead: list[tuple[int, int]] = []
        self._spaces: dict[BlockSpace, tuple[int, np.uint64]] = {}
        self._next_space = 1
        #: Events that were out of date, and gaps found.
        self.stale_events = 0
        self.gaps = 0

    # --- events --------------------------------------------------------------------------------

    def apply(self, member: MemberName, incarnation: str, event: BlockEvent) -> bool:
        """Take in one event; False if it is old and was ignored."""
        owner = self._member(member, incarnation)
        if owner is None or (owner.expected is not None and event.sequence < owner.expected):
            self.stale_events += 1
            return False
        if owner.expected is not None and event.sequence > owner.expected:
            # A removal may be among what was missed: only what is said from now on counts.
            self.gaps += 1
            self._void(owner)
        owner.expected = event.sequence + 1
        match event.kind:
            case KvEventKind.STORED if event.keys.size:
                space, keys = self._named(event.space, event.keys)
                self.table.add(keys, space, self._owner_of(member, owner, event.tier))
            case KvEventKind.REMOVED if event.keys.size and event.tier in owner.owners:
                space, keys = self._named(event.space, event.keys)
                self.table.remove(keys, space, owner.owners[event.tier])
            case KvEventKind.CLEARED:
                self._void(owner)
            case _:
                pass
        return True

    def _member(self, name: MemberName, incarnation: str) -> _Member | None:
        """The member's newest process; None if this is an earlier one."""
        member = self._members.get(name)
        if member is None:
            member = self._members[name] = _Member(incarnation)
        elif member.incarnation != incarnation:
            if incarnation in member.retired:
                return None
            self._void(member)
            # Without a name: its process ended, and this is the first word of the next one.
            ended = [member.incarnation] if member.incarnation else []
            retired = [*member.retired, *ended][-_RETIRED_MAX:]
            member = self._members[name] = _Member(incarnation, retired=retired)
        return member

    def _owner_of(self, name: MemberName, member: _Member, tier: KvTier) -> int:
        number = member.owners.get(tier)
        if number is None:
            if len(self._free) < _FREE_LOW:
                self._reclaim()
            number = member.owners[tier] = self._free.pop()
            self._places[number] = Place(name, tier)
            self.table.alive[number] = True
        return number

    def _void(self, member: _Member) -> None:
        """None of its blocks is there any more; constant time."""
        for number in member.owners.values():
            self.table.kill(number)
            del self._places[number]
            self._dead.append((number, self.table.layouts_begun))
        member.owners.clear()

    def _reclaim(self) -> None:
        """Use numbers of the dead again, once none of their locations can stand anywhere."""
        for needed in (False, True):
            if needed and not self._free:
                self.table.rebuild()
            done = self.table.layouts_done
            self._free += [number for number, begun in self._dead if done > begun]
            self._dead = [(number, begun) for number, begun in self._dead if done <= begun]
        if self._dead:
            self.table.clean_some()

    def _rebuild(self) -> None:
        self.table.rebuild()
        self._reclaim()
        used = self.table.spaces_in_use()
        self._spaces = {s: named for s, named in self._spaces.items() if named[0] in used}

    def drop(self, member: MemberName, ended: Collection[str] = ()) -> None:
        """Forget a member's blocks, as its process is gone.

        What processes `ended` said last may still arrive: it counts no more.
        """
        found = self._members.get(member)
        if found is None:
            return
        self._void(found)
        if found.incarnation in ended:
            retired = [*found.retired, found.incarnation][-_RETIRED_MAX:]
            self._members[member] = _Member("", retired=retired)

    def forget(self, job_uid: str) -> None:
        """Forget all members of a job that ended."""
        for name in [name for name in self._members if name[0] == job_uid]:
            self._void(self._members.pop(name))

    # --- names ---------------------------------------------------------------------------------

    def _space(self, space: BlockSpace) -> tuple[int, np.uint64]:
        named = self._spaces.get(space)
        if named is None:
            if len(self._spaces) >= SPACES_MAX:
                self._rebuild()
            text = "\0".join(str(part) for part in astuple(space))
            salt = hashlib.blake2b(text.encode(), digest_size=8).digest()
            named = (self._next_space, np.uint64(int.from_bytes(salt, "big")))
            self._next_space += 1
            self._spaces[space] = named
        return named

    def _named(self, space: BlockSpace, keys: Keys) -> tuple[int, Keys]:
        """(number of the space, keys of the table): one to one within the space."""
        number, salt = self._space(space)
        return number, mixed(keys, salt)

    # --- questions -----------------------------------------------------------------------------

    def allowed(
        self, members: Iterable[MemberName], tiers: Sequence[KvTier] = tuple(KvTier)
    ) -> Flags:
        """A mask over owners for the questions below: these members on these tiers."""
        mask = np.zeros(OWNERS_MAX + 1, dtype=np.bool_)
        for name in members:
            member = self._members.get(name)
            for tier, number in member.owners.items() if member else ():
                mask[number] = tier in tiers
        return mask

    def prefix_lengths(
        self,
        space: BlockSpace,
        keys: Keys,
        starts: NDArray[np.intp],
        allowed: Flags | None = None,
    ) -> NDArray[np.intp]:
        """How many of the first blocks of each chain are present.

        `keys` holds the chains one after another, `starts` (ascending) where each begins.
        """
        number, named = self._named(space, keys)
        return leading(self.table.present(named, number, allowed), starts)

    def owners(self, space: BlockSpace, keys: Keys, allowed: Flags | None = None) -> Owners:
        """[key, 4]: numbers of owners of each block, 0 for none; `place` names them."""
        number, named = self._named(space, keys)
        return self.table.holders(named, number, allowed)

    def owner(self, member: MemberName, tier: KvTier) -> int:
        """The member's number in `owners`; 0 if it holds nothing there."""
        found = self._members.get(member)
        return found.owners.get(tier, 0) if found else 0

    def place(self, owner: int) -> Place:
        return self._places[owner]

    def places(self, space: BlockSpace, block_hash: str) -> tuple[Place, ...]:
        """All copies of one block."""
        number, keys = self._named(space, block_keys([block_hash]))
        owners = self.table.all_holders(int(keys[0]), number)
        return tuple(self._places[owner] for owner in owners)

    def blocks(self, member: MemberName) -> int:
        """Blocks that the member holds, over its tiers."""
        found = self._members.get(member)
        return sum(int(self.table.counts[n]) for n in found.owners.values()) if found else 0

    def copies(
        self, members: Iterable[MemberName], tiers: Sequence[KvTier]
    ) -> Iterator[NDArray[np.int64]]:
        """How many blocks have 0, 1, 2, ... copies among these members, in pieces to be added."""
        return self.table.copies(self.allowed(members, tiers))

    def validate(self) -> None:
        """Assert what holds between any two calls."""
        self.table.validate()
        for name, member in self._members.items():
            assert member.incarnation not in member.retired, f"{name} lives and is retired"
            for tier, number in member.owners.items():
                assert self._places[number] == Place(name, tier), f"{number} is not {name}'s"
                assert self.table.alive[number], f"{name} lives, its owner {number} does not"
        dead = {number for number, _ in self._dead}
        assert not {*self._free} & dead, "an owner is free and dead"


def mixed(keys: Keys, salt: np.uint64) -> Keys:
    """Keys spread over all 64 bits; one to one for each salt, except that 0 shares with 1."""
    found = (keys ^ salt) * _MIX_1
    found ^= found >> _SHIFT
    found *= _MIX_2
    np.maximum(found, _ONE, out=found)
    return found


def leading(present: Flags, starts: NDArray[np.intp]) -> NDArray[np.intp]:
    """Length of the run of present entries at the beginning of each chain."""
    missing = np.append((~present).nonzero()[0], present.size)
    first = missing[np.searchsorted(missing, starts)]
    ends = np.append(starts[1:], present.size)
    lengths: NDArray[np.intp] = np.minimum(first, ends) - starts
    return lengths
