"""One simulated rank as an engine: fenced by the epoch, and it keeps what it was given.

It refuses commands of an older epoch, and to serve before it was repaired at that very epoch. It
holds the experts that it loaded as long as the maps ask for them, and knows its peers by the
addresses of the members that it was given. A new process holds and knows nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from raddle.model.health import PeerSuspicion, RankStage
from raddle.model.types import ExpertMap, ExpertMove, Member, RankKey, WeightSource

Expert = tuple[int, int]


class Refused(Exception):  # noqa: N818 - an answer of an engine, not a mistake
    """The command is of another epoch, or out of order."""


@dataclass(slots=True)
class SimulatedRank:
    """One process."""

    node: str
    job_uid: str
    key: RankKey
    start_count: int
    die: str
    incarnation: str
    epoch: int
    alive: bool = True
    stage: RankStage = RankStage.STARTED
    members: tuple[Member, ...] = ()
    expert_map: ExpertMap | None = None
    #: (layer, expert) in memory.
    held: set[Expert] = field(default_factory=set[Expert])
    #: It has loaded nothing yet.
    is_new: bool = True
    #: The epoch at which it had all that it was to have; 0 before the first.
    repaired_epoch: int = 0
    #: Peers that it lost at its epoch, by incarnation; told again to each new agent.
    suspicions: dict[str, PeerSuspicion] = field(default_factory=dict[str, PeerSuspicion])

    @property
    def address(self) -> str:
        return f"{self.node}:{self.incarnation}"

    @property
    def is_repaired(self) -> bool:
        """May it serve at its epoch?"""
        return self.repaired_epoch == self.epoch

    def quiesce(self, epoch: int) -> None:
        """Stop serving; a newer epoch is taken over here and nowhere else.

        At the same epoch it merely pauses: what it has stays.
        """
        if epoch < self.epoch:
            raise Refused(f"epoch {epoch} is older than this rank's epoch {self.epoch}")
        if epoch > self.epoch:
            self.suspicions.clear()
        self.epoch = epoch
        self.stage = RankStage.FENCED

    def _require(self, epoch: int) -> None:
        if epoch != self.epoch or self.stage is RankStage.STARTED:
            raise Refused(f"epoch {epoch} is not fenced here: {self.stage} at {self.epoch}")

    def set_members(self, epoch: int, members: tuple[Member, ...]) -> None:
        self._require(epoch)
        self.members = members

    def set_expert_map(self, epoch: int, expert_map: ExpertMap) -> None:
        """Take the map; experts that it does not put here are forgotten."""
        self._require(epoch)
        self.expert_map = expert_map
        self.held &= self.wanted(expert_map)

    def wanted(self, expert_map: ExpertMap) -> set[Expert]:
        """(layer, expert) that a map puts on this rank."""
        width = expert_map.slots_per_rank
        own = slice(self.key.rank * width, (self.key.rank + 1) * width)
        return {
            (number, expert)
            for number, layer in enumerate(expert_map.layers)
            for expert in layer.physical_to_logical[own]
            if expert >= 0
        }

    def load(
        self,
        epoch: int,
        moves: tuple[ExpertMove, ...],
        *,
        all_of_it: bool,
        find: Callable[[str], SimulatedRank | None],
    ) -> int:
        """Load what the moves name and nothing else; with `all_of_it`, the whole share of the map.

        A peer that does not hold an expert any more is passed over: the checkpoint has it. `find`
        gives the living rank at an address. Returns how many were loaded.
        """
        self._require(epoch)
        if self.expert_map is None:
            raise Refused("there is no map to load for")
        wanted = self.wanted(self.expert_map)
        named = {(move.layer, move.expert): move for move in moves}
        for move in named.values():
            self._ask_peer(move, find)
        loaded = (wanted if all_of_it else set(named)) - self.held
        self.held |= loaded
        self.is_new = False
        return len(loaded)

    def _ask_peer(self, move: ExpertMove, find: Callable[[str], SimulatedRank | None]) -> None:
        """Reading from a peer is the first that shows whether its address is good."""
        if move.source is not WeightSource.PEER:
            return
        for member in self.peers():
            if member.rank.rank == move.source_rank and find(member.engine_address) is None:
                self.suspect(member)

    def repaired(self, epoch: int) -> None:
        """Everything was given; one that serves already goes on."""
        self._require(epoch)
        self.repaired_epoch = epoch
        if self.stage is not RankStage.LIVE:
            self.stage = RankStage.REPAIRED

    def resume(self, epoch: int) -> None:
        """Serve: only at the epoch at which it was repaired."""
        self._require(epoch)
        if not self.is_repaired:
            raise Refused(f"epoch {epoch} is not repaired here: {self.stage}")
        self.stage = RankStage.LIVE

    def peers(self) -> list[Member]:
        """The other members of its instance."""
        mine = (self.key.role, self.key.instance)
        return [
            member
            for member in self.members
            if (member.rank.role, member.rank.instance) == mine and member.rank != self.key
        ]

    def suspect(self, peer: Member) -> PeerSuspicion:
        """Its connection to a peer is broken."""
        suspicion = PeerSuspicion(
            role=peer.rank.role,
            instance=peer.rank.instance,
            rank=peer.rank.rank,
            incarnation=peer.incarnation,
            reason="CONNECTION_BROKEN",
            epoch=self.epoch,
        )
        self.suspicions[peer.incarnation] = suspicion
        return suspicion
