"""What the chart renders, as a real API server takes it."""

from __future__ import annotations

import json
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chart.rendering import CHART, MATRIX, NAMESPACE, RELEASE, render, rights, run
from tests.kubernetes import ApiServer
from tests.support import ROOT

#: Definitions of other projects, of whose kinds the chart renders resources.
OTHERS = Path(__file__).parent / "others"
Rights = dict[tuple[str, str], set[str]]


def verbs(text: str) -> set[str]:
    return set(text.split())


#: Of the operator, wherever it looks.
EVERYWHERE: Rights = {
    ("nodes", ""): verbs("list watch"),
    ("nodes/status", ""): verbs("patch"),
    ("supernodes.raddle.dev", ""): verbs("create get list watch"),
    ("supernodes.raddle.dev", "sn0"): verbs("patch"),
    ("supernodes.raddle.dev/status", ""): verbs("patch"),
    ("maintenances.raddle.dev", ""): verbs("get list patch watch"),
    ("maintenances.raddle.dev/status", ""): verbs("patch"),
}
#: And in the release's namespace, which is the jobs' by default.
OPERATOR: Rights = EVERYWHERE | {
    ("leases.coordination.k8s.io", ""): verbs("create"),
    ("leases.coordination.k8s.io", "raddle-operator"): verbs("get update"),
    ("inferencejobs.raddle.dev", ""): verbs("get list patch watch"),
    ("inferenceroles.raddle.dev", ""): verbs("create delete get list patch watch"),
    ("inferencejobs.raddle.dev/status", ""): verbs("patch"),
    ("inferenceroles.raddle.dev/status", ""): verbs("patch"),
    ("inferencejobs.raddle.dev/finalizers", ""): verbs("update"),
    ("inferenceroles.raddle.dev/finalizers", ""): verbs("update"),
    ("pods", ""): verbs("create delete list watch"),
    ("configmaps", ""): verbs("create delete get patch"),
    ("services", ""): verbs("create delete get patch"),
    ("deployments.apps", ""): verbs("create delete get patch"),
    ("events", ""): verbs("create"),
}
SECRETS = ("ca", "scheduler", "agent", "operator", "admin", "rank", "frontdoor", "etcd")
RENEWAL: Rights = {("secrets", f"raddle-tls-{name}"): verbs("get patch") for name in SECRETS}
CERTIFICATES: Rights = RENEWAL | {("secrets", ""): verbs("create")}


@pytest.fixture(scope="module")
def server(served_definitions: ApiServer) -> Iterator[ApiServer]:
    """With our definitions and those of others, and the namespaces that the matrix names."""
    for name in (NAMESPACE, "team-a"):
        served_definitions.make_namespace(name)
    served_definitions.kubectl("apply", "--server-side", "-f", str(OTHERS))
    served_definitions.kubectl("wait", "--for=condition=Established", "-f", str(OTHERS))
    yield served_definitions
    served_definitions.kubectl("delete", "-f", str(OTHERS))
    for name in (NAMESPACE, "team-a"):
        served_definitions.kubectl("delete", "namespace", name, "--wait=false")


def applied(server: ApiServer, documents: list[dict[str, Any]], *flags: str) -> str:
    """Apply as helm does: to the release's namespace what names none."""
    said = ""
    for namespace in (NAMESPACE, "team-a"):
        its = [d for d in documents if d["metadata"].get("namespace", NAMESPACE) == namespace]
        items = json.dumps({"apiVersion": "v1", "kind": "List", "items": its})
        command = ("apply", "--namespace", namespace, "--server-side", "-f", "-", *flags)
        said += server.kubectl(*command, stdin=items) if its else ""
    return said


@pytest.mark.parametrize("name", MATRIX)
def test_every_object_is_accepted(server: ApiServer, name: str) -> None:
    """No unknown field, no wrong type, no rule that the server would not take."""
    documents = render(MATRIX[name])
    said = applied(server, documents, "--dry-run=server", "--validate=strict")
    assert said.count("serverside-applied") == len(documents)


def upgraded(server: ApiServer) -> subprocess.CompletedProcess[str]:
    """What an upgrade of the release would render, after a look at the server."""
    how = ("--is-upgrade", "--dry-run=server", "--kubeconfig", str(server.kubeconfig))
    return run("template", RELEASE, str(CHART), "--namespace", NAMESPACE, *how)


def test_an_upgrade_waits_until_no_rank_would_refuse_it(server: ApiServer) -> None:
    """Ranks from before the identities `rank` and `frontdoor` refuse them: their jobs go first."""
    make = ("create", "secret", "generic", "--namespace", NAMESPACE, "--from-literal=tls.crt=x")
    job = (ROOT / "examples" / "job.yaml").read_text()
    assert upgraded(server).returncode == 0
    server.kubectl("apply", "--namespace", "team-a", "-f", "-", stdin=job)
    assert upgraded(server).returncode == 0
    server.kubectl(*make, "raddle-tls-agent")
    refused = upgraded(server)
    assert refused.returncode != 0
    assert "InferenceJob team-a/small runs" in refused.stderr
    patch = ("patch", "inferencejob", "small", "--namespace", "team-a", "--type=merge", "-p")
    server.kubectl(*patch, '{"spec": {"suspend": true}}')
    assert upgraded(server).returncode == 0
    server.kubectl(*patch, '{"spec": {"suspend": false}}')
    server.kubectl(*make, "raddle-tls-rank")
    assert upgraded(server).returncode == 0
    server.kubectl("delete", "secret", "--namespace", NAMESPACE, "--all")
    server.kubectl("delete", "inferencejob", "small", "--namespace", "team-a")


def rights_of(server: ApiServer, account: str, namespace: str) -> Rights:
    """What `kubectl auth can-i --list` says beyond what every account may."""
    who = f"--as=system:serviceaccount:{NAMESPACE}:{account}"
    group = f"--as-group=system:serviceaccounts:{NAMESPACE}"
    everybody = "--as-group=system:authenticated"
    said = server.kubectl(
        "auth", "can-i", "--list", "--no-headers", who, group, everybody, "-n", namespace
    )
    found: Rights = defaultdict(set)
    for line in said.splitlines():
        match = re.fullmatch(r"(\S*)\s+\[(.*?)\]\s+\[(.*?)\]\s+\[(.*?)\]\s*", line)
        assert match is not None, line
        resource, _, names, allowed = match.groups()
        if resource and not resource.startswith(("selfsubject", "podcertificate")):
            for name in names.split() or [""]:
                found[resource, name] |= set(allowed.split())
    return dict(found)


def test_each_account_has_the_rights_that_it_needs_and_no_other(server: ApiServer) -> None:
    """Schedulers, agents and etcd have none; the operator's are these; the hook makes Secrets.

    The CronJob that stays renews them, and makes none.
    """
    applied(server, rights({}, NAMESPACE))
    for account in ("raddle-scheduler", "raddle-agent", "raddle-etcd"):
        assert rights_of(server, account, NAMESPACE) == {}
    assert rights_of(server, "raddle-operator", NAMESPACE) == OPERATOR
    assert rights_of(server, "raddle-operator", "default") == EVERYWHERE
    assert rights_of(server, "raddle-certificates", NAMESPACE) == CERTIFICATES
    assert rights_of(server, "raddle-certificates", "default") == {}
    assert rights_of(server, "raddle-renewal", NAMESPACE) == RENEWAL
    assert rights_of(server, "raddle-renewal", "default") == {}
