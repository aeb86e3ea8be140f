"""Rank tables of HCCL, by which the ranks of a job on Ascend find each other.

In go the ranks of one instance, in order; out come the two forms that CANN reads: 1.2 (texts, by
server) and 2.0 (numbers, by rank). Field names are those of the files that MindCluster writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_COMPLETED = "completed"
_INITIALIZING = "initializing"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRank:
    """One rank and the device under it; texts that are not known yet are empty."""

    rank: int
    #: Position of the node and name of the supernode that the device is part of.
    node: str
    supernode: str
    host_ip: str
    pod_ip: str
    #: Number of the die on its node.
    device: int
    device_ip: str
    super_device_id: str


def _status(ranks: Sequence[TableRank]) -> str:
    """A table is complete when every rank can be reached."""
    return _COMPLETED if ranks and all(r.pod_ip and r.host_ip for r in ranks) else _INITIALIZING


def table_1_2(ranks: Sequence[TableRank]) -> dict[str, Any]:
    """The form of version 1.2: every value is a text."""
    by_node: dict[str, list[TableRank]] = {}
    for rank in ranks:
        by_node.setdefault(rank.node, []).append(rank)
    pods: dict[str, list[str]] = {}
    for members in by_node.values():
        pods.setdefault(members[0].supernode, []).append(members[0].host_ip)
    servers = [
        {
            "server_id": members[0].host_ip,
            "host_ip": members[0].host_ip,
            "container_ip": members[0].pod_ip,
            "device": [
                {
                    "device_id": str(rank.device),
                    "device_ip": rank.device_ip,
                    "super_device_id": rank.super_device_id,
                    "rank_id": str(rank.rank),
                }
                for rank in members
            ],
        }
        for members in by_node.values()
    ]
    return {
        "status": _status(ranks),
        "version": "1.2",
        "server_count": str(len(servers)),
        "server_list": servers,
        "super_pod_list": [
            {"super_pod_id": name, "server_list": [{"server_id": host} for host in hosts]}
            for name, hosts in pods.items()
        ],
    }


def table_2_0(ranks: Sequence[TableRank]) -> dict[str, Any]:
    """The form of version 2.0: ids are numbers, and a rank names its networks.

    The Unified Bus is one flat net of the whole supernode, so there is one level. Its addresses
    are learnt by the devices themselves from the topology file: agents report none.
    """
    local: dict[str, int] = {}
    listed = []
    for rank in ranks:
        number = local[rank.node] = local.get(rank.node, -1) + 1
        level = {
            "net_layer": 0,
            "net_instance_id": rank.supernode,
            "net_type": "TOPO_FILE_DESC",
            "net_attr": "",
            "rank_addr_list": [],
        }
        listed.append(
            {
                "rank_id": rank.rank,
                "local_id": number,
                "device_id": rank.device,
                "level_list": [level],
            }
        )
    return {
        "status": _status(ranks),
        "version": "2.0",
        "rank_count": len(listed),
        "rank_list": listed,
    }
