"""The way from each scheduler to etcd: it can be long, or cut."""

from __future__ import annotations

from raddle.cli.cluster import LocalCluster
from tests.support import CuttingProxy


class Ways:
    """A proxy between each scheduler and etcd."""

    def __init__(self, schedulers: int, delay_s: float = 0.0) -> None:
        self.proxies = [CuttingProxy() for _ in range(schedulers)]
        self._delay_s = delay_s
        self._addresses: list[str] = []
        self.cluster: LocalCluster | None = None

    async def start(self) -> None:
        for proxy in self.proxies:
            proxy.delay_s = self._delay_s
            self._addresses.append(await proxy.start())

    async def stop(self) -> None:
        for proxy in self.proxies:
            await proxy.stop()

    def adopt(self, cluster: LocalCluster) -> None:
        self.cluster = cluster

    def flags(self, name: str) -> list[str]:
        """Flags of a scheduler: it reaches etcd through its proxy."""
        if not name.startswith("scheduler-"):
            return []
        assert self.cluster is not None
        number = int(name.rsplit("-", 1)[1])
        self.proxies[number].target = self.cluster.etcd_endpoints
        return ["--etcd", self._addresses[number]]
