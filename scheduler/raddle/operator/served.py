"""Which resources of the whole cluster an operator serves: several releases may share it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from raddle.operator.cluster import Cluster

Object = dict[str, Any]


class Served:
    """SuperNodes by their names, and the Maintenances of what lies in them."""

    def __init__(self, cluster: Cluster, names: Collection[str] = ()) -> None:
        """Without names: all."""
        self._cluster = cluster
        self._names = frozenset(names)

    def has_supernode(self, resource: Mapping[str, Any]) -> bool:
        return self._has(resource["metadata"]["name"])

    def has_maintenance(self, resource: Mapping[str, Any]) -> bool:
        supernode, _, _ = resource["spec"]["subject"].partition("/")
        return self._has(supernode)

    async def maintenances(self) -> list[Object]:
        """Those that are served. Ids of drains are one scheduler's, and others have the same."""
        found = await self._cluster.find("Maintenance")
        return [resource for resource in found if self.has_maintenance(resource)]

    def _has(self, supernode: str) -> bool:
        return not self._names or supernode in self._names
