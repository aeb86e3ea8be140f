"""`raddle-operator`: serves the custom resources; of several, the holder of a Lease acts."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Gauge

from raddle.model.errors import PermanentError, RaddleError, Reason
from raddle.operator.cluster import Cluster
from raddle.operator.lease import Lease
from raddle.operator.machine import MachineOptions
from raddle.operator.operator import Operator, Options
from raddle.operator.pods import Site
from raddle.telemetry.logging import configure_logging
from raddle.telemetry.metrics import serve_metrics, turning
from raddle.telemetry.settings import load_settings, require, setting
from raddle.telemetry.tls import tls_files

EXIT_REFUSED = 2
#: What kopf says of running beside us.
_ON_PURPOSE = "running not in the main thread"
log = structlog.get_logger()
_RANKS = ("pods", "processes")


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of an operator; nothing is reloaded while it runs."""

    schedulers: list[str] = setting([], "addresses of the schedulers, comma-separated")
    namespace: str = setting("", "namespace of the release: its ConfigMaps, Secrets and Lease")
    namespaces: list[str] = setting(
        [], "namespaces whose InferenceJobs are served, comma-separated; * for all (default: ours)"
    )
    supernodes: list[str] = setting(
        [], "SuperNodes that are served, with their Maintenances, comma-separated (default: all)"
    )
    release: str = setting("raddle", "name of the release, with which the names of its parts begin")
    identity: str = setting("", "name of this replica (default: the host's name)")
    image: str = setting("", "image of ranks and front doors")
    image_pull_policy: str = setting("IfNotPresent", "when nodes pull it")
    image_pull_secrets: list[str] = setting([], "names of pull Secrets, comma-separated")
    ranks: str = setting("pods", "pods: a Pod for each rank; processes: agents start them")
    host_path: str = setting("/var/lib/raddle", "folder of the host that agents and ranks share")
    simulated: bool = setting(
        True, "share the machine's nodes out over Kubernetes nodes; else these have a label each"
    )
    node_selector: list[str] = setting(
        [], "labels of the Kubernetes nodes to share out over, key=value, comma-separated"
    )
    tolerated_taints: list[str] = setting(
        [],
        "taints that keep no work away, comma-separated: key or key:effect, * for all keys",
    )
    foreign_pods: bool = setting(False, "hold dies that the device plugin gave to Pods of others")
    supernode: str = setting(
        "", "YAML file with a SuperNode resource to apply: the machine of this release"
    )
    device_resource: str = setting("", "extended resource that a rank's Pod asks for one of")
    tls: bool = setting(True, "ranks and front doors show certificates, from the release's Secrets")
    metrics_listen: str = setting("", "address for metrics and /healthz, empty for none")
    log_json: bool = setting(False, "JSON log lines even on a terminal")
    tls_ca: str = setting("", "CA of all members (PEM)")
    tls_certificate: str = setting("", "our certificate (PEM)")
    tls_key: str = setting("", "our key (PEM)")
    kubeconfig: str = setting("", "kubeconfig file (default: the Pod's own account)")


def options(settings: Settings) -> Options:
    """Refuse settings that cannot work.

    Raises:
        PermanentError: naming the setting.
    """
    require([("--schedulers", settings.schedulers), ("--namespace", settings.namespace)])
    if settings.ranks not in _RANKS:
        raise PermanentError(
            Reason.INVALID_ARGUMENT, f"ranks {settings.ranks!r} is unknown; use pods or processes."
        )
    if settings.ranks == "pods":
        require([("--image", settings.image)])
    pairs = [text.partition("=") for text in settings.node_selector]
    for key, separator, _ in pairs:
        if not (key and separator):
            raise PermanentError(
                Reason.INVALID_ARGUMENT, "--node-selector wants key=value, comma-separated."
            )
    supernode = read_supernode(settings.supernode) if settings.supernode else None
    served = frozenset(settings.supernodes)
    if supernode is not None and served and supernode["metadata"]["name"] not in served:
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"supernode {settings.supernode} is of {supernode['metadata']['name']}, which is not"
            " among --supernodes.",
        )
    return Options(
        site=Site(
            release=settings.release,
            namespace=settings.namespace,
            image=settings.image,
            pull_policy=settings.image_pull_policy,
            pull_secrets=tuple(settings.image_pull_secrets),
            host_path=settings.host_path,
            schedulers=tuple(settings.schedulers),
            tls=settings.tls,
            device_resource=settings.device_resource,
        ),
        namespaces=tuple(settings.namespaces or [settings.namespace]),
        ranks_in_pods=settings.ranks == "pods",
        machine=MachineOptions(
            simulated=settings.simulated,
            node_selector={key: value for key, _, value in pairs},
            tolerated_taints=frozenset(settings.tolerated_taints),
            foreign_pods=settings.foreign_pods,
        ),
        kubeconfig=settings.kubeconfig,
        tls=tls_files(settings.tls_ca, settings.tls_certificate, settings.tls_key),
        supernodes=served,
        supernode=supernode,
    )


def read_supernode(path: str) -> dict[str, Any]:
    """The SuperNode resource in a file; what is in its spec is the API server's to judge.

    Raises:
        PermanentError: INVALID_ARGUMENT naming the file.
    """
    try:
        found = msgspec.yaml.decode(Path(path).read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise PermanentError(Reason.INVALID_ARGUMENT, f"supernode {path}: {error}.") from error
    if found.get("kind") != "SuperNode" or "name" not in (found.get("metadata") or {}):
        raise PermanentError(
            Reason.INVALID_ARGUMENT, f"supernode {path} holds no SuperNode resource with a name."
        )
    return found


class _ToOurLog(logging.Handler):
    """What libraries have to say, in the form of our own lines."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if _ON_PURPOSE not in text:
            log.log(record.levelno, text, library=record.name.partition(".")[0])


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    chosen = options(settings)
    cluster = await Cluster.connect(settings.kubeconfig)
    identity = settings.identity or socket.gethostname()
    lease = Lease(cluster, settings.namespace, f"{settings.release}-operator", identity)
    operator = Operator(cluster, chosen)
    stop_metrics = _serve_metrics(settings, lease, operator) if settings.metrics_listen else None
    try:
        await lease.lead(operator.run, stop)
    finally:
        if stop_metrics is not None:
            await asyncio.to_thread(stop_metrics)
        await cluster.close()


def _serve_metrics(settings: Settings, lease: Lease, operator: Operator) -> Any:
    registry, counts = CollectorRegistry(), operator.counts
    numbers = {
        "raddle_operator_leads": ("1 on the operator that acts.", lambda: float(lease.held)),
        "raddle_operator_work_done": (
            "Resources looked after so far.",
            lambda: counts.done,
        ),
        "raddle_operator_work_failed": ("Attempts to be repeated.", lambda: counts.failed),
    }
    for name, (text, read) in numbers.items():
        Gauge(name, text, registry=registry).set_function(read)
    alive = turning(asyncio.get_running_loop())
    return serve_metrics(settings.metrics_listen, registry, {"/healthz": alive})


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    try:
        settings, only_check = load_settings(
            Settings, "raddle-operator", "The Kubernetes operator of Raddle.", argv
        )
        options(settings)
        if only_check:
            sys.stdout.write(msgspec.yaml.encode(asdict(settings)).decode())
            return
        configure_logging("operator", json_lines=settings.log_json or None)
        logging.basicConfig(handlers=[_ToOurLog()], level=logging.WARNING, force=True)
        asyncio.run(serve(settings))
    except RaddleError as error:
        sys.stderr.write(f"raddle-operator: {error}\n")
        sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    main()
