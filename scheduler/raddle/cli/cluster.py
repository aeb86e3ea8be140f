"""A whole cluster on this machine: etcd, schedulers, agents, front doors, as our child processes.

Simulated nodes share agent processes; a node that runs real ranks has its own, so that it can be
lost alone. Everything that was started here, and the ranks that its agents started, ends with
`stop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from raddle.machines import load_machine
from raddle.model.errors import Reason, TemporaryError
from raddle.model.kinds import NodeState
from raddle.model.topology import SuperNode
from raddle.processes import fork_server
from raddle.processes.start import SERVER_VARIABLE, Command, Process, start
from raddle.store.embedded import QUOTA_BYTES, EmbeddedEtcd
from raddle.store.ports import free_port
from raddle.telemetry.channels import make_channel
from raddle.telemetry.tls import FRONT_DOOR, TlsFiles
from raddle.v1 import scheduler_pb2, scheduler_pb2_grpc, topology_pb2
from raddle.wire.codec import to_message

SIMULATED_AGENT_PROCESSES = 2
READY_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 5.0
_POLL_S = 0.05
_SCHEDULER = "raddle.scheduler.main"
_AGENT = "raddle.agent.main"
_FRONT_DOOR = "raddle.agent.engine.reference.frontdoor"
_RANK = "raddle.agent.engine.reference.rank"


@dataclass(slots=True)
class Child:
    """One process of ours."""

    name: str
    process: Process
    log: Path

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-600:]


@dataclass(slots=True)
class LocalCluster:
    """Describe it, then `await start()`."""

    folder: Path
    machine: str = "cloudmatrix384"
    real_nodes: int = 0
    schedulers: int = 1
    allow_fault_injection: bool = True
    listen_port: int = 0
    tell: Callable[[str], None] = lambda _: None
    #: Folder with `ca.crt` and a `.crt` and `.key` for each identity (`/` as `-`); empty: no TLS.
    certificates: Path | None = None
    etcd_members: int = 1
    etcd_quota_bytes: int = QUOTA_BYTES
    #: More flags for a daemon, by its name; the last of a kind counts.
    more_flags: Callable[[str], list[str]] = lambda _: []
    #: Fork all processes from one that has loaded their modules; else each starts anew.
    forks: bool = True
    etcds: list[EmbeddedEtcd] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    children: dict[str, Child] = field(default_factory=dict)
    _channel: grpc.aio.Channel | None = None
    _environment: dict[str, str] = field(default_factory=os.environ.copy)
    _at_end: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def supernode(self) -> SuperNode:
        return load_machine(self.machine)

    @property
    def stub(self) -> Any:
        assert self._channel is not None, "the cluster is not started"
        return scheduler_pb2_grpc.SchedulerStub(self._channel)

    def log_of(self, name: str) -> Path:
        """The log of one process; its folder is there."""
        folder = self.folder / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.log"

    def spawn(self, name: str, *command: str) -> Child:
        """Start one of our daemons with its log in the cluster's folder."""
        log = self.log_of(name)
        module, *arguments = [*command, *self.more_flags(name)]
        process = start(Command(module, tuple(arguments), log, self._environment))
        self.children[name] = Child(name, process, log)
        return self.children[name]

    async def start(self) -> None:
        """Start everything and wait until every node is ready.

        Raises:
            RaddleError: a part did not come up; the message has its last words.
        """
        self.tell(f"starting etcd, data and logs in {self.folder}")
        self._environment.pop(SERVER_VARIABLE, None)
        if self.forks:
            self._start_fork_server()
        await self._start_etcd()
        for number in range(self.schedulers):
            self.start_scheduler(number)
        self.tell(f"starting agents of {self.supernode.nodes} nodes ({self.real_nodes} real)")
        for node in self.real_node_names():
            self.start_real_agent(node)
        self._start_simulated_agents()
        await self.connect(0)
        await self._apply_machine()
        await self._wait_nodes()

    def _start_fork_server(self) -> None:
        modules = (_SCHEDULER, _AGENT, _FRONT_DOOR, _RANK)
        running = fork_server.running(modules, self.log_of("fork-server"))
        try:
            server = self._at_end.enter_context(running)
        except OSError as error:
            raise TemporaryError(Reason.ENGINE_FAILED, str(error)) from error
        self._environment[SERVER_VARIABLE] = server

    async def _start_etcd(self) -> None:
        if self.etcd_members == 1:
            self.etcds = [EmbeddedEtcd(self.folder / "etcd", quota_bytes=self.etcd_quota_bytes)]
        else:
            peers = {f"m{number}": free_port() for number in range(self.etcd_members)}
            self.etcds = [
                EmbeddedEtcd(self.folder / f"etcd-{name}", name=name, peers=peers, election_ms=500)
                for name in peers
            ]
        for member in self.etcds:
            member.launch()
        for member in self.etcds:
            await member.wait_ready()

    @property
    def etcd_endpoints(self) -> str:
        return ",".join(member.endpoint for member in self.etcds)

    def tls(self, identity: str) -> TlsFiles | None:
        """The files of one identity, if the cluster has certificates."""
        if self.certificates is None:
            return None
        folder, name = self.certificates, identity.replace("/", "-").replace("*", "all")
        return TlsFiles(folder / "ca.crt", folder / f"{name}.crt", folder / f"{name}.key")

    def _tls_flags(self, identity: str) -> list[str]:
        files = self.tls(identity)
        if files is None:
            return []
        flags = {"ca": files.ca, "certificate": files.certificate, "key": files.key}
        return [part for name, path in flags.items() for part in (f"--tls-{name}", str(path))]

    async def connect(self, number: int) -> None:
        """Talk to this scheduler from now on."""
        if self._channel is not None:
            await self._channel.close()
        identity = "client/admin"
        self._channel = make_channel(
            self.addresses[number], identity=identity, tls=self.tls(identity)
        )

    def start_scheduler(self, number: int) -> Child:
        port = self.listen_port if number == 0 and self.listen_port else free_port()
        address = f"127.0.0.1:{port}"
        if number < len(self.addresses):
            address = self.addresses[number]
        else:
            self.addresses.append(address)
        flags = ["--allow-fault-injection"] if self.allow_fault_injection else []
        flags += self._tls_flags("scheduler")
        return self.spawn(
            f"scheduler-{number}",
            _SCHEDULER,
            "--listen",
            address,
            "--etcd",
            self.etcd_endpoints,
            "--identity",
            f"scheduler-{number}",
            *flags,
        )

    def real_node_names(self) -> list[str]:
        return list(self.supernode.node_names())[: self.real_nodes]

    def _agent(self, name: str, nodes: list[str], driver: str) -> Child:
        identity = f"agent/{nodes[0]}" if len(nodes) == 1 else "agent/*"
        return self.spawn(
            name,
            _AGENT,
            "--node",
            ",".join(nodes),
            "--machine",
            self.machine,
            "--etcd",
            self.etcd_endpoints,
            "--state-dir",
            str(self.folder / "state" / name),
            "--drivers",
            driver,
            *self._tls_flags(identity),
        )

    def start_real_agent(self, node: str) -> Child:
        return self._agent(f"agent-{node.replace('/', '-')}", [node], "reference")

    def _start_simulated_agents(self) -> None:
        nodes = list(self.supernode.node_names())[self.real_nodes :]
        for number in range(min(SIMULATED_AGENT_PROCESSES, len(nodes))):
            share = nodes[number::SIMULATED_AGENT_PROCESSES]
            self._agent(f"agent-simulated-{number}", share, "simulated")

    async def _apply_machine(self) -> None:
        request = scheduler_pb2.ApplySuperNodeRequest(
            supernode=to_message(self.supernode, topology_pb2.SuperNode)
        )

        async def applied() -> bool:
            await self.stub.ApplySuperNode(request, timeout=5.0)
            return True

        await self.until(applied, "a scheduler leads and knows the machine")

    async def _wait_nodes(self) -> None:
        async def all_ready() -> bool:
            answer = await self.stub.ListNodes(scheduler_pb2.ListNodesRequest(), timeout=5.0)
            return all(node.state == NodeState.READY for node in answer.nodes)

        await self.until(all_ready, f"all {self.supernode.nodes} nodes are ready")

    async def until(
        self, condition: Callable[[], Awaitable[Any]], what: str, timeout_s: float = READY_TIMEOUT_S
    ) -> None:
        """Wait for a condition that may ask the cluster.

        Raises:
            TemporaryError: a child ended, or the time is over; says what was waited for.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        last = ""
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                if await condition():
                    return
            self.check_children()
            if loop.time() > deadline:
                raise TemporaryError(
                    Reason.DEADLINE_EXCEEDED,
                    f"not within {timeout_s:g} s: {what}{last}; logs are in {self.folder}/logs.",
                )
            await asyncio.sleep(_POLL_S)

    def check_children(self) -> None:
        """Raise TemporaryError if a child that should run has ended."""
        for child in self.children.values():
            code = child.process.poll()
            if code is not None:
                raise TemporaryError(
                    Reason.ENGINE_FAILED, f"{child.name} ended with {code}: {child.last_words()}"
                )

    def start_front_door(self, job: str, model: str) -> str:
        """Start a front door for a job; gives its address."""
        address = f"127.0.0.1:{free_port()}"
        self.spawn(
            "frontdoor",
            _FRONT_DOOR,
            "--schedulers",
            ",".join(self.addresses),
            "--job",
            job,
            "--model",
            model,
            "--listen",
            address,
            *self._tls_flags(FRONT_DOOR),
        )
        return address

    def rank_processes(self, node: str = "") -> dict[str, int]:
        """Incarnation -> process number of the real ranks of one node, or all."""
        where = f"agent-{node.replace('/', '-')}" if node else "agent-*"
        found = {}
        for path in (self.folder / "state").glob(f"{where}/ranks/*/*/*/rank.json"):
            with contextlib.suppress(OSError, ValueError):
                data = json.loads(path.read_text())
                if _is_running(data["pid"], data["start_time_ticks"]):
                    found[data["incarnation"]] = data["pid"]
        return found

    def kill_node(self, node: str) -> int:
        """SIGKILL a node's agent and all its ranks, as a power loss would; gives how many."""
        child = self.children.pop(f"agent-{node.replace('/', '-')}")
        ranks = self.rank_processes(node)
        child.process.kill()
        for pid in ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.process.wait()
        return len(ranks)

    async def stop(self) -> None:
        """End all children, then the ranks that their agents left."""
        if self._channel is not None:
            await self._channel.close()
        for child in self.children.values():
            child.process.terminate()
        for pid in self.rank_processes().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        for child in self.children.values():
            try:
                await asyncio.to_thread(child.process.wait, _STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        for pid in self.rank_processes().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with self._at_end:
            for member in self.etcds:
                await member.stop()


def _is_running(pid: int, start_time_ticks: int) -> bool:
    """The same process, not another one with its number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] != "Z" and int(fields[19]) == start_time_ticks
