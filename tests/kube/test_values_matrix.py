"""Values installed together: an etcd of one's own over TLS, no operator, two pools of agents.

And what certificates do that are renewed while all of it runs.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import secrets
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools.kubernetes.box import wait_until
from tools.kubernetes.cluster import Cluster, CommandError
from tools.kubernetes.images import version

from raddle.cli.certificates.authority import Authority, Wanted
from tests.e2e.served import JOB
from tests.kube.release import PATIENCE_S, SCHEDULERS, Installation, Object, is_ready
from tests.kubernetes import made_namespace
from tests.support import ROOT, stopped

CHART = str(ROOT / "charts" / "raddle")
CLOSED = "INCIDENT_PHASE_CLOSED"
#: Of a CloudMatrix384, which has more nodes than these.
NODES = {"n1": ["sn0/n00", "sn0/n01"], "n2": ["sn0/n02"], "n3": ["sn0/n03"]}
POOLS = {"n1": "one", "n2": "other", "n3": "other"}


class Site(Installation):
    """A release `site` in a namespace of the test's own."""

    def apply(self, *items: Object) -> None:
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
        self.kubectl("apply", "-f", "-", stdin=text)

    def helm(self, action: str, *arguments: str, stdin: str = "") -> None:
        """Act on the release and wait until that is done."""
        where = ("--namespace", self.namespace, "--wait")
        self.cluster.helm(action, "site", *arguments, *where, stdin=stdin)

    def job(self) -> Object:
        found: Object = self.raddle("status", "small")["job"]
        return found

    def phases(self) -> list[str]:
        """Where each incident stands; empty while nobody can say it."""
        try:
            return [row["phase"] for row in self.raddle("incidents")["incidents"]]
        except CommandError:
            return []

    def is_recovered(self) -> bool:
        """Does the job serve at a later epoch than its first, with every incident closed?"""
        if set(self.phases()) != {CLOSED}:
            return False
        job = self.job()
        return bool(job["state"] == "JOB_STATE_READY" and int(job["epoch"]) >= 2)

    def restarts(self) -> dict[str, list[int]]:
        """How often each container of the release was started again, by the uid of its pod."""
        return {
            pod["metadata"]["uid"]: [c["restartCount"] for c in pod["status"]["containerStatuses"]]
            for pod in self.pods("app.kubernetes.io/name=raddle")
        }

    def shown_certificates(self) -> dict[str, bytes]:
        """What each scheduler shows to a new connection, by the uid of its pod."""
        return {
            pod["metadata"]["uid"]: _certificate(self.cluster, pod["status"]["podIP"])
            for pod in self.pods(SCHEDULERS)
        }

    def rank_processes(self, role: str) -> list[int]:
        """Ranks of a role among the processes of the agents' containers."""
        return [
            pid
            for pod in self.pods("app.kubernetes.io/component=agent")
            for pid in self.cluster.container_pids(self.namespace, pod["metadata"]["name"], "agent")
            if f"/{role}-" in _command(pid)
        ]


def _certificate(cluster: Cluster, address: str) -> bytes:
    """What a scheduler shows, whoever asks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with context.wrap_socket(cluster.connect(address, 7400)) as connection:
        return connection.getpeercert(binary_form=True) or b""


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()


@pytest.fixture(scope="module")
def site(cluster: Cluster) -> Iterator[Site]:
    """An etcd over TLS, and a release on it whose agents are in two pools."""
    with made_namespace(cluster, "site") as namespace:
        yield from _installed(Site(cluster, namespace))


def _installed(made: Site) -> Iterator[Site]:
    cluster, namespace = made.cluster, made.namespace
    for node, pool in POOLS.items():
        cluster.kubectl("label", "node", node, f"pool={pool}")
    _start_etcd(made)
    made.helm("install", CHART, "-f", "-", "--timeout=5m", stdin=json.dumps(_values(namespace)))
    yield made
    made.helm("uninstall")
    for node in POOLS:
        cluster.kubectl("label", "node", node, "pool-")


def _values(namespace: str) -> Object:
    pools = [{"name": pool, "nodeSelector": {"pool": pool}} for pool in sorted({*POOLS.values()})]
    external = {"endpoints": [f"our-etcd.{namespace}.svc:2379"], "tlsSecret": "our-etcd"}
    return {
        # The definitions would be this release's, and others could not bring theirs.
        "crds": {"enabled": False},
        "etcd": {"enabled": False, "external": external},
        "operator": {"enabled": False},
        "agent": {"nodes": NODES, "pools": pools},
    }


def _start_etcd(site: Site) -> None:
    """One member, whose authority is not Raddle's own."""
    host, now = f"our-etcd.{site.namespace}.svc", dt.datetime.now(dt.UTC)
    authority = Authority.create(now)
    pair = authority.issue(Wanted("etcd", (host,)), now, now + dt.timedelta(days=1))
    files = {
        "ca.crt": authority.pair().certificate.decode(),
        "tls.crt": pair.certificate.decode(),
        "tls.key": pair.key.decode(),
    }
    labels = {"app": "our-etcd"}
    flags = {
        "listen-client-urls": "https://0.0.0.0:2379",
        "advertise-client-urls": f"https://{host}:2379",
        "data-dir": "/data/etcd",
        "cert-file": "/tls/tls.crt",
        "key-file": "/tls/tls.key",
        "trusted-ca-file": "/tls/ca.crt",
        "client-cert-auth": "true",
    }
    mounts = [{"name": "tls", "mountPath": "/tls"}, {"name": "data", "mountPath": "/data"}]
    container = {
        "name": "etcd",
        "image": f"localhost/raddle-etcd:{version()}",
        "command": ["etcd", *(f"--{name}={value}" for name, value in flags.items())],
        "readinessProbe": {"tcpSocket": {"port": 2379}, "periodSeconds": 1},
        "volumeMounts": mounts,
    }
    volumes = [
        {"name": "tls", "secret": {"secretName": "our-etcd"}},
        {"name": "data", "emptyDir": {}},
    ]
    security = {"fsGroup": 65532}
    metadata = {"name": "our-etcd", "labels": labels}
    site.apply(
        {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": files},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"selector": labels, "ports": [{"port": 2379}]},
        },
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": {"containers": [container], "volumes": volumes, "securityContext": security},
        },
    )
    site.kubectl("wait", "--for=condition=Ready", "--timeout=60s", "pod/our-etcd")


def test_a_job_recovers_though_the_leaders_pod_is_deleted_meanwhile(site: Site) -> None:
    """Ranks are processes of the agents; the next leader goes on with what the last one began."""
    agents = site.pods("app.kubernetes.io/component=agent")
    pools = {
        pod["spec"]["nodeName"]: pod["metadata"]["labels"]["raddle.dev/pool"] for pod in agents
    }
    assert pools == POOLS
    site.raddle("submit", "/dev/stdin", "--wait", stdin=JOB)
    leader, (killed, silent, *_) = site.leader(), site.rank_processes("decode")
    with stopped(silent):
        # The recovery waits for the word of the silent rank.
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: bool(set(site.phases()) - {CLOSED}), "the recovery begins")
        site.kubectl("delete", "pod", leader, "--grace-period=0", "--force")
    wait_until(site.is_recovered, "the job recovers", PATIENCE_S)
    assert site.leader() != leader


def test_renewed_certificates_reach_what_runs(site: Site) -> None:
    """An upgrade renews them, and the CronJob: new connections show them, and nothing restarts."""
    wait_until(lambda: all(map(is_ready, site.pods(SCHEDULERS))), "all schedulers are ready")
    restarts, before = site.restarts(), site.shown_certificates()
    _renew(site, 400)
    _are_shown(site, before)
    before = site.shown_certificates()
    _renew(site, 500, "--no-hooks")
    assert site.shown_certificates() == before
    site.kubectl("create", "job", "--from=cronjob/site-renewal", "by-hand")
    site.kubectl("wait", "--for=condition=Complete", "job/by-hand", "--timeout=2m")
    _are_shown(site, before)
    assert restarts.items() <= site.restarts().items()
    assert site.job()["state"] == "JOB_STATE_READY"


def _renew(site: Site, days: int, *flags: str) -> None:
    """Ask for certificates that last so much longer that each of now has to be renewed."""
    longer = f"--set=certificates.days={days},certificates.renewBeforeDays={days - 1}"
    site.helm("upgrade", CHART, "--reuse-values", longer, *flags)


def _are_shown(site: Site, before: dict[str, bytes]) -> None:
    """Every scheduler shows another certificate than before to new connections."""
    # A kubelet looks after a changed pod at once, and after others within about a minute.
    site.kubectl("annotate", "pods", "--all", f"looked-after={secrets.token_hex(4)}", "--overwrite")

    def are_shown() -> bool:
        after = site.shown_certificates()
        return all(after[pod] != before[pod] for pod in before)

    wait_until(are_shown, "all schedulers show their new certificates", PATIENCE_S)
