"""What the leader believes of each node: ready, suspect, unknown or lost, and when it may say lost.

In go signs of life and silence (leases, stats streams, probes, peers' words); out come node states
and probes. "I cannot see it" and "it is dead" are two states: a node is lost only when its agent
is silent and none of its ranks answers the leader's own call. While its agent renews the lease, it
is suspect and no more, unless a peer rank speaks against it: the leader may be the one who is cut
off. If more nodes than a rack falls silent in one window, or within one lease time of a leader
change, the storm brake holds: they are unknown until a second witness (a peer rank) speaks against
them. Nodes that one host carries are one failure, however many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from raddle.model.kinds import FaultKind, NodeState
from raddle.model.reasons import Decision
from raddle.model.types import Why

LEASE_TTL_S = 4.0
# Two lease times: all leases that one event lets lapse end within it.
STORM_WINDOW_S = 2 * LEASE_TTL_S
# Leases that one event lets lapse do not end in the same instant: before the first silent node is
# called lost, it is seen whether others follow. A peer's word makes waiting needless.
STORM_GATHER_S = 0.5
# Around an election leases end up to a renewal (1 s) and the store's checks (0.5 s) apart.
LAPSES_APART_S = 2.0
# A silent node whose ranks answered, or whose agent renews its lease, is asked again.
ASK_AGAIN_S = 1.0
_ASKED_AGAIN = (Decision.RANKS_ANSWER, Decision.LEASE_LIVES)


@dataclass(slots=True)
class Node:
    """One node as the leader sees it."""

    name: str
    #: The computer that carries it, if that carries several nodes.
    host: str = ""
    state: NodeState = NodeState.ABSENT
    why: Why = field(default_factory=Why)
    has_lease: bool = False
    has_stream: bool = False
    silent_since_s: float = 0.0
    answered_s: float = 0.0
    probing: bool = False
    accused: bool = False
    #: Unknown together with more nodes than one failure domain has.
    stormed: bool = False
    #: Of a node from such a storm: not judged before, but by a second witness.
    spared_until_s: float = 0.0


class NodeTracker:
    """Node states of one leader's term."""

    def __init__(self, *, now: float) -> None:
        #: The largest single failure domain, in nodes; it follows the described machine.
        self.storm_nodes_max = 1
        self.nodes: dict[str, Node] = {}
        # Leases that lapse within one TTL of a leader change prove nothing.
        self.grace_until_s = now + LEASE_TTL_S
        #: Nodes whose state changed since the last `take_changed`.
        self._changed: dict[str, None] = {}
        #: Nodes that need a probe.
        self._to_probe: dict[str, None] = {}

    def node(self, name: str) -> Node:
        if name not in self.nodes:
            self.nodes[name] = Node(name)
        return self.nodes[name]

    def remember(self, other: NodeTracker) -> None:
        """What a tracker of the same term knew: open streams, the grace time, who is silent."""
        self.grace_until_s = other.grace_until_s
        for name, node in other.nodes.items():
            if node.has_stream:
                self.stream_opened(name)
            if node.state is NodeState.UNKNOWN and self.node(name).state is NodeState.SUSPECT:
                mine = self.node(name)
                mine.silent_since_s = node.silent_since_s
                mine.stormed, mine.spared_until_s = node.stormed, node.spared_until_s
                self._set(mine, NodeState.UNKNOWN, node.why.reason, node.why.message)
            elif node.state is NodeState.SUSPECT and not node.has_stream:
                mine = self.node(name)
                mine.silent_since_s, mine.answered_s = node.silent_since_s, node.answered_s
                self._set(mine, NodeState.SUSPECT, node.why.reason, node.why.message)

    def store_leader_changed(self, *, now: float) -> None:
        self.grace_until_s = max(self.grace_until_s, now + LEASE_TTL_S)

    def registered(self, name: str, *, has_lease: bool, now: float) -> None:
        """A node known from its registration at the start of a term."""
        node = self.node(name)
        node.has_lease = has_lease
        if has_lease:
            self._set(node, NodeState.READY, Decision.READY, "agent reports under its lease")
        else:
            self._fall_silent(node, Decision.LEASE_ABSENT, "no lease at the start of the term", now)

    def lease_seen(self, name: str) -> None:
        node = self.node(name)
        node.has_lease = True
        # A word of its agent is newer than a peer's against it, though it may not be ready yet.
        node.accused = False
        if node.state is not NodeState.READY and (node.has_stream or not node.probing):
            self._set(node, NodeState.READY, Decision.READY, "agent reports under its lease")

    def stream_opened(self, name: str) -> None:
        node = self.node(name)
        node.has_stream = True
        if node.has_lease:
            self._set(node, NodeState.READY, Decision.READY, "agent streams to the leader")

    def lease_ended(self, name: str, *, now: float) -> None:
        node = self.node(name)
        node.has_lease = False
        self._fall_silent(node, Decision.LEASE_ENDED, "the agent's lease ended", now)

    def stream_broken(self, name: str, *, now: float) -> None:
        node = self.node(name)
        node.has_stream = False
        self._fall_silent(node, Decision.STREAM_BROKEN, "the agent's stream broke", now)

    def accused(self, name: str) -> None:
        """A peer rank lost its connections to this node's ranks: a second witness."""
        node = self.node(name)
        if node.state is NodeState.UNKNOWN:
            node.accused = True
            self._to_probe[name] = None
        elif node.state is NodeState.SUSPECT:
            node.accused = True

    def rank_gone(self, name: str, *, now: float) -> None:
        """A rank there answers nobody. If its agent has not come to this leader, ask the others.

        After a takeover a dead node's lease lives on for a while, and no stream of it can break.
        """
        node = self.node(name)
        if node.has_stream or node.state is NodeState.LOST:
            return
        if node.state is NodeState.READY:
            self._fall_silent(
                node, Decision.NO_STREAM, "its agent does not stream to this leader", now
            )
        node.accused = True
        self._to_probe[name] = None

    def declared_lost(self, name: str, message: str) -> None:
        """An operator's word against a silent node needs no probe."""
        self._set(self.node(name), NodeState.LOST, Decision.DECLARED_LOST, message)

    def probed(
        self, name: str, *, answered: bool, now: float, quiet_nodes: Sequence[str] = ()
    ) -> None:
        """What the leader found when it asked a silent node itself.

        Args:
            quiet_nodes: nodes whose agents do not renew their leases any more, which still run:
                leases that one event ends do so up to a renewal apart.
        """
        node = self.node(name)
        node.probing = False
        if node.state not in (NodeState.SUSPECT, NodeState.UNKNOWN):
            return
        if node.has_lease and node.has_stream:
            self._set(node, NodeState.READY, Decision.READY, "agent is back")
        elif answered:
            node.answered_s = now
            node.accused = False
            self._set(
                node,
                NodeState.SUSPECT,
                Decision.RANKS_ANSWER,
                "the agent is silent but its ranks answer: no new work, nothing moves",
            )
        elif node.has_lease and name not in quiet_nodes and not node.accused:
            # The leader may be the one who is cut off: a node that writes to the store is not dead.
            node.answered_s = now
            self._set(
                node,
                NodeState.SUSPECT,
                Decision.LEASE_LIVES,
                "nobody there answers the leader but the agent renews its lease: no new work,"
                " nothing moves",
            )
        elif node.why.reason in _ASKED_AGAIN:
            # The host goes after its agent: a silence of its own, which others may share.
            node.silent_since_s = now
            self._set(node, NodeState.SUSPECT, Decision.RANKS_SILENT, "its agent, then its ranks")
        elif now < node.silent_since_s + self._gather_s(node) and not node.accused:
            # Judged a moment later; `wake` asks again.
            return
        elif self._is_spared(node, quiet_nodes, now) and not node.accused:
            self._set(
                node,
                NodeState.UNKNOWN,
                Decision.STORM_BRAKE,
                f"more than {self.storm_nodes_max} nodes fell silent together or the leader just"
                " changed: nothing moves until a second witness speaks",
            )
        else:
            self._set(
                node,
                NodeState.LOST,
                FaultKind.NODE_LOST,
                f"{node.why.message or 'silent'}, and none of its ranks answers",
            )

    def _gather_s(self, node: Node) -> float:
        """How long it is seen whether others follow a silent node."""
        return LAPSES_APART_S if node.silent_since_s < self.grace_until_s else STORM_GATHER_S

    def _is_spared(self, node: Node, quiet_nodes: Sequence[str], now: float) -> bool:
        quiet_s = max(self.grace_until_s, node.spared_until_s)
        names = dict.fromkeys((*(other.name for other in self._silent(now)), *quiet_nodes))
        silent = [self.nodes[name] for name in names if name in self.nodes]
        unknown = self._unknown()
        is_storm = self._is_storm(silent, quiet_nodes) or self._is_storm(unknown, quiet_nodes)
        return now < quiet_s or is_storm

    def _is_storm(self, nodes: Sequence[Node], quiet_nodes: Sequence[str] = ()) -> bool:
        """Are these more than one failure takes? The nodes of one host count once.

        Unless nobody else is heard: then it is rather the leader that is cut off.
        """
        hosts = Counter(node.host for node in nodes if node.host)
        host, carried = max(hosts.items(), key=lambda item: item[1], default=("", 1))
        others_are_heard = any(
            node.state is NodeState.READY and node.host != host and node.name not in quiet_nodes
            for node in self.nodes.values()
        )
        count = len(nodes) - (carried - 1 if others_are_heard else 0)
        return count > self.storm_nodes_max

    def _unknown(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.state is NodeState.UNKNOWN]

    def _silent(self, now: float) -> list[Node]:
        """Nodes that fell silent within one window."""
        return [
            node
            for node in self.nodes.values()
            if node.state in (NodeState.SUSPECT, NodeState.UNKNOWN, NodeState.LOST)
            and now - node.silent_since_s <= STORM_WINDOW_S
        ]

    def wake(self, *, now: float) -> float | None:
        """Ask silent nodes again when it is time to judge; the time to look again, or None."""
        later: list[float] = []
        for node in self.nodes.values():
            if node.state is NodeState.SUSPECT:
                due = node.silent_since_s + self._gather_s(node)
                if node.why.reason in _ASKED_AGAIN:
                    due = node.answered_s + ASK_AGAIN_S
                if now < due:
                    later.append(due)
                elif not node.probing:
                    self._to_probe[node.name] = None
        unknown_due = self._wake_unknown(now)
        if unknown_due is not None:
            later.append(unknown_due)
        return min(later, default=None)

    def _wake_unknown(self, now: float) -> float | None:
        unknown = self._unknown()
        if self._is_storm(unknown):
            # However long: a second witness speaks, or nodes come back.
            for node in unknown:
                node.stormed = True
            return now + STORM_WINDOW_S
        self._spare_last(unknown, now)
        waiting = [node for node in unknown if not node.probing]
        if not waiting:
            return None
        # The few that fell silent around a leader change are judged as soon as that is over.
        wait_s = STORM_WINDOW_S if self._is_storm(self._silent(now)) else LAPSES_APART_S
        together_s = max(self.grace_until_s, max(n.silent_since_s for n in waiting) + wait_s)
        later: list[float] = []
        for node in waiting:
            due = max(together_s, node.spared_until_s)
            if now < due:
                later.append(due)
            else:
                self._to_probe[node.name] = None
        return min(later, default=None)

    def _spare_last(self, unknown: list[Node], now: float) -> None:
        """Nodes come back from a storm one by one: the last of them are not the dead ones.

        They are spared for a window from the first moment at which they are few, and only once:
        others that come and go do not put a dead node's end off.
        """
        for node in unknown:
            if node.stormed and not node.spared_until_s:
                node.spared_until_s = now + STORM_WINDOW_S

    def take_changed(self) -> list[str]:
        changed, self._changed = list(self._changed), {}
        return changed

    def take_probes(self) -> list[str]:
        """Nodes to probe now; each is marked as being probed."""
        silent = (NodeState.SUSPECT, NodeState.UNKNOWN)
        found = [self.nodes[name] for name in self._to_probe]
        names = [node.name for node in found if node.state in silent and not node.probing]
        self._to_probe = {}
        for name in names:
            self.nodes[name].probing = True
        return names

    def _fall_silent(self, node: Node, reason: str, message: str, now: float) -> None:
        if node.state in (NodeState.READY, NodeState.ABSENT):
            node.silent_since_s = now
            self._set(node, NodeState.SUSPECT, reason, message)
        if node.state is not NodeState.LOST:
            self._to_probe[node.name] = None

    def _set(self, node: Node, state: NodeState, reason: str, message: str) -> None:
        if node.state is not state:
            self._changed[node.name] = None
            if state is not NodeState.UNKNOWN:
                node.stormed, node.spared_until_s = False, 0.0
            if state is NodeState.READY:
                node.accused = False
        node.state, node.why = state, Why(reason=reason, message=message)
