"""All dies of all supernodes as arrays: who owns each, and whether it may take work.

In go placements, holds, faults and node states; out comes, for a placement, which dies are free.
Dies are numbered in position order, supernode by supernode. Hold, health and work stay three
separate facts of a die.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from raddle.model.errors import PermanentError, Reason
from raddle.model.health import ActiveFault, FaultLevel
from raddle.model.topology import SuperNode, node_of, parse_position

_LEVELS = list(FaultLevel)
# From here on a fault takes the die's work away until it is cleared; below it the work goes on.
SEVERE = _LEVELS.index(FaultLevel.RESTART_REQUEST)

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


class Cluster:
    """Dies, nodes and racks with what occupies and what forbids them."""

    def __init__(self, supernodes: Sequence[SuperNode]) -> None:
        self.supernodes = {s.name: s for s in sorted(supernodes, key=lambda s: s.name)}
        self.positions: list[str] = []
        self.node_names: list[str] = []
        self.node_index: dict[str, int] = {}
        npu, node, rack, supernode = [], [], [], []
        racks = npus = 0
        for number, machine in enumerate(self.supernodes.values()):
            for local, name in enumerate(machine.node_names()):
                index = len(self.node_names)
                self.node_index[name] = index
                self.node_names.append(name)
                self.positions += machine.node_positions(name)
                for die in range(machine.dies_per_node):
                    npu.append(npus + die // machine.dies_per_npu)
                    node.append(index)
                    rack.append(racks + local // machine.nodes_per_rack)
                    supernode.append(number)
                npus += machine.npus_per_node
            racks += machine.compute_racks
        self.die_index = {position: die for die, position in enumerate(self.positions)}
        self.npu_of = np.array(npu, dtype=np.int64)
        self.node_of = np.array(node, dtype=np.int64)
        self.rack_of = np.array(rack, dtype=np.int64)
        self.supernode_of = np.array(supernode, dtype=np.int64)
        self._busy: BoolArray = np.zeros(len(self.positions), dtype=bool)
        self._held: BoolArray = np.zeros(len(self.positions), dtype=bool)
        self._faulty: BoolArray = np.zeros(len(self.positions), dtype=bool)
        self._owner: dict[int, str] = {}
        self._fault: dict[int, str] = {}
        self._node_ready: BoolArray = np.zeros(len(self.node_names), dtype=bool)
        self._drivers: list[tuple[str, ...]] = [()] * len(self.node_names)
        self._host_memory: list[int] = [0] * len(self.node_names)

    @property
    def dies(self) -> int:
        return len(self.positions)

    def has_node(self, name: str) -> bool:
        return name in self.node_index

    # --- facts ---------------------------------------------------------------------------------

    def set_node(
        self, name: str, *, ready: bool, drivers: tuple[str, ...], host_memory_bytes: int
    ) -> None:
        index = self.node_index[name]
        self._node_ready[index] = ready
        self._drivers[index] = drivers
        self._host_memory[index] = host_memory_bytes

    def set_faults(self, node: str, faults: Iterable[ActiveFault]) -> None:
        """The node's active faults, all of them; those that are gone are forgotten."""
        if node not in self.node_index:
            return
        here = np.flatnonzero(self.node_of == self.node_index[node])
        for index in here:
            self._fault.pop(int(index), None)
        self._faulty[here] = False
        for fault in faults:
            if _LEVELS.index(fault.level) < SEVERE or node_of(fault.subject) != node:
                continue
            for die in self._dies_under(fault.subject):
                self._faulty[die] = True
                self._fault.setdefault(die, fault.code)

    def set_hold(self, subject: str, *, held: bool) -> None:
        for die in self._dies_under(subject):
            self._held[die] = held

    def occupy(self, positions: Iterable[str], job_uid: str) -> None:
        for position in positions:
            die = self.die_index.get(position)
            if die is None:
                continue
            assert self._owner.get(die, job_uid) == job_uid, (position, self._owner[die], job_uid)
            self._busy[die] = True
            self._owner[die] = job_uid

    def release(self, positions: Iterable[str]) -> None:
        for position in positions:
            die = self.die_index.get(position)
            if die is not None:
                self._busy[die] = False
                self._owner.pop(die, None)

    # --- questions -----------------------------------------------------------------------------

    def free_dies(self, driver: str) -> BoolArray:
        """[dies] True where work of this engine driver may be placed now."""
        offers = np.array([driver in drivers for drivers in self._drivers], dtype=bool)
        usable_nodes = self._node_ready & offers
        free: BoolArray = ~(self._busy | self._held | self._faulty) & usable_nodes[self.node_of]
        return free

    def offered_dies(self, driver: str) -> int:
        """Dies of nodes that offer the driver, whatever their state."""
        offers = np.array([driver in drivers for drivers in self._drivers], dtype=bool)
        return int(offers[self.node_of].sum()) if self.dies else 0

    def usable_hosts(self, driver: str) -> list[str]:
        """Nodes that may take a rank without a die, in order."""
        return [
            name
            for index, name in enumerate(self.node_names)
            if self._node_ready[index]
            and driver in self._drivers[index]
            and not bool(self._held[self.node_of == index].all())
        ]

    def host_memory(self, node: str) -> int:
        return self._host_memory[self.node_index[node]]

    def is_usable(self, position: str, driver: str, job_uid: str = "") -> bool:
        """May this die run work, being free or the job's own?"""
        die = self.die_index.get(position)
        if die is None or self._owner.get(die, job_uid) != job_uid:
            return False
        index = int(self.node_of[die])
        return (
            bool(self._node_ready[index])
            and driver in self._drivers[index]
            and not bool(self._held[die] or self._faulty[die])
        )

    def fault_of(self, position: str) -> str | None:
        """Code of a severe active fault of the die, if any."""
        return self._fault.get(self.die_index.get(position, -1))

    def owner_of(self, position: str) -> str | None:
        return self._owner.get(self.die_index[position])

    def is_held(self, position: str) -> bool:
        return bool(self._held[self.die_index[position]])

    def domains(self, positions: Sequence[str]) -> IntArray:
        """[4, ranks] failure domains of dies: die, NPU, node, rack."""
        index = np.array([self.die_index[p] for p in positions], dtype=np.int64)
        found: IntArray = np.stack(
            [index, self.npu_of[index], self.node_of[index], self.rack_of[index]]
        )
        return found

    def count_states(self) -> dict[str, int]:
        """Dies by what keeps them from new work, each counted once, for sentences."""
        ready = self._node_ready[self.node_of] if self.dies else np.zeros(0, dtype=bool)
        faulty = self._faulty
        held = self._held & ~faulty
        busy = self._busy & ~faulty & ~held
        away = ~ready & ~faulty & ~held & ~busy
        rest = ~(faulty | held | busy | away)
        return {
            "free": int(rest.sum()),
            "busy": int(busy.sum()),
            "held": int(held.sum()),
            "faulty": int(faulty.sum()),
            "on silent nodes": int(away.sum()),
        }

    def require_subject(self, subject: str) -> None:
        """Refuse a position that this cluster does not have.

        Raises:
            PermanentError: INVALID_ARGUMENT for no position, NOT_FOUND for an absent one.
        """
        parse_position(subject)
        if not self._dies_under(subject):
            raise PermanentError(
                Reason.NOT_FOUND, f"{subject} does not exist; `raddle nodes` lists the nodes."
            )

    def node_of_subject(self, subject: str) -> str:
        """The node of a node, NPU or die position."""
        self.require_subject(subject)
        if parse_position(subject).node is None:
            raise PermanentError(
                Reason.INVALID_ARGUMENT, f"{subject} is a whole supernode; name a node or a part."
            )
        return node_of(subject)

    @staticmethod
    def level_of_subject(subject: str) -> str:
        return parse_position(subject).level

    def _dies_under(self, subject: str) -> list[int]:
        die = self.die_index.get(subject)
        if die is not None:
            return [die]
        prefix = f"{subject}/"
        if subject in self.node_index:
            return [int(d) for d in np.flatnonzero(self.node_of == self.node_index[subject])]
        return [die for position, die in self.die_index.items() if position.startswith(prefix)]

    def validate(self) -> None:
        """Assert that the arrays and the owners tell the same."""
        busy = {int(die) for die in np.flatnonzero(self._busy)}
        assert busy == set(self._owner), sorted(busy ^ set(self._owner))[:8]
        faulty = {int(die) for die in np.flatnonzero(self._faulty)}
        assert faulty == set(self._fault), sorted(faulty ^ set(self._fault))[:8]
