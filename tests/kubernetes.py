"""Fixtures for tests on Kubernetes: a whole cluster, or an API server alone.

Where a machine cannot have them, the tests that ask for them are skipped and say why; with
`RADDLE_KUBE=required` in the environment, as in CI, they fail instead.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tools.kubernetes import crds, servers
from tools.kubernetes.authority import Authority
from tools.kubernetes.box import bound_to_us, wait_until
from tools.kubernetes.cluster import Cluster, CommandError, run_command
from tools.kubernetes.images import cluster_archives
from tools.kubernetes.machine import built, missing_for_cluster, missing_servers

from raddle.store.ports import free_port
from tests.support import CuttingProxy

NODES = 3
#: Building images, starting a cluster and losing a node take longer than other tests may.
TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that use one of these fixtures carry the marker `kube` and may take longer."""
    for item in items:
        if {"machine_for_cluster", "api_server"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("kube")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TIMEOUT_S))


def demand(lacks: list[str]) -> None:
    """Skip the test that asks if something is missing; fail it where none may be skipped."""
    if not lacks:
        return
    if os.environ.get("RADDLE_KUBE") == "required":
        pytest.fail(" ".join(lacks), pytrace=False)
    pytest.skip(" ".join(lacks))


def demand_api_server() -> None:
    """This machine can run an API server alone."""
    demand(missing_servers("etcd", "kubernetes"))


@pytest.fixture(scope="session")
def machine_for_cluster() -> None:
    """This machine can run a cluster."""
    demand(missing_for_cluster())


@pytest.fixture(scope="session")
def archives(machine_for_cluster: None) -> list[Path]:
    """Archives with the images of this checkout, tagged with its version."""
    return cluster_archives()


@pytest.fixture(scope="session")
def cluster(archives: list[Path]) -> Iterator[Cluster]:
    """A cluster of three nodes with this checkout's images, shared by all tests of a session."""
    shared = Cluster(f"test-{os.getpid()}", bound=True)
    shared.up(NODES, archives)
    yield shared
    shared.down()


@contextmanager
def made_namespace(cluster: Cluster, wish: str) -> Iterator[str]:
    """A namespace with a name like this one for the time of a block."""
    name = f"{wish[:40].strip('-')}-{uuid.uuid4().hex[:6]}"
    cluster.kubectl("create", "namespace", name)
    wait_until(
        lambda: bool(cluster.get("serviceaccounts", "--namespace", name)["items"]),
        f"{name} has its default ServiceAccount",
    )
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own, deleted after it."""
    test = request.node.name.removeprefix("test_").lower()
    with made_namespace(cluster, re.sub("[^a-z0-9]+", "-", test)) as name:
        yield name


class Entrance(CuttingProxy):
    """A way from this machine's loopback to an address of a cluster."""

    def __init__(self, cluster: Cluster, target: str) -> None:
        super().__init__(target)
        self._cluster = cluster

    async def _connect(
        self, host: str, port: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        opened = await asyncio.to_thread(self._cluster.connect, host, port)
        return await asyncio.open_connection(sock=opened)


@pytest.fixture
async def forward(
    cluster: Cluster,
) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """`await forward("10.202.0.9:80")` is an address on loopback that leads to that one."""
    entrances: list[Entrance] = []

    async def open_entrance(target: str) -> str:
        entrances.append(Entrance(cluster, target))
        return await entrances[-1].start()

    yield open_entrance
    for entrance in entrances:
        await entrance.stop()


class ApiServer:
    """etcd and a Kubernetes API server on loopback, without nodes: objects are kept, nothing runs.

    Attributes:
        kubeconfig: the administrator's configuration for clients.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pki = folder / "pki"
        self._port, self._etcd_ports = free_port(), (free_port(), free_port())
        authority = Authority(self._pki)
        authority.key_pair("service-accounts")
        authority.issue("apiserver", "kube-apiserver", names=("localhost", "127.0.0.1"))
        authority.issue("admin", "admin", "system:masters")
        authority.issue("controller-manager", "system:kube-controller-manager")
        url = f"https://127.0.0.1:{self._port}"
        self.kubeconfig = authority.kubeconfig("admin", url)
        authority.kubeconfig("controller-manager", url)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start what does not run, and wait until the server answers."""
        data = self._folder / "etcd"
        etcd = servers.etcd(built("etcd") / "etcd", data, *self._etcd_ports)
        api = servers.api_server_alone(
            built("kubernetes"), self._pki, self._port, self._etcd_ports[0]
        )
        for name, command in (("etcd", etcd), ("api", api)):
            if name not in self._processes:
                self._spawn(name, command)
        wait_until(self._ready, f"the API server is ready ({self._folder}/api.log)")

    def start_controller(self, name: str, *flags: str) -> None:
        """Run one controller of the controller manager, under the controller's own account."""
        command = servers.controller_manager(built("kubernetes"), self._pki)
        self._spawn(name, [*command, f"--controllers={name}", "--secure-port=0", *flags])

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self._folder / f"{name}.log").open("a") as log:
            self._processes[name] = subprocess.Popen(
                bound_to_us(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill(self, name: str = "api") -> None:
        """Kill the API server (`api`), its store (`etcd`) or a controller; what is stored stays."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def make_namespace(self, name: str) -> None:
        """With the account that a controller would make, and without which no Pod is taken."""
        self.kubectl("create", "namespace", name)
        self.kubectl("create", "serviceaccount", "default", "--namespace", name)

    def account_kubeconfig(self, namespace: str, account: str) -> Path:
        """The configuration of a client with the rights of a ServiceAccount."""
        token = self.kubectl("create", "token", account, "-n", namespace, "--duration=24h")
        config = json.loads(self.kubeconfig.read_text())
        config["users"][0]["user"] = {"token": token.strip()}
        path = self._pki / f"{namespace}.{account}.kubeconfig"
        path.write_text(json.dumps(config))
        return path

    def forget(self) -> None:
        """Compact all history and start the server anew: watches from before now get a 410."""
        etcdctl = [
            str(built("etcd") / "etcdctl"),
            f"--endpoints=127.0.0.1:{self._etcd_ports[0]}",
        ]
        said = json.loads(run_command([*etcdctl, "endpoint", "status", "--write-out=json"]))
        run_command([*etcdctl, "compact", str(said[0]["Status"]["header"]["revision"])])
        self.kill("api")
        self.start()

    def stop(self) -> None:
        for name in tuple(self._processes):
            self.kill(name)

    def kubectl(self, *arguments: str, stdin: str = "") -> str:
        """Run kubectl as administrator and return its output.

        Raises:
            CommandError: with what it said.
        """
        options = [f"--kubeconfig={self.kubeconfig}", f"--cache-dir={self._folder}/cache"]
        return run_command([str(built("kubernetes") / "kubectl"), *options, *arguments], stdin)

    def _ready(self) -> bool:
        try:
            return self.kubectl("get", "--raw", "/readyz") == "ok"
        except CommandError:
            return False


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server alone, shared by all tests of a session; needs no root."""
    demand_api_server()
    server = ApiServer(tmp_path_factory.mktemp("api-server"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def served_definitions(api_server: ApiServer) -> ApiServer:
    """The API server with our definitions."""
    api_server.kubectl("apply", "--server-side", "-f", str(crds.FOLDER))
    names = [f"crd/{path.stem}.raddle.dev" for path in crds.FOLDER.glob("*.yaml")]
    api_server.kubectl("wait", "--for=condition=Established", *names)
    return api_server
