"""Does a job fit this machine at all? A clear refusal names the field and the numbers.

In goes a spec, out comes the model's shape or a `PermanentError`; whether there is room *now* is
the queue's question, not asked here.
"""

from __future__ import annotations

from raddle.core.cluster import Cluster
from raddle.core.sizes import record_bytes, spec_bytes
from raddle.model.errors import PermanentError, Reason
from raddle.model.job import EngineSpec, JobSpec, ModelSpec, RoleSpec
from raddle.model.kinds import RecoveryKind, RoleKind
from raddle.model.llm import ModelShape, parse_config
from raddle.model.names import check_name
from raddle.model.types import DURATION_S_MAX

ROLES_MAX = 16
RANKS_MAX = 16_384
SLOTS_MAX = 1_024
INSTANCES_MAX = 1_024
KV_BLOCK_TOKENS_MAX = 4_096
TEXT_MAX = 1_024
# Every node's assignment carries the spec; the largest config.json known has 5 KB.
SPEC_BYTES_MAX = 64 * 1024
# The store takes 1.5 MB a transaction: this, an incident, and what a plan says of sequences.
JOB_BYTES_MAX = 900_000
# Buffers of dispatch and combine: about 645 MB a die (CloudMatrix384, section 4.2.1).
ENGINE_BUFFER_BYTES = 645_000_000
DRIVERS = ("reference", "simulated")
COUNTS_MAX = {
    "instances": INSTANCES_MAX,
    "ranks": RANKS_MAX,
    "slots_per_rank": SLOTS_MAX,
    "shared_expert_ranks": RANKS_MAX,
    "spares": RANKS_MAX,
    "spread_nodes": RANKS_MAX,
    "kv_replicas": 16,
    "max_sequences_per_rank": 1_000_000,
    "dram_bytes": 1 << 50,
}


def model_shape(model: ModelSpec) -> ModelShape:
    """The shape of a job's model."""
    return parse_config(model.config)


def check_spec(spec: JobSpec, cluster: Cluster) -> ModelShape:
    """Refuse a spec that can never run on this cluster.

    Raises:
        PermanentError: INVALID_NAME, INVALID_ARGUMENT, LIMIT_EXCEEDED or DOES_NOT_FIT.
    """
    check_name("namespace", spec.namespace)
    check_name("name", spec.name)
    check_name("queue", spec.queue)
    if not spec.model.config:
        raise _invalid("model.config", "is missing: give the model's config.json")
    shape = model_shape(spec.model)
    shape.expert_bytes(spec.model.weight_dtype)
    shape.kv_bytes_per_token(spec.model.kv_dtype)
    if not 1 <= spec.model.kv_block_tokens <= KV_BLOCK_TOKENS_MAX:
        raise _invalid("model.kv_block_tokens", f"must be between 1 and {KV_BLOCK_TOKENS_MAX}")
    for name in ("mtp_layers", "max_context_tokens"):
        if getattr(spec.model, name) < 0:
            raise _invalid(f"model.{name}", "must not be negative")
    _check_model_texts(spec.model)
    _check_recovery(spec)
    _check_roles(spec)
    for index, role in enumerate(spec.roles):
        _check_role(f"roles[{index}]", spec, role, shape)
        _check_fit(f"roles[{index}]", spec, role, shape, cluster)
    _check_fit_together(spec, cluster)
    _check_size(spec, shape)
    return shape


def _invalid(path: str, message: str) -> PermanentError:
    return PermanentError(Reason.INVALID_ARGUMENT, f"{path} {message}.", field=path)


def _unsupported(path: str, message: str) -> PermanentError:
    return PermanentError(
        Reason.ENGINE_UNSUPPORTED, f"{path} is not supported: {message}.", field=path
    )


def _unfit(path: str, message: str) -> PermanentError:
    return PermanentError(Reason.DOES_NOT_FIT, f"{path} {message}.", field=path)


def _check_model_texts(model: ModelSpec) -> None:
    for name in ("name", "revision", "weights_uri"):
        value = getattr(model, name)
        if len(value) > TEXT_MAX:
            raise PermanentError(
                Reason.LIMIT_EXCEEDED,
                f"model.{name} has {len(value)} characters; at most {TEXT_MAX} are allowed.",
                field=f"model.{name}",
            )
        if not value.isprintable():
            raise PermanentError(
                Reason.INVALID_NAME,
                f"model.{name} has control characters: use printable text.",
                field=f"model.{name}",
            )


def _check_size(spec: JobSpec, shape: ModelShape) -> None:
    """What cannot be stored is refused now, not when its turn has come."""
    size = spec_bytes(spec)
    if size > SPEC_BYTES_MAX:
        raise PermanentError(
            Reason.LIMIT_EXCEEDED,
            f"the spec takes {size} bytes; at most {SPEC_BYTES_MAX} are allowed: shorten"
            " model.config or the launch command's texts.",
            field="model.config",
        )
    size = record_bytes(spec, shape)
    if size > JOB_BYTES_MAX:
        raise PermanentError(
            Reason.LIMIT_EXCEEDED,
            f"placement and expert maps of the job take {size / 1e6:.1f} MB; at most"
            f" {JOB_BYTES_MAX / 1e6:.1f} MB can be committed at once: use fewer slots_per_rank, or"
            " several jobs.",
            field="roles",
        )


def _check_recovery(spec: JobSpec) -> None:
    known = {str(kind) for kind in RecoveryKind}
    for option in spec.recovery.allowed_options:
        if option not in known:
            raise _invalid(
                "recovery.allowed_options",
                f"{option[:40]!r} is unknown; known are {', '.join(sorted(known))}",
            )
    if not 0 <= spec.recovery.max_pause <= DURATION_S_MAX:
        raise _invalid("recovery.max_pause", f"must be between 0 and {DURATION_S_MAX} seconds")
    if spec.recovery.allow_masking:
        raise _unsupported("recovery.allow_masking", "every expert keeps a live copy: leave it out")


def _check_roles(spec: JobSpec) -> None:
    if not 1 <= len(spec.roles) <= ROLES_MAX:
        raise _invalid("roles", f"must be 1 to {ROLES_MAX} roles, not {len(spec.roles)}")
    names = [role.name for role in spec.roles]
    for index, name in enumerate(names):
        check_name(f"roles[{index}].name", name)
        if name in names[:index]:
            raise _invalid(f"roles[{index}].name", f"{name!r} is used twice")
    if all(role.kind is RoleKind.CACHE for role in spec.roles):
        raise _invalid("roles", "need at least one prefill or decode role")


def _check_role(path: str, spec: JobSpec, role: RoleSpec, shape: ModelShape) -> None:
    for name, most in COUNTS_MAX.items():
        value = getattr(role, name)
        least = 1 if name in ("instances", "ranks") else 0
        if value > most:
            raise PermanentError(
                Reason.LIMIT_EXCEEDED,
                f"{path}.{name} is {value}; at most {most} are allowed.",
                field=f"{path}.{name}",
            )
        if value < least:
            raise _invalid(f"{path}.{name}", f"is {value}; it must be at least {least}")
    if role.tp != 1:
        raise _invalid(f"{path}.tp", f"is {role.tp}; only 1 is supported: each rank takes one die")
    if role.engine.driver not in DRIVERS:
        raise _invalid(
            f"{path}.engine.driver",
            f"{role.engine.driver[:40]!r} is unknown; known are {', '.join(DRIVERS)}",
        )
    _check_engine(f"{path}.engine", role.engine)
    if role.kind is RoleKind.CACHE:
        if role.dram_bytes <= 0:
            raise _invalid(f"{path}.dram_bytes", "must be above 0 for a cache role")
        if role.slots_per_rank or role.spares:
            raise _invalid(path, "is a cache role: it has no slots_per_rank and no spares")
        return
    if role.kv_replicas:
        raise _invalid(f"{path}.kv_replicas", "belongs to a cache role")
    if shape.experts == 0 and role.slots_per_rank > 0:
        raise _invalid(
            f"{path}.slots_per_rank",
            f"asks for expert parallelism, but model {spec.model.name!r} has no experts",
        )
    if shape.experts == 0:
        return
    slots = (role.ranks - role.shared_expert_ranks) * role.slots_per_rank
    if role.shared_expert_ranks >= role.ranks or slots < shape.experts:
        ranks = role.ranks - role.shared_expert_ranks
        raise _unfit(
            f"{path}.slots_per_rank",
            f"is too small: {ranks} ranks x {role.slots_per_rank} slots ="
            f" {slots} slots cannot hold {shape.experts} experts",
        )


def _check_engine(path: str, engine: EngineSpec) -> None:
    """Both drivers start their own processes: what they would ignore is refused."""
    if engine.attach:
        raise _unsupported(f"{path}.attach", f"driver {engine.driver} starts its own ranks")
    launch = engine.launch
    if launch.command or launch.args or launch.env:
        raise _unsupported(f"{path}.launch", f"driver {engine.driver} knows its own command")


def _check_fit(
    path: str, spec: JobSpec, role: RoleSpec, shape: ModelShape, cluster: Cluster
) -> None:
    machines = list(cluster.supernodes.values())
    if not machines:
        raise _unfit(path, "has no machine: apply a supernode first (`raddle supernode FILE`)")
    if role.kind is RoleKind.CACHE:
        hosts = max(machine.nodes for machine in machines)
        memory = max(machine.host_memory_bytes for machine in machines)
        if role.ranks > hosts:
            raise _unfit(f"{path}.ranks", f"is {role.ranks}; the largest machine has {hosts} hosts")
        if role.dram_bytes > memory:
            raise _unfit(f"{path}.dram_bytes", f"is more than a host's {memory} bytes")
        return
    dies = max(machine.dies for machine in machines)
    if role.ranks + role.spares > dies:
        raise _unfit(
            f"{path}.ranks",
            f"needs {role.ranks + role.spares} dies in one supernode; the largest has {dies}",
        )
    dtype = spec.model.weight_dtype
    experts = role.slots_per_rank * shape.moe_layers * shape.expert_bytes(dtype)
    needed = experts + shape.other_bytes(dtype) + ENGINE_BUFFER_BYTES
    memory = max(machine.die_memory_bytes for machine in machines)
    if needed > memory:
        raise _unfit(
            f"{path}.slots_per_rank",
            f"needs {needed / 1e9:.1f} GB a die ({experts / 1e9:.1f} GB of experts); a die has"
            f" {memory / 1e9:.1f} GB: use more ranks or fewer slots",
        )


def _check_fit_together(spec: JobSpec, cluster: Cluster) -> None:
    """All instances of all roles at once, on the empty machine."""
    needed = sum(
        role.instances * (role.ranks + role.spares)
        for role in spec.roles
        if role.kind is not RoleKind.CACHE
    )
    if needed > cluster.dies:
        raise _unfit("roles", f"need {needed} dies together; the machine has {cluster.dies}")
    memory = sum(m.nodes * m.host_memory_bytes for m in cluster.supernodes.values())
    dram = sum(
        role.instances * role.ranks * role.dram_bytes
        for role in spec.roles
        if role.kind is RoleKind.CACHE
    )
    if dram > memory:
        raise _unfit("roles", f"need {dram} bytes of host memory together; there are {memory}")
