"""`raddle-scheduler`: one replica of the scheduler, leading or standing by."""

from __future__ import annotations

import asyncio
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

import grpc
import msgspec
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from raddle.core.expert_loads import LOOK_EVERY_S
from raddle.core.machine import Machine
from raddle.model.errors import PermanentError, RaddleError, Reason
from raddle.model.incident import LeaderRecord
from raddle.scheduler import kv_service
from raddle.scheduler.authorization import DEFAULT, LOOPBACK, Policy, load_policy
from raddle.scheduler.campaign import campaign
from raddle.scheduler.collector import calm_collector
from raddle.scheduler.interceptor import Interceptor
from raddle.scheduler.leader import Leader
from raddle.scheduler.metrics import Metrics
from raddle.scheduler.mirror import Mirror
from raddle.scheduler.probes import Prober
from raddle.scheduler.replica import Replica
from raddle.scheduler.router_service import RouterService
from raddle.scheduler.scheduler_service import SchedulerService
from raddle.scheduler.watches import Watches
from raddle.store.election import Election, Probe, Term
from raddle.store.etcd.store import EtcdStore
from raddle.store.protocol import Record
from raddle.telemetry.channels import OPTIONS, make_channel
from raddle.telemetry.logging import configure_logging
from raddle.telemetry.metrics import serve_metrics, turning
from raddle.telemetry.settings import load_settings, require, setting
from raddle.telemetry.tls import TlsFiles, require_safe_listen, tls_files
from raddle.v1 import router_pb2_grpc, scheduler_pb2_grpc
from raddle.wire import records as wire

SERVICE = "raddle.v1.Scheduler"
EXIT_REFUSED = 2
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of a scheduler; nothing is reloaded while it runs."""

    listen: str = setting("127.0.0.1:7400", "address to serve gRPC on; port 0 takes a free one")
    advertise: str = setting("", "address that others reach us at (default: the listen address)")
    etcd: list[str] = setting([], "etcd endpoints, host:port, comma-separated")
    cluster: str = setting("default", "name of the cluster: keys live under /raddle/<cluster>/")
    identity: str = setting("", "name of this replica (default: host name and a random part)")
    allow_fault_injection: bool = setting(False, "let `raddle inject` set faults")
    reflection: bool = setting(False, "serve gRPC reflection")
    rebalance_every_s: Annotated[float, msgspec.Meta(ge=0)] = setting(
        LOOK_EVERY_S, "seconds from one look at a job's expert loads to the next; 0: no rebalance"
    )
    policy: str = setting("", "YAML file with authorization rules")
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


@dataclass(frozen=True, slots=True)
class Files:
    """What the settings' files hold."""

    tls: TlsFiles | None
    etcd_tls: TlsFiles | None
    policy: Policy


def read_files(settings: Settings) -> Files:
    """Read all files that the settings name, and refuse settings that cannot work.

    Raises:
        PermanentError: naming the setting or the file.
    """
    require([("--etcd", settings.etcd)])
    tls = tls_files(settings.tls_ca, settings.tls_certificate, settings.tls_key)
    require_safe_listen(settings.listen, tls)
    if settings.policy:
        policy = load_policy(settings.policy)
    else:
        policy = LOOPBACK if tls is None else DEFAULT
    names = (settings.etcd_ca, settings.etcd_certificate, settings.etcd_key)
    etcd = tls_files(*names, prefix="--etcd-")
    return Files(tls, etcd, policy)


class SchedulerProcess:
    """All parts of one replica."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        files = read_files(settings)
        self.tls = files.tls
        identity = settings.identity or f"{socket.gethostname()}-{secrets.token_hex(3)}"
        self.store = EtcdStore(
            settings.etcd,
            settings.cluster,
            operation_key=f"operations/{identity}",
            tls=files.etcd_tls,
        )
        self.mirror = Mirror(self.store)
        self.replica = Replica(
            identity=identity,
            address=settings.advertise or settings.listen,
            version=version("raddle"),
            mirror=self.mirror,
            metrics=Metrics(),
            policy=files.policy,
            tls=self.tls,
            fault_injection=settings.allow_fault_injection,
        )
        self.replica.metrics.follow(self.mirror)
        self.watches = Watches(self.mirror)
        self.health = health.aio.HealthServicer()
        self._incarnation = secrets.token_hex(6)
        self._probe_channels: dict[str, grpc.aio.Channel] = {}
        self._had_connection: dict[str, bool] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until told to stop; then give the lead back."""
        server, interceptor = await self._serve()
        following = asyncio.create_task(self.mirror.run())
        leading = asyncio.create_task(self._campaign())
        measuring = asyncio.create_task(kv_service.follow_metrics(self.replica))
        stop_metrics = None
        if self.settings.metrics_listen:
            probes = {"/live": turning(asyncio.get_running_loop()), "/ready": self.unready}
            stop_metrics = serve_metrics(
                self.settings.metrics_listen, self.replica.metrics.registry, probes
            )
        stopping: asyncio.Task[Any] = asyncio.create_task(stop.wait())
        parts = {stopping, following, leading, measuring}
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in (following, leading, measuring):
                if part.done():
                    part.result()
        finally:
            for task in parts:
                task.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            if stop_metrics is not None:
                stop_metrics()
            self.watches.stop()
            await server.stop(grace=0.5)
            await interceptor.close()
            await self.store.close()

    def unready(self) -> str:
        """Why this replica cannot answer yet; empty when it can, leading or not."""
        return "" if self.mirror.revision else "the store has not been read yet"

    async def _serve(self) -> tuple[grpc.aio.Server, Interceptor]:
        interceptor = Interceptor(self.replica)
        server = grpc.aio.server(interceptors=(interceptor,), options=OPTIONS)
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(
            SchedulerService(self.replica, self.watches), server
        )
        router_pb2_grpc.add_RouterServicer_to_server(
            RouterService(self.replica, self.watches), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        if self.settings.reflection:
            from grpc_reflection.v1alpha import reflection

            names = (SERVICE, "raddle.v1.Router", reflection.SERVICE_NAME, health.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        listen = self.settings.listen
        if self.tls is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, self.tls.server_credentials())
        if listen.endswith(":0"):
            host = (self.settings.advertise or listen).rsplit(":", 1)[0]
            self.replica.address = f"{host}:{port}"
        await server.start()
        for name in ("", self._incarnation):
            await self.health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._leads(None)
        log.info("serving", address=self.replica.address, identity=self.replica.identity)
        return server, interceptor

    async def _campaign(self) -> None:
        self.replica.store_version = await self._store_version()
        record = LeaderRecord(
            identity=self.replica.identity,
            address=self.replica.address,
            version=self.replica.version,
            incarnation=self._incarnation,
        )
        election = Election(self.store, wire.encode("leader", record), self._probe)
        self.replica.store_trouble = lambda: election.trouble
        await campaign(self.store, self.mirror, election, self._leader, self._leads)

    def _leader(self, term: Term) -> Leader:
        calm_collector()
        make_machine = partial(Machine, rebalance_every_s=self.settings.rebalance_every_s)
        return Leader(
            self.store,
            self.mirror,
            term,
            Prober(self.tls),
            self.replica.metrics,
            make_machine=make_machine,
            decided=self.watches.decided,
        )

    async def _leads(self, leader: Leader | None) -> None:
        """What the process says of itself follows who leads in it."""
        self.replica.leader = leader
        self.replica.metrics.leader.set(1 if leader else 0)
        status = health_pb2.HealthCheckResponse
        await self.health.set(SERVICE, status.SERVING if leader else status.NOT_SERVING)

    async def _store_version(self) -> str:
        while True:
            try:
                return await self.store.server_version()
            except RaddleError as error:
                log.warning("waiting for etcd", why=str(error))
                await asyncio.sleep(0.5)

    async def _probe(self, record: Record) -> Probe:
        """Ask the leader's process for a sign of life."""
        try:
            leader: LeaderRecord = wire.decode("leader", record.value)
        except PermanentError as error:
            # One of a newer version leads; what else cannot be read is nobody.
            return Probe.ALIVE if error.reason is Reason.NEWER_SCHEMA else Probe.SILENT
        address = leader.address
        if address not in self._probe_channels:
            self._probe_channels[address] = make_channel(
                address, identity="scheduler", tls=self.tls
            )
        stub: Any = health_pb2_grpc.HealthStub(self._probe_channels[address])
        try:
            request = health_pb2.HealthCheckRequest(service=leader.incarnation)
            await stub.Check(request, timeout=0.5)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                # Another process listens there now: the leader's is gone.
                return Probe.GONE
            refused = error.code() is grpc.StatusCode.UNAVAILABLE and await _is_refused(address)
            return Probe.GONE if refused and self._had_connection.get(address) else Probe.SILENT
        self._had_connection[address] = True
        return Probe.ALIVE


async def _is_refused(address: str) -> bool:
    """Does the host answer that nobody listens there?"""
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), 0.5)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False


async def serve(settings: Settings) -> None:
    """Run one replica until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await SchedulerProcess(settings).run(stop)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    try:
        settings, only_check = load_settings(
            Settings, "raddle-scheduler", "One replica of the Raddle scheduler.", argv
        )
        if only_check:
            read_files(settings)
            sys.stdout.write(msgspec.yaml.encode(asdict(settings)).decode())
            return
        configure_logging("scheduler", json_lines=settings.log_json or None)
        asyncio.run(serve(settings))
    except RaddleError as error:
        sys.stderr.write(f"raddle-scheduler: {error}\n")
        sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    main()
