"""The state of dies as Kubernetes' own tools show it: conditions and ConfigMaps. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from raddle.model.kinds import NodeState
from raddle.operator.names import to_key
from raddle.operator.reasons import OperatorReason, camel
from raddle.v1 import health_pb2, scheduler_pb2

CONDITION = "RaddleDiesHealthy"
_NAMED_DIES_MAX = 8
#: A ConfigMap takes 1 MiB; above so many dies only those that are not well are listed.
_LISTED_DIES_MAX = 4_096
Told = scheduler_pb2.WatchNodesResponse


def _level(die: scheduler_pb2.DieStatus) -> str:
    name = health_pb2.FaultLevel.Name(die.health).removeprefix("FAULT_LEVEL_")
    return "" if name == "UNSPECIFIED" else name


def node_condition(nodes: Sequence[Told]) -> dict[str, str]:
    """The condition of a Kubernetes node by the machine's nodes that it plays."""
    silent = [m.node.node for m in nodes if m.node.state != NodeState.READY]
    dies = [die for message in nodes for die in message.dies]
    faulty = [f"{die.die} {_level(die)}" for die in dies if die.health]
    held = [f"{die.die} {die.why.reason}" for die in dies if die.hold and not die.health]
    if faulty:
        return _condition(
            "False", OperatorReason.DIES_FAULTY, f"{len(faulty)} of {len(dies)} dies", faulty
        )
    if silent:
        return _condition("Unknown", OperatorReason.AGENT_SILENT, "no agent reports for", silent)
    if held:
        return _condition(
            "True", OperatorReason.DIES_HELD, f"{len(held)} of {len(dies)} dies are held", held
        )
    return _condition("True", OperatorReason.ALL_DIES_HEALTHY, f"all {len(dies)} dies are well", [])


def _condition(
    status: str, reason: OperatorReason, message: str, named: list[str]
) -> dict[str, str]:
    shown = ", ".join(named[:_NAMED_DIES_MAX])
    more = ", ..." if len(named) > _NAMED_DIES_MAX else ""
    text = f"{message}: {shown}{more}" if shown else message
    return {"type": CONDITION, "status": status, "reason": camel(reason), "message": text}


def stamped(condition: Mapping[str, str], before: Mapping[str, str] | None) -> dict[str, Any]:
    """The condition with its times."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    turned = before is None or before["status"] != condition["status"]
    times = {"lastHeartbeatTime": now} | ({"lastTransitionTime": now} if turned else {})
    return {**condition, **times}


def die_maps(nodes: Iterable[Told]) -> dict[str, dict[str, str]]:
    """Supernode -> (key of a node -> JSON of its dies)."""
    by_supernode: dict[str, list[Told]] = {}
    for message in nodes:
        by_supernode.setdefault(message.node.node.partition("/")[0], []).append(message)
    found = {}
    for supernode, told in by_supernode.items():
        total = sum(len(message.dies) for message in told)
        found[supernode] = {
            to_key(message.node.node): _node_text(message, only_unwell=total > _LISTED_DIES_MAX)
            for message in told
        }
    return found


def _node_text(message: Told, *, only_unwell: bool) -> str:
    dies = [_die(die) for die in message.dies]
    if only_unwell:
        dies = [die for die in dies if die["hold"] or die["health"]]
    return json.dumps({"state": message.node.state, "dies": dies})


def _die(die: scheduler_pb2.DieStatus) -> dict[str, Any]:
    return {
        "die": die.die,
        "hold": die.hold,
        "reason": die.why.reason,
        "health": _level(die),
        "faults": sorted({fault.code for fault in die.faults}),
        "job": die.job_uid,
    }
