"""How large a job's records are, before they are written: upper bounds, in bytes.

A transaction of the store has a limit, so a job whose records could not be written in one is
refused when it is submitted, and decisions about many jobs are committed in several. The
constants are those of the wire format with the longest names that admission lets through;
a test holds real encodings against them.
"""

from __future__ import annotations

from dataclasses import dataclass

from raddle.core.kvcache.figures import KV_REPLICAS
from raddle.core.kvcache.slots import slots_for
from raddle.model.job import JobSpec, RoleSpec
from raddle.model.kinds import RoleKind
from raddle.model.llm import ModelShape

# Placement, member of the routes and assignment of one rank, the names in them aside.
_RANK_BYTES = 450
_RECORD_BYTES = 1_024
# Job, name, placement, maps (new and old), routes, incident, events.
_RECORDS = 10


@dataclass(frozen=True, slots=True)
class CommitSize:
    """What one decision about one job writes."""

    writes: int
    bytes: int


def spec_bytes(spec: JobSpec) -> int:
    """The spec's own texts and numbers."""
    model = spec.model
    texts = [model.config, model.name, model.revision, model.weights_uri, spec.namespace, spec.name]
    for role in spec.roles:
        launch = role.engine.launch
        texts += [role.name, launch.command, *launch.args]
        texts += [text for pair in launch.env for text in pair]
    return _RECORD_BYTES + sum(len(text.encode()) + 8 for text in texts) + 128 * len(spec.roles)


def _slots(role: RoleSpec, shape: ModelShape) -> int:
    return role.instances * role.ranks * role.slots_per_rank * shape.moe_layers


def record_bytes(spec: JobSpec, shape: ModelShape) -> int:
    """Job, placement, expert maps and routes of one epoch."""
    # A slot is a zigzag varint: seven bits a byte, one of them for the sign.
    slot_bytes = 1 if shape.experts <= 1 << 6 else 2
    layers = sum(role.instances for role in spec.roles) * shape.moe_layers
    maps = sum(_slots(role, shape) for role in spec.roles) * slot_bytes + 8 * layers
    ranks = sum(
        role.instances * (role.ranks + role.spares) * (_RANK_BYTES + 3 * len(role.name))
        for role in spec.roles
    )
    return spec_bytes(spec) + maps + ranks + _pool_bytes(spec) + _RECORDS * _RECORD_BYTES


def _pool_bytes(spec: JobSpec) -> int:
    """Slots of the pool's map, two bytes each, in the placement and in the routes."""
    caches = [role for role in spec.roles if role.kind is RoleKind.CACHE]
    members = sum(role.instances * role.ranks for role in caches)
    replicas = max((role.kv_replicas or KV_REPLICAS for role in caches), default=0)
    return 2 * 2 * slots_for(members) * replicas


def commit_size(spec: JobSpec, shape: ModelShape, nodes: int) -> CommitSize:
    """One epoch of a job on a machine of so many nodes."""
    ranks = sum(role.instances * (role.ranks + role.spares) for role in spec.roles)
    assigned = min(ranks, nodes)
    size = record_bytes(spec, shape) + assigned * (spec_bytes(spec) + _RECORD_BYTES)
    return CommitSize(_RECORDS + assigned, size)
