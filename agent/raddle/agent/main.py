"""`raddle-agent`: the agent of one node, or of several simulated nodes in one process."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from raddle.agent.core.events import Event
from raddle.agent.engine.driver import EngineDriver
from raddle.agent.engine.kv_events.source import read_sources
from raddle.agent.engine.launcher import Launcher
from raddle.agent.engine.pod import PodLauncher
from raddle.agent.engine.process import ProcessLauncher
from raddle.agent.engine.reference.config import StepTimes
from raddle.agent.engine.reference_driver import ReferenceDriver
from raddle.agent.engine.simulated import SimulatedDriver
from raddle.agent.health.pod_resources import PodResources
from raddle.agent.health.simulated import SimulatedSource
from raddle.agent.leader_link import LeaderAddress, StatsStream
from raddle.agent.metrics import Metrics
from raddle.agent.node import NodeAgent, NodeFacts, new_boot_id
from raddle.agent.nodes_file import INTERVAL_S, NodesFile, check_nodes
from raddle.agent.served import Parts, ServedNodes
from raddle.machines import load_machine
from raddle.model import keys
from raddle.model.errors import PermanentError, RaddleError, Reason
from raddle.model.stats import RankStats
from raddle.model.topology import SuperNode
from raddle.store.etcd.store import EtcdStore
from raddle.telemetry.logging import configure_logging
from raddle.telemetry.metrics import serve_metrics, turning
from raddle.telemetry.settings import load_settings, require, setting
from raddle.telemetry.tls import TlsFiles, require_safe_listen, tls_files

if TYPE_CHECKING:
    from raddle.agent.engine.kv_events.subscriber import KvSubscriber

EXIT_REFUSED = 2
DRIVERS = ("reference", "simulated")
LAUNCHERS: dict[str, Callable[[float], Launcher]] = {
    "processes": ProcessLauncher,
    "pods": PodLauncher,
}
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of an agent; nothing is reloaded while it runs."""

    node: list[str] = setting([], "positions of the nodes to serve (sn0/n07), comma-separated")
    nodes_file: str = setting(
        "", "file with these positions instead; it may come later, and is followed as it changes"
    )
    machine: str = setting("cloudmatrix384", "built-in machine or file that the nodes are part of")
    host: str = setting(
        "", "name of this computer, if several nodes share it: they are one failure domain"
    )
    etcd: list[str] = setting([], "etcd endpoints, host:port, comma-separated")
    cluster: str = setting("default", "name of the cluster")
    state_dir: str = setting("", "folder for ranks' state and logs; ranks are found again in it")
    drivers: list[str] = setting(["simulated"], "engine drivers to offer: reference, simulated")
    ranks: str = setting(
        "processes",
        "who starts ranks: processes (this agent) or pods (somebody else, in the folders that the"
        " agent writes; it attaches to them)",
    )
    rank_start_timeout_s: float = setting(60.0, "how long a rank may take until it serves")
    step_deadline_s: float = setting(
        1.0, "how long reference ranks wait for a peer in a step; more where cores are few"
    )
    step_min_s: float = setting(
        0.0, "how long a step of reference ranks takes at least, as on a device"
    )
    rank_host: str = setting("127.0.0.1", "address that ranks listen on and are reached at")
    faults_dir: str = setting("", "folder of simulated faults: <node with - for />.json")
    pod_resources: str = setting(
        "", "kubelet's pod-resources socket, to hear which pods hold dies; empty: not asked"
    )
    device_resource: str = setting("", "extended resource whose devices are dies")
    kv_events: str = setting("", "YAML list of ZeroMQ publishers of KV events to follow")
    metrics_listen: str = setting(
        "", "address for Prometheus metrics, and for probes at /live and /ready; empty for none"
    )
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
            ("--node or --nodes-file", settings.node or settings.nodes_file),
            ("--etcd", settings.etcd),
            ("--state-dir", settings.state_dir),
        ]
    )
    if settings.node and settings.nodes_file:
        raise PermanentError(
            Reason.INVALID_ARGUMENT, "give --node or --nodes-file: one says which nodes to serve."
        )
    for name in settings.drivers:
        if name not in DRIVERS:
            known = ", ".join(DRIVERS)
            raise PermanentError(
                Reason.INVALID_ARGUMENT, f"driver {name!r} is unknown; known are {known}."
            )
    if settings.ranks not in LAUNCHERS:
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"--ranks {settings.ranks!r} is unknown; known are {', '.join(LAUNCHERS)}.",
        )
    if settings.pod_resources:
        require([("--device-resource", settings.device_resource)])
    read_sources(settings.kv_events)
    tls = tls_files(settings.tls_ca, settings.tls_certificate, settings.tls_key)
    require_safe_listen(f"{settings.rank_host}:0", tls)
    _etcd_tls(settings)
    supernode = load_machine(settings.machine)
    check_nodes(settings.node, set(supernode.node_names()), settings.machine)
    return supernode


def _etcd_tls(settings: Settings) -> TlsFiles | None:
    names = (settings.etcd_ca, settings.etcd_certificate, settings.etcd_key)
    return tls_files(*names, prefix="--etcd-")


class AgentProcess:
    """All nodes of one process."""

    def __init__(self, settings: Settings, supernode: SuperNode) -> None:
        self._settings = settings
        self._supernode = supernode
        self._tls = tls_files(settings.tls_ca, settings.tls_certificate, settings.tls_key)
        # It only reads.
        self._leader_store = self._store(f"{keys.OPERATIONS}agent")
        self._leader = LeaderAddress(self._leader_store)
        self._served = ServedNodes(self._parts)
        self._file: NodesFile | None = None
        if settings.nodes_file:
            known = set(supernode.node_names())
            self._file = NodesFile(Path(settings.nodes_file), known, settings.machine)
        self._subscribers: list[KvSubscriber] = []

    def _store(self, operation_key: str) -> EtcdStore:
        s = self._settings
        return EtcdStore(s.etcd, s.cluster, operation_key=operation_key, tls=_etcd_tls(s))

    def _parts(self, node: str) -> Parts:
        store = self._store(keys.agent_operation(node))
        faults = self._settings.faults_dir
        file = Path(faults) / f"{node.replace('/', '-')}.json" if faults else None
        stream = StatsStream(node, self._leader, self._tls)
        stream.on_connect.append(lambda: self._tell_kv_events_again(stream))
        facts = NodeFacts(
            name=node,
            version=version("raddle"),
            host_memory_bytes=self._supernode.host_memory_bytes,
            boot_id=new_boot_id(),
            host=self._settings.host,
        )
        source = SimulatedSource(node, self._supernode, store, file)
        drivers = partial(self._drivers, node, stream)
        s = self._settings
        kubelet = PodResources(s.pod_resources, s.device_resource) if s.pod_resources else None
        agent = NodeAgent(facts, store, source, stream, drivers, pod_resources=kubelet)
        return Parts(agent, stream, store)

    def _drivers(
        self, node: str, stream: StatsStream, tell: Callable[[Event], None]
    ) -> list[EngineDriver]:
        s = self._settings
        made: list[EngineDriver] = []
        if "simulated" in s.drivers:
            made.append(SimulatedDriver(tell, stream.report))
        if "reference" in s.drivers:
            launcher = LAUNCHERS[s.ranks](s.rank_start_timeout_s)
            folder = Path(s.state_dir)
            reference = ReferenceDriver(
                node,
                folder,
                tell,
                stream.report,
                launcher,
                host=s.rank_host,
                tls=self._tls,
                step=StepTimes(min_s=s.step_min_s, deadline_s=s.step_deadline_s),
            )
            stream.on_connect.append(reference.report_again)
            made.append(reference)
        return made

    # --- KV events: publishers report through the stream of the first node ----------------------

    def _follow_kv_events(self) -> list[asyncio.Task[None]]:
        for source in read_sources(self._settings.kv_events):
            from raddle.agent.engine.kv_events.subscriber import KvSubscriber

            self._subscribers.append(KvSubscriber(source, self._report_kv_events))
        return [asyncio.create_task(subscriber.run()) for subscriber in self._subscribers]

    def _report_kv_events(self, job_uid: str, stats: RankStats) -> None:
        stream = self._served.first_stream
        if stream is not None:
            stream.report(job_uid, stats)

    def _tell_kv_events_again(self, stream: StatsStream) -> None:
        if stream is self._served.first_stream:
            for subscriber in self._subscribers:
                subscriber.report_again()

    # --- which nodes ---------------------------------------------------------------------------

    async def _follow_file(self, file: NodesFile) -> None:
        while True:
            file.look()
            first = self._served.first_stream
            await self._served.serve(file.nodes)
            now = self._served.first_stream
            if now is not None and now is not first:
                self._tell_kv_events_again(now)
            await asyncio.sleep(INTERVAL_S)

    def unready(self) -> str:
        """Why not all that shall be served is served now; empty when it is."""
        if self._file is not None and self._file.trouble:
            return self._file.trouble
        silent = self._served.silent
        return f"health is not in the store yet: {', '.join(silent)}" if silent else ""

    def _serve_metrics(self) -> Callable[[], None]:
        if not self._settings.metrics_listen:
            return lambda: None
        probes = {"/live": turning(asyncio.get_running_loop()), "/ready": self.unready}
        metrics = Metrics()
        metrics.follow(self._served, self._file)
        return serve_metrics(self._settings.metrics_listen, metrics.registry, probes)

    async def run(self, stop: asyncio.Event) -> None:
        """Until told to stop; real ranks run on."""
        await self._served.serve(self._settings.node)
        tasks = [asyncio.create_task(self._leader.run()), *self._follow_kv_events()]
        if self._file is not None:
            tasks.append(asyncio.create_task(self._follow_file(self._file)))
        stopping = asyncio.create_task(stop.wait())
        parts: set[asyncio.Future[Any]] = {stopping, self._served.failed, *tasks}
        stop_metrics = self._serve_metrics()
        log.info("agent runs", nodes=self._served.nodes or self._settings.nodes_file)
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in (self._served.failed, *tasks):
                if part.done():
                    part.result()
        finally:
            for item in (stopping, *tasks):
                item.cancel()
            await asyncio.gather(stopping, *tasks, return_exceptions=True)
            stop_metrics()
            await self._served.close()
            await self._leader_store.close()


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
