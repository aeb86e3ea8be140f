"""What the chart makes of values, row by row of the matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from raddle.machines import load_machine
from tests.chart.rendering import (
    MATRIX,
    NAMESPACE,
    PROMETHEUS,
    containers,
    environment,
    names,
    one,
    pods,
    render,
)

DEFAULT_WORKLOADS = {
    "Deployment/raddle-scheduler",
    "Deployment/raddle-operator",
    "DaemonSet/raddle-agent",
    "StatefulSet/raddle-etcd",
    "Job/raddle-certificates",
    "CronJob/raddle-renewal",
    "Pod/raddle-test",
}
#: They speak with the Kubernetes API.
WITH_TOKEN = {"Deployment/raddle-operator", "Job/raddle-certificates", "CronJob/raddle-renewal"}
#: Points of the restricted Pod Security standard that a pod does not meet, each with its reason:
#: agents share a folder of the host with ranks, and an init container makes it theirs.
DEVIATIONS = {"hostPath", "folder: root", "folder: CHOWN"}
#: Kubelet's socket, where it is wanted, is root's alone.
KUBELET_DEVIATIONS = {"kubelet: root"}


def test_the_default_release_has_all_parts() -> None:
    """Scheduler, operator, agents, etcd, certificates and a test, with images of one version."""
    documents = render({})
    assert {name for name, _ in pods(documents)} == DEFAULT_WORKLOADS
    images = {c["image"] for _, spec in pods(documents) for c in containers(spec)}
    assert {image.rpartition(":")[0] for image in images} == {
        "localhost/raddle",
        "localhost/raddle-agent",
        "localhost/raddle-etcd",
    }
    scheduler = one(documents, "Deployment", "raddle-scheduler")
    assert scheduler["spec"]["replicas"] == 3
    budget = one(documents, "PodDisruptionBudget", "raddle-scheduler")
    labels = scheduler["spec"]["template"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert one(documents, "Service", "raddle-scheduler-headless")["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize("name", MATRIX)
def test_services_policies_and_budgets_select_pods_of_the_release(name: str) -> None:
    """Every selector finds a pod, and every named port of a Service or policy is a port of it."""
    documents = render(MATRIX[name], PROMETHEUS)
    templates = [
        d["spec"]["template"]
        for d in documents
        if d["kind"] in ("Deployment", "StatefulSet", "DaemonSet")
    ]
    for document in documents:
        if document["kind"] != "Service":
            continue
        selector = document["spec"]["selector"].items()
        selected = [t for t in templates if selector <= t["metadata"]["labels"].items()]
        assert selected, document["metadata"]["name"]
        ports = {p["name"] for c in selected[0]["spec"]["containers"] for p in c["ports"]}
        assert {port["targetPort"] for port in document["spec"]["ports"]} <= ports
    for monitor in [d for d in documents if d["kind"] == "ServiceMonitor"]:
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        services = [
            d
            for d in documents
            if d["kind"] == "Service" and wanted <= d["metadata"]["labels"].items()
        ]
        assert len(services) == 1, monitor["metadata"]["name"]


@pytest.mark.parametrize("name", MATRIX)
def test_every_mounted_object_is_made_or_named(name: str) -> None:
    """ConfigMaps come from the release or the operator, Secrets from certificates or the values."""
    documents = render(MATRIX[name])
    made = set(names(documents, "ConfigMap"))
    if "raddle-operator" in names(documents, "Deployment"):
        made.add("raddle-nodes")
    secrets = {f"raddle-tls-{who}" for who in ("scheduler", "agent", "operator", "admin", "etcd")}
    secrets.add("our-etcd")
    for owner, spec in pods(documents):
        volumes = spec.get("volumes", [])
        for volume in volumes:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in made, owner
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets, owner
        mounted = {v["name"] for v in volumes}
        mounted |= {
            claim["metadata"]["name"]
            for d in documents
            if owner == f"{d['kind']}/{d['metadata']['name']}"
            for claim in d["spec"].get("volumeClaimTemplates", [])
        }
        used = {m["name"] for c in containers(spec) for m in c.get("volumeMounts", [])}
        assert used == mounted, owner


def _deviations(spec: dict[str, Any]) -> set[str]:
    """How a pod falls short of the restricted Pod Security standard."""
    found = set()
    for host in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(host):
            found.add(host)
    allowed = {"configMap", "secret", "emptyDir", "persistentVolumeClaim", "projected"}
    for volume in spec.get("volumes", []):
        found |= set(volume) - {"name"} - allowed
    pod = spec.get("securityContext", {})
    for container in containers(spec):
        own = container.get("securityContext", {})
        name = container["name"]
        if not own.get("runAsNonRoot", pod.get("runAsNonRoot")) or own.get("runAsUser") == 0:
            found.add(f"{name}: root")
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            found.add(f"{name}: escalation")
        if own.get("capabilities", {}).get("drop") != ["ALL"]:
            found.add(f"{name}: capabilities")
        found |= {f"{name}: {added}" for added in own.get("capabilities", {}).get("add", [])}
        profile = own.get("seccompProfile", pod.get("seccompProfile", {}))
        if profile.get("type") != "RuntimeDefault":
            found.add(f"{name}: seccomp")
    return found


@pytest.mark.parametrize("name", MATRIX)
def test_pods_meet_the_restricted_standard(name: str) -> None:
    """All but the agents', in named points; and all have requests and a read-only root."""
    asks_kubelet = MATRIX[name].get("devices", {}).get("podResources", False)
    of_agents = DEVIATIONS | (KUBELET_DEVIATIONS if asks_kubelet else set())
    for owner, spec in pods(render(MATRIX[name])):
        is_agent = owner.startswith("DaemonSet/")
        assert _deviations(spec) == (of_agents if is_agent else set()), owner
        for container in containers(spec):
            assert container["securityContext"]["readOnlyRootFilesystem"], owner
            assert {"cpu", "memory"} >= set(container["resources"]["requests"]) != set(), owner
        has_token = owner in WITH_TOKEN
        assert spec["automountServiceAccountToken"] is has_token, owner


def test_an_etcd_of_ones_own_is_reached_with_its_own_certificates() -> None:
    """Schedulers and agents get addresses and files; neither etcd nor its certificate is made."""
    documents = render(MATRIX["external etcd with TLS"])
    assert names(documents, "StatefulSet") == []
    for kind, name, prefix in (
        ("Deployment", "raddle-scheduler", "RADDLE_SCHEDULER"),
        ("DaemonSet", "raddle-agent", "RADDLE_AGENT"),
    ):
        variables = environment(one(documents, kind, name))
        assert variables[f"{prefix}_ETCD"] == "etcd-0.example:2379,10.0.0.8:2379"
        assert variables[f"{prefix}_ETCD_CA"] == "/etc/raddle/etcd/ca.crt"
        assert variables[f"{prefix}_TLS_CA"] == "/etc/raddle/tls/ca.crt"
        assert variables[f"{prefix}_CLUSTER"] == f"{NAMESPACE}-raddle"
    hook = one(documents, "Job", "raddle-certificates")
    (container,) = hook["spec"]["template"]["spec"]["containers"]
    assert not [word for word in container["command"] if "etcd" in word]
    plain = render(MATRIX["external etcd without TLS"])
    assert "RADDLE_SCHEDULER_ETCD_CA" not in environment(
        one(plain, "Deployment", "raddle-scheduler")
    )


def test_the_trial_etcd_lets_schedulers_and_agents_in_alone() -> None:
    """TLS with certificates of the two kinds of servers that have business there."""
    etcd = one(render({}), "StatefulSet", "raddle-etcd")
    (container,) = etcd["spec"]["template"]["spec"]["containers"]
    assert "--client-cert-auth" in container["command"]
    assert "--client-cert-allowed-hostname=raddle-scheduler,raddle-agent" in container["command"]
    (claim,) = etcd["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "8Gi"
    hook = one(render({}), "Job", "raddle-certificates")["spec"]["template"]["spec"]
    hosts = [w for w in hook["containers"][0]["command"] if w.startswith("--etcd-host=")]
    address = environment(one(render({}), "Deployment", "raddle-scheduler"))[
        "RADDLE_SCHEDULER_ETCD"
    ]
    assert f"--etcd-host={address.removesuffix(':2379')}" in hosts


def _required(agents: dict[str, Any]) -> Any:
    """What a Kubernetes node must be for an agent to go there."""
    affinity = agents["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    return affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]


def test_without_operator_nothing_of_it_is_left() -> None:
    """The chart itself says which nodes are which, and tells the scheduler of the machine."""
    documents = render(MATRIX["no operator"])
    assert "raddle-operator" not in names(documents, "Deployment")
    assert names(documents, "ClusterRole") == []
    nodes = one(documents, "ConfigMap", "raddle-given-nodes")["data"]
    assert nodes == {"worker-1": "sn0/n00,sn0/n01", "worker-2": "sn0/n02"}
    agents = one(documents, "DaemonSet", "raddle-agent")
    assert environment(agents)["RADDLE_AGENT_RANKS"] == "processes"
    # Others would wait for a share for ever.
    assert _required(agents) == [
        {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [name]}]}
        for name in nodes
    ]
    machine = one(documents, "Job", "raddle-supernode")["spec"]["template"]["spec"]
    assert machine["containers"][0]["command"][-2:] == [
        "supernode",
        "/etc/raddle/machine/machine.yaml",
    ]


def test_each_pool_is_a_daemon_set_of_its_own() -> None:
    """A pool's values go on top of the agent's; selectors do not overlap."""
    documents = render(MATRIX["two agent pools"])
    a = one(documents, "DaemonSet", "raddle-agent-a")["spec"]
    b = one(documents, "DaemonSet", "raddle-agent-b")["spec"]
    assert a["selector"]["matchLabels"] != b["selector"]["matchLabels"]
    assert a["template"]["spec"]["nodeSelector"] == {"kubernetes.io/os": "linux", "pool": "a"}
    assert b["template"]["spec"]["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert [t["key"] for t in a["template"]["spec"]["tolerations"]] == ["npu"]
    assert [t["key"] for t in b["template"]["spec"]["tolerations"]] == ["other"]
    assert environment({"spec": a})["RADDLE_AGENT_DRIVERS_EXTRA"] == "x"
    (container,) = b["template"]["spec"]["containers"]
    assert container["resources"]["requests"] == {"cpu": "2", "memory": "256Mi"}
    operator = environment(one(documents, "Deployment", "raddle-operator"))
    assert operator["RADDLE_OPERATOR_TOLERATED_TAINTS"] == "npu,other"


def test_the_operator_knows_what_agents_tolerate() -> None:
    """A toleration without a key is one of all keys, and its effect counts."""
    tolerations = [
        {"key": "npu", "operator": "Exists", "effect": "NoSchedule"},
        {"operator": "Exists", "effect": "NoExecute"},
    ]
    for given, expected in (
        (tolerations, "npu:NoSchedule,*:NoExecute"),
        ([{"operator": "Exists"}], "*"),
    ):
        documents = render({"agent": {"tolerations": given}})
        operator = environment(one(documents, "Deployment", "raddle-operator"))
        assert operator["RADDLE_OPERATOR_TOLERATED_TAINTS"] == expected


def test_certificates_of_a_release_that_nobody_upgrades_are_renewed() -> None:
    """By the hook's command, at another time and under another account."""
    documents = render({})
    renewal = one(documents, "CronJob", "raddle-renewal")["spec"]
    pod = renewal["jobTemplate"]["spec"]["template"]["spec"]
    hook = one(documents, "Job", "raddle-certificates")["spec"]["template"]["spec"]
    assert renewal["schedule"] == "30 3 * * 0"
    assert pod == hook | {"serviceAccountName": "raddle-renewal"}
    assert names(render({"certificates": {"renewalSchedule": ""}}), "CronJob") == []


def test_cert_manager_makes_the_same_certificates_as_the_hook() -> None:
    """The same Secrets for the same identities, and no hook."""
    from raddle.cli.certificates.secrets import IDENTITIES, wanted_secrets

    documents = render(MATRIX["cert-manager"])
    assert "raddle-certificates" not in names(documents, "Job")
    assert names(documents, "CronJob") == []
    made = {
        d["spec"]["secretName"]: (d["spec"]["commonName"], set(d["spec"].get("dnsNames", [])))
        for d in documents
        if d["kind"] == "Certificate" and not d["spec"].get("isCA")
    }
    hosts = ("raddle-etcd", f"raddle-etcd.{NAMESPACE}", f"raddle-etcd.{NAMESPACE}.svc")
    wants = {
        what.identity: {name for name in what.names if name != "127.0.0.1"}
        for what in wanted_secrets((*hosts, f"{hosts[-1]}.cluster.local"))
    }
    assert made == {f"raddle-tls-{who}": (cn, wants[cn]) for who, cn in IDENTITIES.items()}
    theirs = render(MATRIX["cert-manager with an issuer"])
    assert names(theirs, "Issuer") == []
    assert {d["spec"]["issuerRef"]["name"] for d in theirs if d["kind"] == "Certificate"} == {
        "ours"
    }


def test_digests_registries_and_pull_secrets_reach_every_image() -> None:
    """Of all containers, hooks too, and of the ranks that the operator makes."""
    digests = {c["image"] for _, spec in pods(render(MATRIX["digests"])) for c in containers(spec)}
    assert digests == {
        "localhost/raddle@sha256:" + "a" * 64,
        "localhost/raddle-agent@sha256:" + "b" * 64,
        "localhost/raddle-etcd@sha256:" + "c" * 64,
    }
    documents = render(MATRIX["registry and pull secrets"])
    for owner, spec in pods(documents):
        assert spec["imagePullSecrets"] == [{"name": "pull"}], owner
        for container in containers(spec):
            assert container["image"].startswith("registry.example:5000/team/raddle"), owner
            assert container["image"].endswith(":1.2.3"), owner
    operator = environment(one(documents, "Deployment", "raddle-operator"))
    assert operator["RADDLE_OPERATOR_IMAGE"] == "registry.example:5000/team/raddle:1.2.3"
    assert operator["RADDLE_OPERATOR_IMAGE_PULL_SECRETS"] == "pull"


def test_ranks_run_in_pods_unless_they_are_to_run_in_agents() -> None:
    """Agents and operator hear the same word."""
    for values, word in (({}, "pods"), (MATRIX["ranks in agents"], "processes")):
        documents = render(values)
        agent = environment(one(documents, "DaemonSet", "raddle-agent"))
        operator = environment(one(documents, "Deployment", "raddle-operator"))
        assert agent["RADDLE_AGENT_RANKS"] == operator["RADDLE_OPERATOR_RANKS"] == word


def test_a_real_machine_is_its_labelled_nodes_only() -> None:
    """Agents go to nodes with the label, the operator minds pods of others and asks for devices."""
    documents = render(MATRIX["real machine"])
    labelled = [{"key": "raddle.dev/node", "operator": "Exists"}]
    assert _required(one(documents, "DaemonSet", "raddle-agent")) == [
        {"matchExpressions": labelled}
    ]
    operator = environment(one(documents, "Deployment", "raddle-operator"))
    assert operator["RADDLE_OPERATOR_SIMULATED"] == "false"
    assert operator["RADDLE_OPERATOR_FOREIGN_PODS"] == "true"
    assert operator["RADDLE_OPERATOR_DEVICE_RESOURCE"] == "huawei.com/Ascend910"


def test_kubelets_are_asked_through_a_container_that_sees_nothing_else() -> None:
    """The agent gets the answers at a socket of their pod; only the relay mounts kubelet's."""
    documents = render(MATRIX["real machine whose kubelets are asked"])
    agent = one(documents, "DaemonSet", "raddle-agent")
    said = environment(agent)
    assert said["RADDLE_AGENT_DEVICE_RESOURCE"] == "huawei.com/Ascend910"
    spec = agent["spec"]["template"]["spec"]
    (main,), (_, relay) = spec["containers"], spec["initContainers"]
    assert relay["restartPolicy"] == "Always"
    assert said["RADDLE_AGENT_POD_RESOURCES"] == relay["command"][-1]
    kubelet = str(Path(relay["command"][-2]).parent)
    mounts = {mount["mountPath"]: mount["name"] for mount in relay["volumeMounts"]}
    assert set(mounts) == {kubelet, "/run/raddle"}
    assert mounts[kubelet] not in {mount["name"] for mount in main["volumeMounts"]}
    assert (
        len(one(render({}), "DaemonSet", "raddle-agent")["spec"]["template"]["spec"]["containers"])
        == 1
    )


def test_agents_and_operator_know_the_machine_by_the_name_that_it_is_given(tmp_path: Path) -> None:
    """A built-in machine may have any name: agents would refuse the positions of another one."""
    documents = render(MATRIX["another name of the machine"])
    data = one(documents, "ConfigMap", "raddle-machine")["data"]
    assert yaml.safe_load(data["supernode.yaml"])["metadata"]["name"] == "ours"
    file = tmp_path / "machine.yaml"
    file.write_text(data["machine.yaml"])
    assert load_machine(str(file)) == replace(load_machine("nvl72"), name="ours")


def test_a_machine_of_their_own_is_told_to_agents_and_operator() -> None:
    """The agents' file and the SuperNode have the same description."""
    documents = render(MATRIX["machine of their own"])
    file = yaml.safe_load(one(documents, "ConfigMap", "raddle-machine")["data"]["machine.yaml"])
    data = one(documents, "ConfigMap", "raddle-machine")["data"]
    resource = yaml.safe_load(data["supernode.yaml"])
    assert (resource["kind"], resource["metadata"]["name"]) == ("SuperNode", "sn0")
    spec = resource["spec"]
    assert file == {"name": "sn0", **spec}
    assert spec == {"machine": "own", "nodes": 4, "npusPerNode": 2}
    agent = environment(one(documents, "DaemonSet", "raddle-agent"))
    assert agent["RADDLE_AGENT_MACHINE"] == "/etc/raddle/machine/machine.yaml"


def _rights(documents: list[dict[str, Any]], name: str) -> set[tuple[str, str, str]]:
    """(kind and namespace of the role, resource, verb) that an account is bound to."""
    found = set()
    for binding in documents:
        if binding["kind"] not in ("RoleBinding", "ClusterRoleBinding"):
            continue
        if {subject["name"] for subject in binding["subjects"]} != {name}:
            continue
        space = binding["metadata"].get("namespace", "")
        role = next(
            d
            for d in documents
            if d["kind"] == binding["roleRef"]["kind"]
            and d["metadata"]["name"] == binding["roleRef"]["name"]
            and d["metadata"].get("namespace", "") == space
        )
        where = "*" if role["kind"] == "ClusterRole" else space
        for rule in role["rules"]:
            found |= {(where, r, v) for r in rule["resources"] for v in rule["verbs"]}
    return found


def test_rights_go_no_further_than_the_served_namespaces() -> None:
    """Pods are made in served namespaces alone; Secrets are copied there, and read by name."""
    served = _rights(render(MATRIX["two namespaces, one replica"]), "raddle-operator")
    assert {
        where for where, resource, verb in served if (resource, verb) == ("pods", "create")
    } == {
        "team-a",
        NAMESPACE,
    }
    assert ("team-a", "secrets", "create") in served
    two = render(MATRIX["two namespaces, one replica"])
    own_role = one(two, "Role", "raddle-operator")
    copied = [rule for rule in own_role["rules"] if rule["resources"] == ["secrets"]]
    assert [(rule["resourceNames"], rule["verbs"]) for rule in copied] == [
        (["raddle-tls-rank", "raddle-tls-frontdoor"], ["get"])
    ]
    assert (NAMESPACE, "secrets", "create") not in served
    theirs = [
        (rule.get("resourceNames"), rule["verbs"])
        for role in two
        if role["kind"] == "Role" and role["metadata"].get("namespace") == "team-a"
        for rule in role["rules"]
        if rule["resources"] == ["secrets"]
    ]
    copies = [f"{NAMESPACE}.raddle-tls-rank", f"{NAMESPACE}.raddle-tls-frontdoor"]
    assert theirs == [(None, ["create"]), (copies, ["get", "patch"])]
    own = _rights(render({}), "raddle-operator")
    assert not [right for right in own if right[1] == "secrets"]
    assert {resource for where, resource, _ in own if where == "*"} == {
        "nodes",
        "nodes/status",
        "supernodes",
        "supernodes/status",
        "maintenances",
        "maintenances/status",
    }
    everywhere = _rights(render(MATRIX["policy, all namespaces, no claim"]), "raddle-operator")
    assert ("*", "pods", "create") in everywhere
    accounts = set(names(render({}), "ServiceAccount"))
    bound = {s["name"] for d in render({}) for s in d.get("subjects", [])}
    assert accounts - bound == {"raddle-scheduler", "raddle-agent", "raddle-etcd"}


def test_definitions_are_kept_and_upgraded() -> None:
    """Each is a template with the policy to keep it; without them none is there."""
    definitions = [d for d in render({}) if d["kind"] == "CustomResourceDefinition"]
    for definition in definitions:
        assert definition["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        assert definition["spec"]["group"] == "raddle.dev"
    assert names(render(MATRIX["two namespaces, one replica"]), "CustomResourceDefinition") == []


def test_resources_of_other_projects_wait_for_their_api() -> None:
    """Monitors and rules come with the Prometheus operator's API, or when they are asked for."""
    kinds = ("ServiceMonitor", "PrometheusRule")
    assert not [d for d in render({}) if d["kind"] in kinds]
    found = render(MATRIX["monitoring"], PROMETHEUS)
    assert len([d for d in found if d["kind"] in kinds]) == 5
    for document in found:
        if document["kind"] in kinds:
            assert document["metadata"]["labels"]["release"] == "prometheus"
    asked = {"monitoring": {"serviceMonitor": True, "prometheusRule": "false"}}
    assert {d["kind"] for d in render(asked, PROMETHEUS) if d["kind"] in kinds} == {
        "ServiceMonitor"
    }


def test_the_settings_are_settings_of_the_daemons() -> None:
    """Every variable that the chart sets is one that the daemon reads."""
    from dataclasses import fields

    from raddle.agent.main import Settings as AgentSettings
    from raddle.operator.main import Settings as OperatorSettings
    from raddle.scheduler.main import Settings as SchedulerSettings

    documents = render({})
    for kind, name, prefix, settings in (
        ("Deployment", "raddle-scheduler", "RADDLE_SCHEDULER_", SchedulerSettings),
        ("DaemonSet", "raddle-agent", "RADDLE_AGENT_", AgentSettings),
        ("Deployment", "raddle-operator", "RADDLE_OPERATOR_", OperatorSettings),
    ):
        known = {prefix + field.name.upper() for field in fields(settings)}
        variables = environment(one(documents, kind, name))
        assert {v for v in variables if v.startswith(prefix)} <= known
