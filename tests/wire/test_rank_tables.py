"""Rank tables of HCCL in both forms."""

from __future__ import annotations

from raddle.wire.rank_tables import TableRank, table_1_2, table_2_0


def make_table_rank(number: int, node: str = "sn0/n00", pod_ip: str = "10.1.0.1") -> TableRank:
    return TableRank(
        rank=number,
        node=node,
        supernode="sn0",
        host_ip=f"10.0.0.{int(node[-1])}",
        pod_ip=pod_ip,
        device=number % 2,
        device_ip=f"192.0.2.{number}",
        super_device_id=str(100 + number),
    )


RANKS = [
    make_table_rank(0),
    make_table_rank(1),
    make_table_rank(2, "sn0/n01"),
    make_table_rank(3, "sn0/n01"),
]


def test_version_1_2_lists_servers_and_their_supernode() -> None:
    """All values are texts."""
    assert table_1_2(RANKS[:1] + RANKS[2:3]) == {
        "status": "completed",
        "version": "1.2",
        "server_count": "2",
        "server_list": [
            {
                "server_id": "10.0.0.0",
                "host_ip": "10.0.0.0",
                "container_ip": "10.1.0.1",
                "device": [
                    {
                        "device_id": "0",
                        "device_ip": "192.0.2.0",
                        "super_device_id": "100",
                        "rank_id": "0",
                    }
                ],
            },
            {
                "server_id": "10.0.0.1",
                "host_ip": "10.0.0.1",
                "container_ip": "10.1.0.1",
                "device": [
                    {
                        "device_id": "0",
                        "device_ip": "192.0.2.2",
                        "super_device_id": "102",
                        "rank_id": "2",
                    }
                ],
            },
        ],
        "super_pod_list": [
            {
                "super_pod_id": "sn0",
                "server_list": [{"server_id": "10.0.0.0"}, {"server_id": "10.0.0.1"}],
            }
        ],
    }


def test_version_2_0_lists_ranks() -> None:
    """Ids are numbers; a local one counts the ranks of a node."""
    found = table_2_0(RANKS)
    assert (found["version"], found["rank_count"], found["status"]) == ("2.0", 4, "completed")
    assert [(r["rank_id"], r["local_id"], r["device_id"]) for r in found["rank_list"]] == [
        (0, 0, 0),
        (1, 1, 1),
        (2, 0, 0),
        (3, 1, 1),
    ]
    assert found["rank_list"][0]["level_list"][0]["net_instance_id"] == "sn0"


def test_a_table_is_complete_when_all_have_addresses() -> None:
    """Before that whoever reads it waits."""
    for table in (table_1_2, table_2_0):
        assert (
            table([make_table_rank(0), make_table_rank(1, pod_ip="")])["status"] == "initializing"
        )
        assert table([])["status"] == "initializing"
