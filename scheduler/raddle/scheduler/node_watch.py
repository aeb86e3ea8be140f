"""A watch of nodes: what the leader believes of each, with its dies if they are asked for.

A node's status is made of several records and of the leader's memory, so it has no revision: what
may have changed is made anew and told if it differs from what was told last.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from raddle.core.nodes import NodeTracker
from raddle.model import keys
from raddle.model.topology import node_of
from raddle.scheduler import inventory
from raddle.scheduler.replica import Replica
from raddle.scheduler.watches import Seen, Watches
from raddle.v1 import scheduler_pb2

#: Changes within it are told as one: a placement touches many nodes at once.
GATHER_S = 0.05
_BOOKMARK_S = 10.0
_PREFIXES = (keys.TOPOLOGY, keys.AGENTS, keys.HOLDS, keys.PLACEMENTS)
Message = scheduler_pb2.WatchNodesResponse


class NodeWatch:
    """One stream's picture of the nodes."""

    def __init__(self, replica: Replica, *, with_dies: bool) -> None:
        self._replica = replica
        self._mirror = replica.mirror
        self._with_dies = with_dies
        #: What the stream was told last of each node.
        self._told: dict[str, Message] = {}

    async def follow(self, watches: Watches) -> AsyncIterator[Message]:
        """All nodes, then what changed.

        Raises:
            TemporaryError: NOT_LEADER or NO_LEADER when this process leads no more.
            PermanentError: as `Watches.follow`.
        """
        kind = scheduler_pb2.WATCH_KIND_SNAPSHOT
        async for batch in watches.batches(_PREFIXES, GATHER_S, _BOOKMARK_S):
            self._replica.require_leader()
            revision = self._mirror.revision
            if batch is None:
                yield Message(kind=scheduler_pb2.WATCH_KIND_BOOKMARK, revision=revision)
                continue
            for message in self._changes(batch):
                message.kind = message.kind or kind
                message.revision = revision
                yield message
            if kind == scheduler_pb2.WATCH_KIND_SNAPSHOT:
                yield Message(kind=scheduler_pb2.WATCH_KIND_SYNCED, revision=revision)
                kind = scheduler_pb2.WATCH_KIND_CHANGED

    def _changes(self, batch: list[Seen]) -> list[Message]:
        """What is to be told, of deleted nodes with the kind."""
        names = inventory.node_names(self._mirror)
        tracker = self._replica.require_leader().nodes()
        suspects = dict.fromkeys(name for seen in batch for name in _touched(seen, names))
        suspects |= dict.fromkeys(n for n in names if not self._is_believed(n, tracker))
        wanted = [name for name in suspects if name in names]
        messages = []
        for status, dies in inventory.pictures(self._mirror, wanted, tracker):
            message = Message(node=status, dies=dies if self._with_dies else ())
            if self._told.get(status.node) != message:
                self._told[status.node] = message
                messages.append(Message(node=status, dies=message.dies))
        for name in [name for name in self._told if name not in names]:
            del self._told[name]
            gone = scheduler_pb2.NodeStatus(node=name)
            messages.append(Message(kind=scheduler_pb2.WATCH_KIND_DELETED, node=gone))
        return messages

    def _is_believed(self, name: str, tracker: NodeTracker | None) -> bool:
        """Was the stream told what the leader believes of the node now?"""
        told = self._told.get(name)
        if told is None:
            return False
        node = tracker.nodes.get(name) if tracker is not None else None
        if node is None:
            return True
        why = told.node.why
        return (told.node.state, why.reason, why.message) == (
            node.state,
            node.why.reason,
            node.why.message,
        )


def _touched(seen: Seen, names: Iterable[str]) -> list[str]:
    """Nodes whose status this record is part of."""
    if seen.key.startswith(keys.AGENTS):
        is_part = seen.key.endswith(("/registration", "/health"))
        return [keys.node_of_agent_key(seen.key)] if is_part else []
    if seen.key.startswith(keys.PLACEMENTS):
        placements = [p for p in (seen.value, seen.old) if p is not None]
        return [rank.node for p in placements for part in p.instances for rank in part.ranks]
    if seen.key.startswith(keys.HOLDS):
        subject = (seen.value or seen.old).subject
        node = node_of(subject)
        return [name for name in names if name == node or name.startswith(f"{subject}/")]
    return list(names)
