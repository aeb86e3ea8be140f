"""Machines: a supernode's description, and names of its parts.

A supernode is nodes of NPU packages of dies. A position names one part: `sn0`, `sn0/n07`,
`sn0/n07/npu3`, `sn0/n07/npu3/die1`. Die d of a supernode sits on NPU d // dies_per_npu and on node
d // (npus_per_node * dies_per_npu).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields

from raddle.model.errors import PermanentError, Reason

DIES_MAX = 200_000
_MACHINE_CHARACTERS_MAX = 64
# What a position can name (see `_POSITION`).
_MOST = {"nodes": 99_999, "npus_per_node": 1_000, "dies_per_npu": 100}
# None, or not said.
MAY_BE_ZERO = ("communication_racks", "prefill_tokens_per_s")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?\Z")
_POSITION = re.compile(
    r"(?P<supernode>[a-z0-9][-a-z0-9]{0,31})"
    r"(/n(?P<node>\d{2,5})(/npu(?P<npu>\d{1,3})(/die(?P<die>\d{1,2}))?)?)?\Z"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperNode:
    """One flat, all-to-all domain of dies. Sizes are bytes, bandwidths bytes per second, one way.

    Raises:
        PermanentError: INVALID_ARGUMENT with the field's name for a value that cannot be.
    """

    name: str
    machine: str
    nodes: int
    npus_per_node: int
    dies_per_npu: int
    cpus_per_node: int
    nodes_per_rack: int
    compute_racks: int
    communication_racks: int
    ub_planes: int
    switch_chips_per_node: int
    die_memory_bytes: int
    host_memory_bytes: int
    die_to_die_bytes_per_s: int
    die_to_host_bytes_per_s: int
    node_network_bytes_per_s: int
    bucket_bytes_per_s: int
    prefill_tokens_per_s: int = 0

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            shown = repr(self.name[:40])
            raise _invalid("name", f"{shown} must be lower-case letters, digits and dashes")
        if len(self.machine) > _MACHINE_CHARACTERS_MAX or not self.machine.isprintable():
            most = _MACHINE_CHARACTERS_MAX
            raise _invalid("machine", f"must be at most {most} printable characters")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("name", "machine"):
                continue
            least = 0 if field.name in MAY_BE_ZERO else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise _invalid(field.name, f"must be a whole number of at least {least}")
            if value > _MOST.get(field.name, value):
                raise _invalid(field.name, f"must be at most {_MOST[field.name]}")
        if self.dies > DIES_MAX:
            raise _invalid("nodes", f"{self.dies} dies are more than {DIES_MAX}")
        if self.nodes > self.nodes_per_rack * self.compute_racks:
            racks = f"{self.compute_racks} racks of {self.nodes_per_rack}"
            raise _invalid("compute_racks", f"{self.nodes} nodes do not fit into {racks}")

    @property
    def dies_per_node(self) -> int:
        return self.npus_per_node * self.dies_per_npu

    @property
    def dies(self) -> int:
        return self.nodes * self.dies_per_node

    def node_name(self, node: int) -> str:
        """`sn0/n07` of node 7; wide enough that names sort as numbers do."""
        width = max(2, len(str(self.nodes - 1)))
        return f"{self.name}/n{node:0{width}d}"

    def die_position(self, die: int) -> str:
        node, rest = divmod(die, self.dies_per_node)
        npu, die_in_npu = divmod(rest, self.dies_per_npu)
        return f"{self.node_name(node)}/npu{npu}/die{die_in_npu}"

    def node_names(self) -> Iterator[str]:
        return (self.node_name(node) for node in range(self.nodes))

    def has_position(self, text: str) -> bool:
        """Is this a part of the supernode, of any level, named as the supernode names it?

        Raises:
            PermanentError: INVALID_ARGUMENT when the text names no position.
        """
        parsed = parse_position(text)
        if parsed.supernode != self.name:
            return False
        if parsed.node is None:
            return True
        return (
            parsed.node < self.nodes
            and (parsed.npu or 0) < self.npus_per_node
            and (parsed.die or 0) < self.dies_per_npu
            and node_of(text) == self.node_name(parsed.node)
        )

    def node_positions(self, node: str) -> list[str]:
        """Positions of a node's dies, in order."""
        return [
            f"{node}/npu{npu}/die{die}"
            for npu in range(self.npus_per_node)
            for die in range(self.dies_per_npu)
        ]


@dataclass(frozen=True, slots=True)
class Position:
    """A parsed position; parts below its level are None."""

    supernode: str
    node: int | None = None
    npu: int | None = None
    die: int | None = None

    @property
    def level(self) -> str:
        """supernode, node, npu or die."""
        if self.die is not None:
            return "die"
        if self.npu is not None:
            return "npu"
        return "supernode" if self.node is None else "node"


def parse_position(text: str) -> Position:
    """Split a position.

    Raises:
        PermanentError: INVALID_ARGUMENT when the text names no position.
    """
    match = _POSITION.match(text)
    if match is None:
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"{text[:80]!r} is no position; write sn0/n07, sn0/n07/npu3 or sn0/n07/npu3/die1.",
        )
    numbers = {
        name: None if match[name] is None else int(match[name]) for name in ("node", "npu", "die")
    }
    return Position(match["supernode"], **numbers)


def node_of(position: str) -> str:
    """`sn0/n07/npu3/die1` -> `sn0/n07`."""
    return "/".join(position.split("/")[:2])


def _invalid(path: str, message: str) -> PermanentError:
    return PermanentError(Reason.INVALID_ARGUMENT, f"supernode.{path}: {message}", field=path)
