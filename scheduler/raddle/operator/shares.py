"""Which Kubernetes node plays which nodes of the machine. Pure.

On a real machine a label of each says so, and a simulated one is shared out: equal shares, moved as
little as possible. A node of the machine has one agent at a time: it is taken from one Kubernetes
node first, and given to another one only when the scheduler hears its old agent no more. What has
work never moves, and neither does what a Kubernetes node that is only silent has: it may still run
there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

Shares = dict[str, tuple[str, ...]]


def labelled(
    now: Mapping[str, Collection[str]], labels: Mapping[str, str]
) -> tuple[Shares, dict[str, tuple[str, ...]]]:
    """Shares of a real machine, and its nodes that several Kubernetes nodes are labelled as.

    Of those several one plays the node: who does so now, else the first by name.

    Args:
        now: Kubernetes node -> nodes of the machine that it plays.
        labels: Kubernetes node -> the node that its label names.
    """
    hosts: dict[str, list[str]] = {}
    for host, node in sorted(labels.items()):
        hosts.setdefault(node, []).append(host)
    found: Shares = {}
    for node, several in hosts.items():
        chosen = next((host for host in several if node in now.get(host, ())), several[0])
        found[chosen] = (node,)
    return found, {node: tuple(several) for node, several in hosts.items() if len(several) > 1}


def shares(
    now: Mapping[str, Collection[str]],
    *,
    nodes: Collection[str],
    usable: Collection[str],
    present: Collection[str],
    busy: Collection[str],
    heard: Collection[str],
) -> Shares:
    """The next step towards equal shares; `now` itself when there is nothing to do.

    Args:
        now: Kubernetes node -> nodes of the machine that it plays.
        nodes: all nodes of the machine, in order.
        usable: Kubernetes nodes that may get more.
        present: Kubernetes nodes that exist, usable or not.
        busy: nodes with ranks on them.
        heard: nodes whose agents the scheduler hears.
    """
    known, free_to_give = dict.fromkeys(nodes), set(nodes)
    found: dict[str, list[str]] = {}
    for host in sorted(present):
        kept = [node for node in dict.fromkeys(now.get(host, ())) if node in free_to_give]
        free_to_give.difference_update(kept)
        found[host] = kept
    takers = sorted(host for host in usable if host in found)
    if takers:
        _take(found, takers, len(known), set(busy))
        _give(found, takers, [n for n in known if n in free_to_give and n not in set(heard)])
    order = {node: number for number, node in enumerate(known)}
    return {
        host: tuple(sorted(kept, key=order.__getitem__)) for host, kept in found.items() if kept
    }


def _take(found: dict[str, list[str]], takers: list[str], total: int, busy: set[str]) -> None:
    """Take idle nodes from those who have more than a fair share, if others have too few."""
    on_others = sum(len(kept) for host, kept in found.items() if host not in takers)
    least, rest = divmod(total - on_others, len(takers))
    if all(len(found[host]) >= least for host in takers):
        return
    for host in takers:
        fair = least + (1 if rest > 0 and len(found[host]) > least else 0)
        rest -= fair - least
        idle = [node for node in found[host] if node not in busy]
        for node in reversed(idle):
            if len(found[host]) <= fair:
                break
            found[host].remove(node)


def _give(found: dict[str, list[str]], takers: list[str], free: list[str]) -> None:
    """Deal each free node to whoever has fewest.

    Neighbours come to different Kubernetes nodes, so that a job that spreads over nodes of the
    machine outlives the loss of a Kubernetes node.
    """
    for node in free:
        host = min(takers, key=lambda h: (len(found[h]), h))
        found[host].append(node)
