"""Several releases on one API server: each serves its own machine and leaves the others' alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from raddle.model.errors import PermanentError
from raddle.operator.main import Settings, options
from raddle.v1 import scheduler_pb2
from tests.operator.conftest import Stage
from tests.operator.test_machine import resource
from tests.operator.test_maintenances import maintenance

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_an_operator_leaves_other_machines_alone(stage: Stage) -> None:
    """It tells its scheduler nothing of them and writes nothing at their resources."""
    stage.kill_operator()
    await stage.apply(resource("SuperNode", "sn1", {"machine": "cloudmatrix384"}))
    await stage.apply(maintenance("theirs", "sn1/n00"))
    stage.start_operator("one", "--supernodes", "sn0")
    # Resources of a kind are looked after in the order in which they are told.
    await stage.apply(resource("SuperNode", "sn0", {"machine": "cloudmatrix384", "nodes": 99}))
    await stage.apply(maintenance("ours", "sn0/n00/npu0"))
    await stage.until_condition("sn0", "Applied", "False", of="SuperNode")
    await stage.until_condition("ours", "Drained", "True", of="Maintenance")
    theirs = [
        await stage.resource("sn1", "SuperNode", ""),
        await stage.resource("theirs", "Maintenance", ""),
    ]
    assert [item["metadata"].get("finalizers") for item in theirs] == [None, None]
    assert [item.get("status") for item in theirs] == [None, None]
    answer = await stage.call("ListNodes", scheduler_pb2.ListNodesRequest())
    assert {node.node.partition("/")[0] for node in answer.nodes} == {"sn0"}
    await stage.kubectl("delete", "mt", "ours", "theirs")
    await stage.kubectl("delete", "sn", "sn0", "sn1")


async def test_a_release_serves_its_own_machine(tmp_path: Path) -> None:
    """An operator that would not serve the SuperNode which it is given does not begin."""
    file = tmp_path / "supernode.yaml"
    file.write_text("kind: SuperNode\nmetadata: {name: sn0}\nspec: {machine: nvl72}\n")
    settings = Settings(
        schedulers=["a:1"],
        namespace="space",
        image="raddle",
        supernode=str(file),
        supernodes=["sn1"],
    )
    with pytest.raises(PermanentError, match=r"is of sn0, which is not among --supernodes"):
        options(settings)
