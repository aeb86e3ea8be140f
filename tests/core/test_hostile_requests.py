"""Requests that are wrong in any way: a refusal with a reason, nothing staged, and life goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from raddle.core import requests
from raddle.core.handlers import INJECTIONS_A_NODE_MAX
from raddle.core.requests import DeleteJob, InjectFault, Request
from raddle.machines import load_machine
from raddle.model import keys
from raddle.model.errors import RaddleError, Reason
from raddle.model.health import FaultLevel
from raddle.model.topology import DIES_MAX
from raddle.models import config_text
from raddle.v1 import health_pb2, job_pb2, scheduler_pb2, topology_pb2
from raddle.wire import parse
from raddle.wire.codec import to_message
from tests.core.world import World, ready_world, submit

# --- messages as they come, and what the service makes of them ------------------------------------


def _submit(message: scheduler_pb2.SubmitJobRequest) -> Request:
    return requests.SubmitJob(
        spec=parse.job_spec(message.spec),
        job_uid="j-fuzz",
        spec_digest=parse.spec_digest(message.spec),
        idempotency_key=message.idempotency_key,
        dry_run=message.dry_run,
        managed_by=message.managed_by,
    )


def _update(message: scheduler_pb2.UpdateJobRequest) -> Request:
    return requests.UpdateJob(
        job_uid=message.job_uid,
        spec=parse.job_change(message.spec),
        update_mask=tuple(message.update_mask.paths),
        expected_generation=message.expected_generation,
        managed_by=message.managed_by,
    )


def _maintain(message: scheduler_pb2.CreateMaintenanceRequest) -> Request:
    return requests.CreateMaintenance(
        maintenance_id="m-fuzz",
        subject=message.subject,
        timeout_s=parse.duration_s("timeout", message.timeout) or 3600.0,
        message=message.message,
        dry_run=message.dry_run,
    )


def _apply(message: scheduler_pb2.ApplySuperNodeRequest) -> Request:
    return requests.ApplySuperNode(supernode=parse.supernode(message.supernode))


def _inject(message: scheduler_pb2.InjectFaultRequest) -> Request:
    levels = list(FaultLevel)
    level = levels[message.level] if 0 < message.level < len(levels) else FaultLevel.SUB_HEALTH
    return InjectFault(subject=message.subject, code=message.code, level=level, clear=message.clear)


def good_spec() -> job_pb2.JobSpec:
    text = """
name: other
model: {config: raddle-demo, kv_block_tokens: 16}
recovery: {max_pause: 5s}
roles:
  - {name: decode, kind: decode, ranks: 8, slots_per_rank: 8, engine: {driver: simulated}}
  - {name: cache, kind: cache, ranks: 2, dram_bytes: 1000000, engine: {driver: simulated}}
"""
    return parse.job_message(text, Path())


def good_messages(uid: str) -> list[tuple[Message, Callable[[Any], Request]]]:
    """One request of each kind that would be carried out."""
    update = scheduler_pb2.UpdateJobRequest(job_uid=uid, spec=good_spec())
    update.update_mask.paths.extend(["priority", "recovery.max_pause"])
    drain = scheduler_pb2.CreateMaintenanceRequest(subject="sn0/n03", message="new fans")
    drain.timeout.FromSeconds(60)
    supernode = to_message(load_machine("nvl72"), topology_pb2.SuperNode)
    supernode.name = "sn1"
    level = health_pb2.FAULT_LEVEL_RESTART_BUSINESS
    inject = scheduler_pb2.InjectFaultRequest(
        subject="sn0/n02/npu0/die0", code="80E18005", level=level
    )
    return [
        (scheduler_pb2.SubmitJobRequest(spec=good_spec(), idempotency_key="k"), _submit),
        (update, _update),
        (drain, _maintain),
        (scheduler_pb2.ApplySuperNodeRequest(supernode=supernode), _apply),
        (inject, _inject),
    ]


# --- mutations ------------------------------------------------------------------------------------

INT_BITS = {
    FieldDescriptor.CPPTYPE_INT32: 31,
    FieldDescriptor.CPPTYPE_INT64: 63,
    FieldDescriptor.CPPTYPE_ENUM: 31,
}
TEXTS = ["", "/", "..", "a\x1b[2J", "\n", "x" * 600, "sn0", "sn0/n99", "job/x", "\U0001f980", "Ä"]


def config_texts() -> st.SearchStrategy[str]:
    """Model configs: nested, huge, of other types."""
    names = sorted(json.loads(config_text("raddle-demo")))
    extreme: st.SearchStrategy[Any] = st.sampled_from(
        [None, True, -1, 0, 1, 10_000_000, 10**30, 1.5, "x", [], {}, [-1] * 9, [[0]], [None]]
    )
    mutated = st.dictionaries(st.sampled_from([*names, "mlp_only_layers"]), extreme, max_size=3)
    return st.one_of(
        mutated.map(lambda change: json.dumps(json.loads(config_text("raddle-demo")) | change)),
        st.sampled_from(["[" * 100_000, '{"a":' * 100_000, "{", "[]", "9" * 5_000, "NaN"]),
    )


def values(field: Any) -> st.SearchStrategy[Any]:
    if field.name == "config":
        return config_texts()
    bits = INT_BITS.get(field.cpp_type)
    if bits is not None:
        edges = [-(2**bits), -1, 0, 1, 2, 2**bits - 1, 2 ** (bits - 1)]
        return st.one_of(st.sampled_from(edges), st.integers(-1_000, 1_000))
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    return st.one_of(st.sampled_from(TEXTS), st.text(st.characters(codec="utf-8"), max_size=20))


def mutate(data: st.DataObject, message: Message) -> None:
    """Change one field somewhere inside the message."""
    fields = [f for f in message.DESCRIPTOR.fields if f.name != "env"]
    field = data.draw(st.sampled_from(fields), label="field")
    target = getattr(message, field.name)
    if field.message_type is not None and field.is_repeated:
        if target and data.draw(st.booleans(), label="inside"):
            mutate(data, data.draw(st.sampled_from(list(target)), label="which"))
        elif target and data.draw(st.booleans(), label="repeat"):
            target.extend([target[0]] * data.draw(st.integers(1, 20)))
        else:
            target.add()
    elif field.message_type is not None:
        target.SetInParent()
        mutate(data, target)
    elif field.is_repeated:
        target.append(data.draw(values(field), label="value"))
    else:
        setattr(message, field.name, data.draw(values(field), label="value"))


WORLDS: list[tuple[World, str]] = []


def shared_world() -> tuple[World, str]:
    """One world for all examples: it must live through them anyway."""
    if not WORLDS:
        world = ready_world()
        WORLDS.append((world, submit(world)))
    return WORLDS[0]


def tidy(world: World, before: dict[str, Any]) -> None:
    """Take back what an example was allowed to change."""
    if world.store != before:
        world.store, world.epochs = dict(before), {}
        world.new_leader()


def require_harmless(world: World, before: dict[str, Any], refused: RaddleError) -> None:
    assert len(refused.message) < 1_000, "a refusal quotes too much"
    assert world.store == before, "a refusal changed a record"
    assert world.machine.context.state.staged == 0


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_no_mutation_of_a_request_breaks_the_machine(data: st.DataObject) -> None:
    """Any request is carried out or refused with a reason; a refusal leaves every record alone."""
    world, uid = shared_world()
    world.settle()
    before = dict(world.store)
    good = good_messages(uid)
    message, into_request = good[data.draw(st.integers(0, len(good) - 1), label="kind")]
    for _ in range(data.draw(st.integers(1, 3), label="mutations")):
        mutate(data, message)
    try:
        parse.require_texts(message)
        world.ask(into_request(message))
    except RaddleError as error:
        require_harmless(world, before, error)
    else:
        world.settle()
        tidy(world, before)
    with pytest.raises(RaddleError) as caught:
        world.ask(DeleteJob(job_uid=uid))
    assert caught.value.reason is Reason.NOT_ENDED


# --- bounds ---------------------------------------------------------------------------------------


def refused(world: World, request: Request) -> Reason:
    with pytest.raises(RaddleError) as caught:
        world.ask(request)
    return caught.value.reason


def test_injected_faults_of_a_node_are_bounded(world: World) -> None:
    """A node takes 256 injected faults and codes of 64 characters; clearing makes room."""

    def fault(code: str, *, clear: bool = False) -> InjectFault:
        level = FaultLevel.SUB_HEALTH
        return InjectFault(subject="sn0/n00/npu0/die0", code=code, level=level, clear=clear)

    for number in range(INJECTIONS_A_NODE_MAX):
        world.ask(fault(f"{number}"))
    before = dict(world.store)
    assert refused(world, fault("one more")) is Reason.LIMIT_EXCEEDED
    assert refused(world, fault("x" * 65)) is Reason.INVALID_ARGUMENT
    assert world.store == before
    world.ask(fault("0", clear=True))
    world.ask(fault("one more"))


def test_all_supernodes_together_are_bounded(world: World) -> None:
    """A second supernode is refused if the cluster would have more dies than one may have."""
    message = to_message(load_machine("nvl72"), topology_pb2.SuperNode)
    message.name, message.nodes, message.compute_racks = "sn1", 9_000, 9_000
    message.nodes_per_rack, message.npus_per_node = 1, DIES_MAX // 9_000 // message.dies_per_npu
    huge = requests.ApplySuperNode(supernode=parse.supernode(message))
    message.name = "sn2"
    world.ask(huge)
    second = requests.ApplySuperNode(supernode=parse.supernode(message))
    assert refused(world, second) is Reason.LIMIT_EXCEEDED
    assert keys.supernode("sn2") not in world.store


@pytest.mark.parametrize("machine", ["a\x1b[31m\n", "x" * 3_000])
def test_a_machines_kind_is_a_short_printable_text(machine: str) -> None:
    """Control characters and long texts in a supernode's `machine` are refused by name."""
    message = to_message(load_machine("nvl72"), topology_pb2.SuperNode)
    message.machine = machine
    with pytest.raises(RaddleError, match="machine"):
        parse.supernode(message)


@pytest.mark.parametrize(
    ("place", "field"),
    [
        ("model: {config: raddle-demo, kv_block_tokens: 0}", "model.kv_block_tokens"),
        ("model: {config: raddle-demo, kvBlockTokens: 0}", "model.kvBlockTokens"),
        ("roles: [{name: d, kind: decode, ranks: 1}, {instances: 0}]", "roles[1].instances"),
        ("roles: [{tp: 0}]", "roles[0].tp"),
    ],
)
def test_a_written_zero_is_not_a_default(place: str, field: str) -> None:
    """A job file's 0, which a message would lose, is refused with its path."""
    with pytest.raises(RaddleError) as caught:
        parse.job_message(place, Path())
    assert caught.value.details["field"] == field


def test_a_role_without_kind_in_an_update_is_told() -> None:
    """What the codec does not know is a wrong argument, with the words that it knows."""
    message = job_pb2.JobSpec(roles=[job_pb2.RoleSpec(name="decode")])
    with pytest.raises(RaddleError, match="decode") as caught:
        parse.job_change(message)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
