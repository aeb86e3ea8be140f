"""Jobs in several namespaces, over TLS: an operator that the chart's rights let in there alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from tools.kubernetes.cluster import CommandError

from tests.operator.conftest import Stage
from tests.operator.resources import SITE, inference_job, role

pytestmark = pytest.mark.asyncio(loop_scope="module")
CERTIFICATES = (SITE.rank_secret, SITE.front_door_secret)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def teams(stage: Stage) -> AsyncIterator[list[str]]:
    """Namespaces that the operator serves; the release's own one, with its Secrets, is another."""
    found = [stage.jobs, f"{stage.jobs}-b"]
    await asyncio.to_thread(stage.api.make_namespace, found[1])
    for name in CERTIFICATES:
        await make_secret(stage, name, "first")
    await stage.end_operator()
    await stage.grant({"operator": {"namespaces": found}})
    stage.start_operator("teams", "--namespaces", ",".join(found), "--tls")
    yield found
    await stage.end_operator("teams")


async def make_secret(stage: Stage, name: str, text: str) -> None:
    """What the hook makes, in the release's namespace."""
    item = {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": {"name": name, "namespace": stage.space},
        "stringData": {"ca.crt": text, "tls.crt": f"{name} {text}", "tls.key": text},
    }
    await stage.kubectl("apply", "-f", "-", stdin=json.dumps(item))


async def apply_served(stage: Stage, space: str, name: str = "served", **more: Any) -> None:
    """A job whose ranks are Pods."""
    item = inference_job(name, role("decode", ranks=4, slotsPerRank=10), **more)
    item["metadata"]["namespace"] = space
    await stage.apply(item)


async def copied(stage: Stage, space: str) -> bool:
    """Has this namespace the certificates as they are now in the release's?"""
    for name in CERTIFICATES:
        copy = await stage.resource(f"{stage.space}.{name}", "Secret", space)
        source = await stage.resource(name, "Secret", stage.space)
        if [copy.get("data"), copy.get("type")] != [source["data"], source["type"]]:
            return False
    return True


async def test_jobs_of_two_namespaces_have_certificates_each(
    stage: Stage, teams: list[str]
) -> None:
    """Jobs of one name run beside each other; ranks and front door find their Secrets at home."""
    for space in teams:
        await apply_served(stage, space)
    for space in teams:

        async def runs(space: str = space) -> bool:
            pods = await stage.cluster.find("Pod", space, "raddle.dev/job=served")
            door = await stage.resource("served-frontdoor", "Deployment", space)
            return len(pods) == 4 and bool(door)

        await stage.until(runs, f"{space} has Pods and a front door")
        pods = await stage.cluster.find("Pod", space, "raddle.dev/job=served")
        door = await stage.resource("served-frontdoor", "Deployment", space)
        specs = [pod["spec"] for pod in pods] + [door["spec"]["template"]["spec"]]
        mounted = {v["secret"]["secretName"] for s in specs for v in s["volumes"] if "secret" in v}
        assert mounted == {f"{stage.space}.{name}" for name in CERTIFICATES}
        assert await copied(stage, space)


async def test_renewed_certificates_are_copied_anew(stage: Stage, teams: list[str]) -> None:
    """When a job is looked after the next time."""
    for name in CERTIFICATES:
        await make_secret(stage, name, "second")
    for space in teams:
        assert not await copied(stage, space)
        await apply_served(stage, space, priority=2)

        async def are_renewed(space: str = space) -> bool:
            return await copied(stage, space)

        await stage.until(are_renewed, f"{space} has the new certificates")


async def test_a_job_goes_alone(stage: Stage, teams: list[str]) -> None:
    """The one of the other namespace stays, and so do the copies, which others may use."""
    await stage.kubectl("delete", "-n", teams[0], "ij", "served")
    assert await stage.job("served") is None
    other = await stage.resource("served", space=teams[1])
    assert other["status"]["jobUid"]
    assert await copied(stage, teams[0])
    await stage.kubectl("delete", "-n", teams[1], "ij", "served")


async def test_a_namespace_that_is_not_served_is_none_of_its(
    stage: Stage, teams: list[str]
) -> None:
    """Neither does the operator look there, nor may it."""
    space = f"{stage.jobs}-c"
    await asyncio.to_thread(stage.api.make_namespace, space)
    await apply_served(stage, space, "apart")
    await apply_served(stage, teams[0], "apart")
    await stage.until_condition("apart", "Placed", "True")
    assert "status" not in await stage.resource("apart", space=space)
    who = f"--as=system:serviceaccount:{stage.space}:raddle-operator"
    copy = f"secrets/{stage.space}.raddle-tls-rank"
    for verb, kind in (("get", "inferencejobs"), ("create", "pods"), ("get", copy)):
        assert await stage.kubectl("auth", "can-i", verb, kind, who, "-n", teams[0]) == "yes\n"
        with pytest.raises(CommandError, match="no"):
            await stage.kubectl("auth", "can-i", verb, kind, who, "-n", space)
    with pytest.raises(CommandError, match="no"):
        await stage.kubectl("auth", "can-i", "get", "secrets", who, "-n", teams[0])
    await stage.kubectl("delete", "-n", teams[0], "ij", "apart")
