"""An agent process whose nodes come from a file that changes."""

from __future__ import annotations

from pathlib import Path

from raddle.cli.cluster import LocalCluster
from raddle.cli.demo.client import get_text
from raddle.model import keys
from raddle.store.etcd.store import EtcdStore
from raddle.store.ports import free_port
from tests.e2e.served import SMALL_MACHINE


class Agent:
    """The process, its file and its probes, and what the store holds of its nodes."""

    def __init__(self, folder: Path) -> None:
        self.cluster = LocalCluster(folder, machine=SMALL_MACHINE)
        self.file = folder / "nodes"
        self._probes = f"127.0.0.1:{free_port()}"
        self._store: EtcdStore

    async def start(self) -> None:
        await self.cluster._start_etcd()
        self._store = EtcdStore([self.cluster.etcd_endpoints], "default", operation_key="o/test")
        flags = {
            "--nodes-file": str(self.file),
            "--machine": SMALL_MACHINE,
            "--etcd": self.cluster.etcd_endpoints,
            "--state-dir": str(self.cluster.folder / "state"),
            "--metrics-listen": self._probes,
        }
        pairs = [part for pair in flags.items() for part in pair]
        self.cluster.spawn("agent", "raddle.agent.main", *pairs)

    async def stop(self) -> None:
        await self._store.close()
        await self.cluster.stop()

    def write(self, text: str) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.replace(self.file)

    async def get(self, path: str) -> tuple[int, str]:
        try:
            return await get_text(self._probes, path)
        except OSError:
            return 0, ""

    async def reporting(self) -> dict[str, int]:
        """The nodes whose health is in the store, and since which revision."""
        records = (await self._store.list(keys.AGENTS)).records
        names = {keys.health(f"sn0/n{number:02d}"): f"n{number:02d}" for number in range(4)}
        return {names[r.key]: r.create_revision for r in records if r.key in names}

    async def until(self, nodes: set[str], status: int, sentence: str) -> dict[str, int]:
        """Wait until these nodes report and the probe of readiness says this."""

        async def reached() -> bool:
            found, text = await self.get("/ready")
            return found == status and sentence in text and set(await self.reporting()) == nodes

        await self.cluster.until(reached, f"{nodes} report, and the agent says {sentence!r}")
        return await self.reporting()


async def test_nodes_begin_and_end_with_the_file(tmp_path: Path) -> None:
    """Nodes that stay in the file are served without a break; a wrong file changes nothing."""
    agent = Agent(tmp_path)
    try:
        await agent.start()
        await agent.until(set(), 503, "is not there")
        assert (await agent.get("/live"))[0] == 200
        agent.write("sn0/n00,sn0/n01")
        before = await agent.until({"n00", "n01"}, 200, "ok")
        assert "raddle_agent_nodes 2.0" in (await agent.get("/metrics"))[1]
        agent.write("sn0/n02,sn0/n00")
        after = await agent.until({"n00", "n02"}, 200, "ok")
        assert after["n00"] == before["n00"]
        agent.write("sn0/n00,sn0/n77")
        assert await agent.until({"n00", "n02"}, 503, "sn0/n77 is no node") == after
        assert "raddle_agent_nodes_file_usable 0.0" in (await agent.get("/metrics"))[1]
        agent.file.unlink()
        await agent.until(set(), 503, "is not there")
    finally:
        await agent.stop()
