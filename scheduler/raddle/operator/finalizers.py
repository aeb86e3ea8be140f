"""What keeps a resource until what it stands for has ended."""

from __future__ import annotations

from typing import Any

from raddle.operator.cluster import Cluster
from raddle.operator.names import FINALIZER

Object = dict[str, Any]


def is_held(resource: Object) -> bool:
    return FINALIZER in (resource["metadata"].get("finalizers") or [])


async def hold(cluster: Cluster, resource: Object) -> bool:
    """The resource must not go before what it stands for; False if it went already."""
    if is_held(resource):
        return True
    others = resource["metadata"].get("finalizers") or []
    return await _set(cluster, resource, [*others, FINALIZER])


async def let_go(cluster: Cluster, resource: Object) -> None:
    """Nothing of ours keeps the resource any more."""
    others = [name for name in resource["metadata"]["finalizers"] if name != FINALIZER]
    await _set(cluster, resource, others)


async def _set(cluster: Cluster, resource: Object, finalizers: list[str]) -> bool:
    metadata = resource["metadata"]
    version = metadata["resourceVersion"]
    change = {"metadata": {"finalizers": finalizers, "resourceVersion": version}}
    changed = await cluster.patch(resource, change)
    if changed is None:
        return False
    metadata["finalizers"] = finalizers
    metadata["resourceVersion"] = changed["metadata"]["resourceVersion"]
    return True
