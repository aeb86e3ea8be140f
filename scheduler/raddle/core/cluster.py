"""The dies of all supernodes and who may use them, as arrays in the order of positions.

In go descriptions of supernodes, then readiness, faults, holds and owners as they change; out come
masks of free dies and hosts, and failure domains. Which job gets which die is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from raddle.model.errors import PermanentError, Reason
from raddle.model.health import ActiveFault, FaultLevel
from raddle.model.topology import SuperNode, parse_position

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

#: Levels of `Cluster.domains`, from the closest to the farthest.
DOMAIN_LEVELS = ("die", "npu", "node", "rack")

_LEVELS = list(FaultLevel)
# From here on a fault takes the die's work away until it is cleared; below it the work goes on.
SEVERE = _LEVELS.index(FaultLevel.RESTART_REQUEST)


class Cluster:
    """All dies, by index; supernodes in the order of their names."""

    def __init__(self, supernodes: Sequence[SuperNode]) -> None:
        self.supernodes = {s.name: s for s in sorted(supernodes, key=lambda s: s.name)}
        self._lay_out_nodes()
        self._lay_out_dies()
        nodes, dies = len(self.node_names), len(self.positions)
        self.node_ready: BoolArray = np.zeros(nodes, dtype=bool)
        self._node_held: BoolArray = np.zeros(nodes, dtype=bool)
        self._node_faulty: BoolArray = np.zeros(nodes, dtype=bool)
        self._node_drivers: list[tuple[str, ...]] = [()] * nodes
        self._offers: dict[str, BoolArray] = {}
        self._taken: BoolArray = np.zeros(dies, dtype=bool)
        self._owner: list[str | None] = [None] * dies
        self._held: BoolArray = np.zeros(dies, dtype=bool)
        self._holds: dict[str, None] = {}
        self._faulty: BoolArray = np.zeros(dies, dtype=bool)
        self._fault: dict[int, str] = {}
        self._host_used: list[dict[str, int]] = [{} for _ in range(nodes)]

    def _lay_out_nodes(self) -> None:
        machines = list(self.supernodes.values())
        self.node_names = [name for s in machines for name in s.node_names()]
        self.node_index = {name: index for index, name in enumerate(self.node_names)}
        self.node_supernode = _repeat(range(len(machines)), [s.nodes for s in machines])
        rack_starts = [0, *accumulate(s.compute_racks for s in machines)]
        self.node_rack: IntArray = np.array(
            [
                rack_starts[i] + n // s.nodes_per_rack
                for i, s in enumerate(machines)
                for n in range(s.nodes)
            ],
            dtype=np.int64,
        )
        self._host_memory: IntArray = _repeat(
            [s.host_memory_bytes for s in machines], [s.nodes for s in machines]
        )

    def _lay_out_dies(self) -> None:
        machines = list(self.supernodes.values())
        self.positions = [s.die_position(d) for s in machines for d in range(s.dies)]
        self.die_index = {name: index for index, name in enumerate(self.positions)}
        dies_a_node = [s.dies_per_node for s in machines for _ in range(s.nodes)]
        self.node_start = np.array([0, *accumulate(dies_a_node)], dtype=np.int64)
        self.node_of = _repeat(range(len(self.node_names)), dies_a_node)
        dies_an_npu = [s.dies_per_npu for s in machines for _ in range(s.nodes * s.npus_per_node)]
        self.npu_start = np.array([0, *accumulate(dies_an_npu)], dtype=np.int64)
        self.npu_of = _repeat(range(len(dies_an_npu)), dies_an_npu)
        self.rack_of: IntArray = self.node_rack[self.node_of]
        self.supernode_of: IntArray = self.node_supernode[self.node_of]

    @property
    def dies(self) -> int:
        return len(self.positions)

    # --- subjects ------------------------------------------------------------------------------

    def has_node(self, name: str) -> bool:
        return name in self.node_index

    def rack_name(self, node: str) -> str:
        """The rack of a node, a name within this machine; empty for an unknown node."""
        index = self.node_index.get(node)
        return "" if index is None else f"rack{self.node_rack[index]}"

    def require_subject(self, subject: str) -> None:
        """Raise unless the position names a part of a known supernode.

        Raises:
            PermanentError: INVALID_ARGUMENT for no position, NOT_FOUND for an unknown one.
        """
        parse_position(subject)
        if self._dies_under(subject) is None:
            raise PermanentError(
                Reason.NOT_FOUND, f"{subject} is not part of the machine; `raddle dies` lists it."
            )

    def node_of_subject(self, subject: str) -> str:
        """The node that a node, an NPU or a die belongs to."""
        self.require_subject(subject)
        if self.level_of_subject(subject) == "supernode":
            raise PermanentError(
                Reason.INVALID_ARGUMENT, f"{subject} is a supernode: name a node, an NPU or a die."
            )
        return "/".join(subject.split("/")[:2])

    @staticmethod
    def level_of_subject(subject: str) -> str:
        """supernode, node, npu or die."""
        return parse_position(subject).level

    def _dies_under(self, subject: str) -> slice | None:
        """The dies of a position of any level; None if the machine has no such part."""
        if subject in self.die_index:
            die = self.die_index[subject]
            return slice(die, die + 1)
        node = self.node_index.get(subject)
        if node is not None:
            return slice(int(self.node_start[node]), int(self.node_start[node + 1]))
        first = self.die_index.get(f"{subject}/die0")
        if first is not None:
            return slice(first, int(self.npu_start[self.npu_of[first] + 1]))
        start = 0
        for machine in self.supernodes.values():
            if machine.name == subject:
                return slice(start, start + machine.dies)
            start += machine.dies
        return None

    def _nodes_under(self, subject: str) -> slice | None:
        """The nodes that a node or supernode position covers whole."""
        node = self.node_index.get(subject)
        if node is not None:
            return slice(node, node + 1)
        dies = self._dies_under(subject) if "/" not in subject else None
        if dies is None:
            return None
        return slice(int(self.node_of[dies.start]), int(self.node_of[dies.stop - 1]) + 1)

    # --- what changes --------------------------------------------------------------------------

    def set_node(
        self, name: str, *, ready: bool, drivers: tuple[str, ...], host_memory_bytes: int
    ) -> None:
        """Take over what an agent registered and what the leader believes of its node."""
        node = self.node_index[name]
        self.node_ready[node] = ready
        if host_memory_bytes > 0:
            self._host_memory[node] = host_memory_bytes
        for driver in self._node_drivers[node]:
            self._offers[driver][node] = False
        self._node_drivers[node] = drivers
        for driver in drivers:
            if driver not in self._offers:
                self._offers[driver] = np.zeros(len(self.node_names), dtype=bool)
            self._offers[driver][node] = True

    def set_faults(self, node: str, faults: Iterable[ActiveFault]) -> None:
        """Replace the active faults of one node's parts; an unknown node is left alone."""
        if node not in self.node_index:
            return
        index, own = self.node_index[node], self._dies_under(node)
        assert own is not None, node
        self._faulty[own] = False
        self._node_faulty[index] = False
        for die in range(own.start, own.stop):
            self._fault.pop(die, None)
        for fault in sorted(faults, key=lambda f: _LEVELS.index(f.level)):
            if _LEVELS.index(fault.level) < SEVERE:
                continue
            if fault.subject == node:
                self._node_faulty[index] = True
            under = self._dies_under(fault.subject)
            # A link, switch or plane is no die, and no agent speaks for another node.
            if under is None or under.start < own.start or under.stop > own.stop:
                continue
            self._faulty[under] = True
            self._fault.update(dict.fromkeys(range(under.start, under.stop), fault.code))

    def set_hold(self, subject: str, *, held: bool) -> None:
        """Forbid or allow new work on a part; what another hold covers stays held."""
        if held:
            self._holds[subject] = None
            self._mark_held(subject)
            return
        self._holds.pop(subject, None)
        self._held[:] = False
        self._node_held[:] = False
        for other in self._holds:
            self._mark_held(other)

    def _mark_held(self, subject: str) -> None:
        dies, nodes = self._dies_under(subject), self._nodes_under(subject)
        if dies is not None:
            self._held[dies] = True
        if nodes is not None:
            self._node_held[nodes] = True

    def occupy(self, positions: Iterable[str], job_uid: str) -> None:
        """Give dies to a job; what it owns already stays its own, unknown dies are passed over."""
        for position in positions:
            die = self.die_index.get(position)
            if die is None:
                continue
            other = self._owner[die]
            assert other is None or other == job_uid, f"{position}: {other} and {job_uid}"
            self._owner[die] = job_uid
            self._taken[die] = True

    def release(self, positions: Iterable[str]) -> None:
        for position in positions:
            die = self.die_index.get(position)
            if die is None:
                continue
            self._owner[die] = None
            self._taken[die] = False

    def occupy_host(self, node: str, owner: str, dram_bytes: int) -> None:
        """Add to the host memory that a job takes on a node."""
        used = self._host_used[self.node_index[node]]
        used[owner] = used.get(owner, 0) + dram_bytes

    def release_hosts(self, owner: str) -> None:
        """Give back all host memory of a job."""
        for used in self._host_used:
            used.pop(owner, None)

    def idle(self) -> Cluster:
        """The same machine as if nothing ran on it: what a job can have once others have ended."""
        found = copy(self)
        found.vacate()
        return found

    def vacate(self) -> None:
        """Nobody owns anything any more."""
        self._taken = np.zeros_like(self._taken)
        self._owner = [None] * len(self._owner)
        self._host_used = [{} for _ in self._host_used]

    # --- reads ---------------------------------------------------------------------------------

    def owner_of(self, position: str) -> str | None:
        return self._owner[self.die_index[position]]

    def fault_of(self, position: str) -> str | None:
        """Code of the worst severe fault of the die, if any."""
        return self._fault.get(self.die_index.get(position, -1))

    def is_held(self, position: str) -> bool:
        return bool(self._held[self.die_index[position]])

    def is_usable(self, position: str, driver: str, job_uid: str = "") -> bool:
        """May this job start a process on this die: healthy, not held, free or its own?"""
        die = self.die_index.get(position)
        if die is None:
            return False
        node = self.node_of[die]
        if self._faulty[die] or self._held[die] or self._owner[die] not in (None, job_uid):
            return False
        return bool(self.node_ready[node] and self.offers(driver)[node])

    def offers(self, driver: str) -> BoolArray:
        """Nodes that offer a driver; an empty driver is offered by all."""
        if not driver:
            return np.ones(len(self.node_names), dtype=bool)
        found = self._offers.get(driver)
        return found if found is not None else np.zeros(len(self.node_names), dtype=bool)

    def free_dies(self, driver: str) -> BoolArray:
        """Usable dies without an owner on nodes that offer the driver."""
        nodes = self.node_ready & self.offers(driver)
        found: BoolArray = nodes[self.node_of] & ~(self._faulty | self._held | self._taken)
        return found

    def offered_dies(self, driver: str) -> int:
        """Dies of all nodes that offer the driver, whatever their state."""
        return int(np.count_nonzero(self.offers(driver)[self.node_of]))

    def usable_hosts(self, driver: str) -> list[str]:
        """Nodes whose host may take a pool member, in order."""
        blocked = self._node_held | self._node_faulty
        usable = self.node_ready & ~blocked & self.offers(driver)
        return [self.node_names[node] for node in np.flatnonzero(usable)]

    def host_memory(self, node: str) -> int:
        """Host memory that no pool member has taken, in bytes."""
        index = self.node_index[node]
        return int(self._host_memory[index]) - sum(self._host_used[index].values())

    def domains(self, positions: Sequence[str]) -> IntArray:
        """[level, rank]: die, NPU, node and rack of each die."""
        index = np.array([self.die_index[position] for position in positions], dtype=np.int64)
        return np.stack([index, self.npu_of[index], self.node_of[index], self.rack_of[index]])

    def count_states(self, driver: str = "") -> dict[str, int]:
        """Every die once, under the first cause that keeps it from new work, or free."""
        left = np.ones(self.dies, dtype=bool)
        causes = {
            "busy": self._taken,
            "held": self._held,
            "faulty": self._faulty,
            "on nodes that are not ready": ~self.node_ready[self.node_of],
            "on nodes without the driver": ~self.offers(driver)[self.node_of],
        }
        found = {}
        for name, mask in causes.items():
            found[name] = int(np.count_nonzero(left & mask))
            left &= ~mask
        return {"free": int(np.count_nonzero(left)), **found}

    def validate(self) -> None:
        """Assert that the arrays agree with each other."""
        for die, owner in enumerate(self._owner):
            assert (owner is not None) == bool(self._taken[die]), f"{self.positions[die]}: {owner}"
        faulty = np.flatnonzero(self._faulty).tolist()
        assert faulty == sorted(self._fault), (
            f"faults {sorted(self._fault)[:8]}, marks {faulty[:8]}"
        )
        for node, drivers in enumerate(self._node_drivers):
            for driver in drivers:
                assert self._offers[driver][node], f"{self.node_names[node]} lost {driver}"
        held = np.zeros_like(self._held)
        for subject in self._holds:
            dies = self._dies_under(subject)
            if dies is not None:
                held[dies] = True
        assert np.array_equal(held, self._held), "holds and held dies differ"


def _repeat(values: Iterable[int], counts: Sequence[int]) -> IntArray:
    return np.repeat(np.array(list(values), dtype=np.int64), counts)
