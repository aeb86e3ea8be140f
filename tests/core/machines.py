"""Builders of machines and jobs for tests of the decision core."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from raddle.core.cluster import Cluster
from raddle.model.job import EngineSpec, JobSpec, ModelSpec, RecoverySpec, RoleSpec
from raddle.model.kinds import RoleKind
from raddle.model.topology import SuperNode

DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
}
TINY: dict[str, Any] = {
    "model_type": "tiny",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 256,
}
DENSE: dict[str, Any] = {
    "model_type": "dense",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 256,
}


def make_supernode(name: str = "sn0", **changes: Any) -> SuperNode:
    """A CloudMatrix384, or something smaller."""
    whole = SuperNode(
        name=name,
        machine="cloudmatrix384",
        nodes=48,
        npus_per_node=8,
        dies_per_npu=2,
        cpus_per_node=4,
        nodes_per_rack=4,
        compute_racks=12,
        communication_racks=4,
        ub_planes=7,
        switch_chips_per_node=7,
        die_memory_bytes=64_000_000_000,
        host_memory_bytes=3_000_000_000_000,
        die_to_die_bytes_per_s=196_000_000_000,
        die_to_host_bytes_per_s=151_000_000_000,
        node_network_bytes_per_s=50_000_000_000,
        bucket_bytes_per_s=2_500_000_000,
    )
    return replace(whole, **changes)


def make_cluster(*supernodes: SuperNode, drivers: tuple[str, ...] = ("simulated",)) -> Cluster:
    """All nodes ready."""
    cluster = Cluster(supernodes or (make_supernode(),))
    for node in cluster.node_names:
        cluster.set_node(node, ready=True, drivers=drivers, host_memory_bytes=0)
    return cluster


def make_role(name: str = "decode", **changes: Any) -> RoleSpec:
    role = RoleSpec(
        name=name,
        kind=RoleKind.DECODE,
        instances=1,
        ranks=16,
        tp=1,
        slots_per_rank=2,
        max_sequences_per_rank=8,
        engine=EngineSpec(driver="simulated"),
    )
    return replace(role, **changes)


def make_cache(name: str = "cache", **changes: Any) -> RoleSpec:
    plain = {"kind": RoleKind.CACHE, "slots_per_rank": 0, "ranks": 4, "dram_bytes": 1_000_000_000}
    return make_role(name, **{**plain, **changes})


def make_spec(
    *roles: RoleSpec, config: dict[str, Any] | None = None, recovery: RecoverySpec | None = None
) -> JobSpec:
    model = ModelSpec(
        name="model",
        config=json.dumps(config or TINY),
        weight_dtype="int8",
        kv_dtype="bf16",
        kv_block_tokens=16,
    )
    return JobSpec(
        namespace="default",
        name="job",
        queue="default",
        model=model,
        roles=roles or (make_role(),),
        recovery=recovery or RecoverySpec(),
    )
