"""A cluster whose parts are hosts of their own: each has its own network, processes and mounts.

It stands for a cluster of containers, without one: a bridge on this machine is the network, each
scheduler, agent, front door and rank is process 1 behind an address of its own. Ranks are started
and deleted by `Deployer`, which knows what the API tells and nothing more, as an operator would.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from raddle.cli.cluster import Child, LocalCluster
from raddle.model.names import rank_folder
from raddle.model.types import RankKey
from raddle.store.embedded import EmbeddedEtcd
from raddle.v1 import scheduler_pb2

SCHEDULERS = "schedulers"
SCHEDULER_PORT = 7400
FRONT_DOOR_PORT = 8000
PROBE_PORT = 9464
Process = subprocess.Popen[bytes]


def tool(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


class Network:
    """A bridge with addresses 10.213.<part>.1 to .254; ours is the first."""

    def __init__(self, part: int) -> None:
        self.name = f"rdl{part}"
        self._prefix = f"10.213.{part}"
        self._last = 1
        self._links: dict[str, str] = {}

    @property
    def own_address(self) -> str:
        return f"{self._prefix}.1"

    def address(self) -> str:
        """A new address."""
        self._last += 1
        return f"{self._prefix}.{self._last}"

    def up(self) -> None:
        tool("ip", "link", "add", self.name, "type", "bridge")
        tool("ip", "addr", "add", f"{self.own_address}/24", "dev", self.name)
        tool("ip", "link", "set", self.name, "up")

    def down(self) -> None:
        # A host whose processes are gone stays while it has connections that nobody answers.
        for address in list(self._links):
            self.unplug(address)
        tool("ip", "link", "del", self.name)

    def start(self, address: str, script: str, log: Path) -> Process:
        """Run a shell script as process 1 of a host of its own, once its network is up."""
        command = ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*command, "sh", "-c", f"echo up; read _; {script}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        self._plug(process.pid, address)
        process.stdin.close()
        process.stdout.close()
        return process

    def _plug(self, pid: int, address: str) -> None:
        link = self._links[address] = f"{self.name}.{address.rpartition('.')[2]}"
        peer = ["peer", "name", "eth0", "netns", str(pid)]
        tool("ip", "link", "add", link, "type", "veth", *peer)
        tool("ip", "link", "set", link, "master", self.name, "up")
        inside = ["nsenter", "-t", str(pid), "-n", "ip"]
        tool(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
        tool(*inside, "link", "set", "lo", "up")
        tool(*inside, "link", "set", "eth0", "up")

    def unplug(self, address: str) -> None:
        """The host is there, and nobody hears of it any more."""
        link = self._links.pop(address, None)
        if link is not None:
            # The link is gone with its host by itself, some time after the host's last process.
            with contextlib.suppress(subprocess.CalledProcessError):
                tool("ip", "link", "del", link)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    made = Network(secrets.randbelow(250) + 1)
    made.up()
    try:
        yield made
    finally:
        made.down()


def process_one(process: Process) -> int:
    """The number, for us, of what is process 1 for itself."""
    pid = process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


class OpenEtcd(EmbeddedEtcd):
    """An etcd that other hosts reach."""

    host = ""

    @property
    def endpoint(self) -> str:
        return f"{self.host}:{self.client_port}"


@dataclass(slots=True, kw_only=True)
class Hosts(LocalCluster):
    """A cluster over a network."""

    network: Network
    hosts: dict[str, str] = field(default_factory=dict)

    def prepare(self) -> None:
        """Give the schedulers their addresses, and one name to both."""
        for number in range(self.schedulers):
            address = self.hosts[f"scheduler-{number}"] = self.network.address()
            self.addresses.append(f"{address}:{SCHEDULER_PORT}")
        rows = [f"{address} {SCHEDULERS}" for address in self.hosts.values()]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *rows, ""]))

    async def _start_etcd(self) -> None:
        member = OpenEtcd(self.folder / "etcd")
        member.host = self.network.own_address
        self.etcds = [member]
        await member.start()

    def spawn(self, name: str, *command: str) -> Child:
        address = self.hosts.setdefault(name, self.network.address())
        log = self.log_of(name)
        program = [sys.executable, "-m", *command, *self._flags(name, address)]
        script = f"mount --bind {self.folder}/hosts /etc/hosts; exec {shlex.join(program)}"
        process = self.network.start(address, script, log)
        self.children[name] = Child(name, process, log)
        return self.children[name]

    def _flags(self, name: str, address: str) -> list[str]:
        """The last flag of a kind counts."""
        probes = ["--metrics-listen", f"{address}:{PROBE_PORT}"]
        if name.startswith("scheduler-"):
            return probes
        if name == "frontdoor":
            names = ["--schedulers", f"dns:///{SCHEDULERS}:{SCHEDULER_PORT}"]
            return [*names, "--listen", f"{address}:{FRONT_DOOR_PORT}", "--allow-plain-http"]
        return [*probes, "--ranks", "pods", "--rank-start-timeout-s", "120"]

    def start_front_door(self, job: str, model: str) -> str:
        LocalCluster.start_front_door(self, job, model)
        return f"{self.hosts['frontdoor']}:{FRONT_DOOR_PORT}"

    async def stop(self) -> None:
        # No signal but this one passes to a process 1 of other namespaces.
        for child in self.children.values():
            child.process.kill()
        await LocalCluster.stop(self)

    def state_folder(self, node: str) -> Path:
        return self.folder / "state" / f"agent-{node.replace('/', '-')}"

    def cut_off(self, name: str, addresses: Iterable[str]) -> None:
        """No packet passes between this daemon and these hosts any more, and nobody is told."""
        self._filter(name, "--append", addresses)

    def mend(self, name: str, addresses: Iterable[str]) -> None:
        self._filter(name, "--delete", addresses)

    def _filter(self, name: str, change: str, addresses: Iterable[str]) -> None:
        inside = ["nsenter", "-t", str(self.children[name].process.pid), "-n", "iptables", "-w"]
        for address in addresses:
            tool(*inside, change, "INPUT", "-s", address, "-j", "DROP")
            tool(*inside, change, "OUTPUT", "-d", address, "-j", "DROP")

    def lose(self, name: str) -> None:
        """No packet leaves the host of this daemon, and then nothing runs on it."""
        child = self.children.pop(name)
        self.network.unplug(self.hosts.pop(name))
        child.process.kill()
        child.process.wait()


@dataclass(frozen=True, slots=True)
class Pod:
    """One start of one rank."""

    node: str
    address: str
    process: Process


class Deployer:
    """Pods of a job's placement: each start of a rank has one, and no other start has."""

    def __init__(self, cluster: Hosts, certificates: Path) -> None:
        self._cluster = cluster
        self._certificates = certificates
        self.pods: dict[str, Pod] = {}
        #: Nodes whose machine is gone: nobody starts or ends a pod there.
        self.lost: set[str] = set()

    async def run(self) -> None:
        while True:
            try:
                await self._follow()
            except (grpc.aio.AioRpcError, AssertionError):
                pass
            except asyncio.CancelledError:
                # Calls end so too when the cluster turns to another scheduler under them.
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
            await asyncio.sleep(0.1)  # the pause between two looks

    async def _follow(self) -> None:
        wanted = {folder: node async for folder, node in self._seats()}
        for folder in [folder for folder in self.pods if folder not in wanted]:
            if self.pods[folder].node not in self.lost:
                self.delete(self.pods.pop(folder))
        # A rank's volume is there once its agent has made it.
        due = {
            folder: (node, self._cluster.state_folder(node) / folder)
            for folder, node in wanted.items()
            if folder not in self.pods and node not in self.lost
        }
        due = {folder: what for folder, what in due.items() if what[1].is_dir()}
        starts = [asyncio.to_thread(self._start, *what) for what in due.values()]
        self.pods.update(zip(due, await asyncio.gather(*starts), strict=True))

    async def _seats(self) -> AsyncIterator[tuple[str, str]]:
        """Folder and node of each rank that shall run."""
        stub = self._cluster.stub
        for job in (await stub.ListJobs(scheduler_pb2.ListJobsRequest(), timeout=5.0)).jobs:
            request = scheduler_pb2.GetJobRequest(job_uid=job.uid)
            for part in (await stub.GetJob(request, timeout=5.0)).placement.instances:
                for seat in part.ranks:
                    if seat.start_count and seat.state == "ACTIVE":
                        key = RankKey(role=part.role, instance=part.instance, rank=seat.rank)
                        folder = rank_folder(seat.node, job.uid, key, seat.start_count)
                        yield folder, seat.node

    def _start(self, node: str, folder: Path) -> Pod:
        """A rank's host has its own address, and the ranks' certificate at another path."""
        address = self._cluster.network.address()
        environment = {
            "RADDLE_RANK_HOST": address,
            "RADDLE_TLS_CA": f"{self._certificates}/ca.crt",
            "RADDLE_TLS_CERTIFICATE": f"{self._certificates}/rank.crt",
            "RADDLE_TLS_KEY": f"{self._certificates}/rank.key",
        }
        places = " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())
        program = [sys.executable, "-m", "raddle.agent.engine.reference.rank", str(folder)]
        assert self._cluster.certificates is not None
        hide = f"mount -t tmpfs none {shlex.quote(str(self._cluster.certificates))}"
        script = f"{hide}; {places} exec {shlex.join(program)}"
        log = self._cluster.folder / "logs" / f"rank-{folder.name}.log"
        return Pod(node, address, self._cluster.network.start(address, script, log))

    def delete(self, pod: Pod) -> None:
        self._cluster.network.unplug(pod.address)
        pod.process.kill()
        pod.process.wait()

    def of(self, node: str) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod.node == node]

    def kill(self, folder: str, number: int) -> None:
        """Signal the rank itself, as something in its pod would."""
        os.kill(process_one(self.pods[folder].process), number)

    def lose(self, node: str) -> None:
        """The node's machine is gone: no packet leaves it, and nothing on it runs."""
        self.lost.add(node)
        pods = self.of(node)
        for pod in pods:
            self._cluster.network.unplug(pod.address)
        self._cluster.lose(f"agent-{node.replace('/', '-')}")
        for pod in pods:
            self.delete(pod)

    def close(self) -> None:
        for pod in self.pods.values():
            pod.process.kill()
            pod.process.wait()
