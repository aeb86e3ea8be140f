"""`raddle-agent`: the agent of one node, or of several simulated nodes in one process."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from raddle.agent.core.events import Event
from raddle.agent.engine.driver import EngineDriver
from raddle.agent.engine.kv_events.source import read_sources
from raddle.agent.engine.reference_driver import ReferenceDriver
from raddle.agent.engine.simulated import SimulatedDriver
from raddle.agent.health.simulated import SimulatedSource
from raddle.agent.leader_link import LeaderAddress, StatsStream
from raddle.agent.node import NodeAgent, NodeFacts, new_boot_id
from raddle.machines import load_machine
from raddle.model import keys
from raddle.model.errors import PermanentError, RaddleError, Reason
from raddle.model.topology import SuperNode
from raddle.store.etcd.connection import EtcdTls
from raddle.store.etcd.store import EtcdStore
from raddle.telemetry.logging import configure_logging
from raddle.telemetry.settings import load_settings, require, setting
from raddle.telemetry.tls import require_safe_listen, tls_files

if TYPE_CHECKING:
    from raddle.agent.engine.kv_events.subscriber import KvSubscriber

EXIT_REFUSED = 2
DRIVERS = ("reference", "simulated")
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of an agent; nothing is reloaded while it runs."""

    node: list[str] = setting([], "positions of the nodes to serve (sn0/n07), comma-separated")
    machine: str = setting("cloudmatrix384", "built-in machine or file that the nodes are part of")
    etcd: list[str] = setting([], "etcd endpoints, host:port, comma-separated")
    cluster: str = setting("default", "name of the cluster")
    state_dir: str = setting("", "folder for ranks' state and logs; ranks are found again in it")
    drivers: list[str] = setting(["simulated"], "engine drivers to offer: reference, simulated")
    rank_host: str = setting("127.0.0.1", "address that ranks listen on and are reached at")
    faults_dir: str = setting("", "folder of simulated faults: <node with - for />.json")
    kv_events: str = setting("", "YAML list of ZeroMQ publishers of KV events to follow")
    log_json: bool = setting(False, "JSON log lines even on a terminal")
    tls_ca: str = setting("", "CA of all members (PEM)")
    tls_certificate: str = setting("", "our certificate (PEM)")
    tls_key: str = setting("", "our key (PEM)")
    etcd_ca: str = setting("", "CA of etcd (PEM)")
    etcd_certificate: str = setting("", "our certificate for etcd (PEM)")
    etcd_key: str = setting("", "our key for etcd (PEM)")


def check(settings: Settings) -> SuperNode:
    """Refuse settings that cannot work.

    Raises:
        PermanentError: naming the setting.
    """
    require(
        [
            ("--node", settings.node),
            ("--etcd", settings.etcd),
            ("--state-dir", settings.state_dir),
        ]
    )
    for name in settings.drivers:
        if name not in DRIVERS:
            known = ", ".join(DRIVERS)
            raise PermanentError(
                Reason.INVALID_ARGUMENT, f"driver {name!r} is unknown; known are {known}."
            )
    read_sources(settings.kv_events)
    tls = tls_files(settings.tls_ca, settings.tls_certificate, settings.tls_key)
    require_safe_listen(f"{settings.rank_host}:0", tls)
    _etcd_tls(settings)
    supernode = load_machine(settings.machine)
    nodes = set(supernode.node_names())
    for node in settings.node:
        if node not in nodes:
            raise PermanentError(
                Reason.INVALID_ARGUMENT, f"{node} is no node of machine {settings.machine}."
            )
    return supernode


def _etcd_tls(settings: Settings) -> EtcdTls | None:
    names = (settings.etcd_ca, settings.etcd_certificate, settings.etcd_key)
    files = tls_files(*names, prefix="--etcd-")
    return EtcdTls(files.ca, files.certificate, files.key) if files else None


class AgentProcess:
    """All nodes of one process."""

    def __init__(self, settings: Settings, supernode: SuperNode) -> None:
        self._settings = settings
        self._supernode = supernode
        self._tls = tls_files(settings.tls_ca, settings.tls_certificate, settings.tls_key)
        self._stores: list[EtcdStore] = []
        self._subscribers: list[KvSubscriber] = []

    def _store(self, operation_key: str) -> EtcdStore:
        s = self._settings
        store = EtcdStore(s.etcd, s.cluster, operation_key=operation_key, tls=_etcd_tls(s))
        self._stores.append(store)
        return store

    def _agent(self, node: str, leader: LeaderAddress) -> NodeAgent:
        store = self._store(keys.agent_operation(node))
        faults = self._settings.faults_dir
        file = Path(faults) / f"{node.replace('/', '-')}.json" if faults else None
        stream = StatsStream(node, leader, self._tls)
        if node == self._settings.node[0]:
            self._follow_kv_events(stream)
        facts = NodeFacts(
            name=node,
            version=version("raddle"),
            host_memory_bytes=self._supernode.host_memory_bytes,
            boot_id=new_boot_id(),
        )

        def drivers(tell: Callable[[Event], None]) -> list[EngineDriver]:
            made: list[EngineDriver] = []
            if "simulated" in self._settings.drivers:
                made.append(SimulatedDriver(tell, stream.report))
            if "reference" in self._settings.drivers:
                folder = Path(self._settings.state_dir)
                reference = ReferenceDriver(
                    node, folder, tell, stream.report, host=self._settings.rank_host, tls=self._tls
                )
                stream.on_connect.append(reference.report_again)
                made.append(reference)
            return made

        source = SimulatedSource(node, self._supernode, store, file)
        return NodeAgent(facts, store, source, stream, drivers)

    def _follow_kv_events(self, stream: StatsStream) -> None:
        """Publishers that this process listens to report through its first node's stream."""
        for source in read_sources(self._settings.kv_events):
            from raddle.agent.engine.kv_events.subscriber import KvSubscriber

            subscriber = KvSubscriber(source, stream.report)
            stream.on_connect.append(subscriber.report_again)
            self._subscribers.append(subscriber)

    async def run(self, stop: asyncio.Event) -> None:
        """Until told to stop; real ranks run on."""
        leader = LeaderAddress(self._store(keys.agent_operation(self._settings.node[0])))
        agents = [self._agent(node, leader) for node in self._settings.node]
        tasks = [asyncio.create_task(agent.run()) for agent in agents]
        tasks.append(asyncio.create_task(leader.run()))
        tasks += [asyncio.create_task(subscriber.run()) for subscriber in self._subscribers]
        stopping = asyncio.create_task(stop.wait())
        log.info("agent runs", nodes=self._settings.node)
        try:
            await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for item in (stopping, *tasks):
                item.cancel()
            await asyncio.gather(stopping, *tasks, return_exceptions=True)
            for store in self._stores:
                await store.close()


async def serve(settings: Settings, supernode: SuperNode) -> None:
    """Run until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await AgentProcess(settings, supernode).run(stop)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    try:
        settings, only_check = load_settings(
            Settings, "raddle-agent", "The Raddle agent of one or more nodes.", argv
        )
        supernode = check(settings)
        if only_check:
            sys.stdout.write(msgspec.yaml.encode(asdict(settings)).decode())
            return
        configure_logging("agent", json_lines=settings.log_json or None)
        asyncio.run(serve(settings, supernode))
    except RaddleError as error:
        sys.stderr.write(f"raddle-agent: {error}\n")
        sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    main()
