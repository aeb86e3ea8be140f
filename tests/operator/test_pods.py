"""The objects that a placement asks for."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from raddle.operator import pods
from raddle.operator.names import short_name
from tests.operator.resources import SITE, answer, inference_job, role, seat
from tests.wire.test_rank_tables import make_table_rank

OWNER = {
    "kind": "InferenceRole",
    "metadata": {"name": "demo-decode", "namespace": "default", "uid": "uid-role"},
}


def pod(template: dict[str, Any] | None = None, site: pods.Site = SITE) -> dict[str, Any]:
    told = answer(seat(3, start_count=7))
    (only,) = pods.seats(told)
    return pods.rank_pod(
        site, told, only, host="worker-1", role_resource=OWNER, template=template or {}, device=None
    )


def test_a_rank_is_a_pod_bound_to_its_node_and_never_restarted() -> None:
    """Its name tells which start of which rank it is; it goes with its role."""
    made = pod()
    assert made["metadata"]["name"] == "demo-decode-0-3-7"
    assert made["spec"]["nodeName"] == "worker-1"
    assert made["spec"]["restartPolicy"] == "Never"
    assert made["metadata"]["annotations"] == {
        "raddle.dev/die": "sn0/n00/npu1/die1",
        "raddle.dev/node": "sn0/n00",
    }
    assert made["metadata"]["ownerReferences"][0]["uid"] == "uid-role"
    assert made["metadata"]["labels"]["raddle.dev/start-count"] == "7"
    assert made["metadata"]["labels"]["app.kubernetes.io/component"] == "rank"


def test_agent_and_rank_share_the_ranks_own_folder() -> None:
    """The same path inside, and nothing else of the host but the weights, to read."""
    spec = pod()["spec"]
    folder = "/var/lib/raddle/ranks/sn0-n00/j-000000000001/decode-0-3-7"
    assert spec["containers"][0]["command"][-1] == folder
    volumes = {v["name"]: v["hostPath"]["path"] for v in spec["volumes"] if "hostPath" in v}
    host = "/var/lib/raddle/default-raddle"
    assert volumes == {
        "folder": f"{host}/ranks/sn0-n00/j-000000000001/decode-0-3-7",
        "checkpoints": f"{host}/checkpoints",
    }
    mounts = {m["name"]: m.get("readOnly", False) for m in spec["containers"][0]["volumeMounts"]}
    assert mounts["checkpoints"]
    assert not mounts["folder"]


def test_a_rank_has_few_rights() -> None:
    """No root, no token, no capability, no writable root; a certificate that is ranks' alone."""
    spec = pod()["spec"]
    container = spec["containers"][0]
    assert spec["securityContext"]["runAsNonRoot"]
    assert not spec["automountServiceAccountToken"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"]
    secrets = [v["secret"]["secretName"] for v in spec["volumes"] if "secret" in v]
    assert secrets == ["raddle-tls-rank"]
    away = pod(site=replace(SITE, namespace="raddle"))["spec"]
    copies = [v["secret"]["secretName"] for v in away["volumes"] if "secret" in v]
    assert copies == ["raddle.raddle-tls-rank"]
    plain = pod(site=replace(SITE, tls=False))["spec"]
    assert not [v for v in plain["volumes"] if "secret" in v]


def test_a_rank_asks_for_its_device_where_devices_have_a_resource() -> None:
    """One of the named resource."""
    made = pod(site=replace(SITE, device_resource="huawei.com/Ascend910"))
    assert made["spec"]["containers"][0]["resources"]["limits"] == {"huawei.com/Ascend910": 1}


def test_a_template_adds_and_does_not_take_away() -> None:
    """Labels, Pod fields, other containers and more of ours; what makes it a rank stays."""
    template = {
        "metadata": {"labels": {"team": "a", "raddle.dev/rank": "99"}},
        "spec": {
            "nodeName": "elsewhere",
            "restartPolicy": "Always",
            "priorityClassName": "high",
            "volumes": [{"name": "models", "emptyDir": {}}, {"name": "folder", "emptyDir": {}}],
            "containers": [
                {
                    "name": "rank",
                    "command": ["sleep"],
                    "env": [{"name": "MORE", "value": "1"}, {"name": "RADDLE_DIE", "value": "x"}],
                    "resources": {"limits": {"memory": "4Gi"}, "requests": {"cpu": "2"}},
                    "volumeMounts": [{"name": "models", "mountPath": "/models"}],
                },
                {"name": "sidecar", "image": "tool"},
            ],
        },
    }
    made = pod(template)
    spec, container = made["spec"], made["spec"]["containers"][0]
    assert made["metadata"]["labels"]["team"] == "a"
    assert made["metadata"]["labels"]["raddle.dev/rank"] == "3"
    assert (spec["nodeName"], spec["restartPolicy"]) == ("worker-1", "Never")
    assert spec["priorityClassName"] == "high"
    assert [c["name"] for c in spec["containers"]] == ["rank", "sidecar"]
    assert container["command"][0] == "python"
    environment = {e["name"]: e.get("value") for e in container["env"]}
    assert environment["MORE"] == "1"
    assert environment["RADDLE_DIE"] == "sn0/n00/npu1/die1"
    assert container["resources"]["requests"] == {"cpu": "2", "memory": "128Mi"}
    assert container["resources"]["limits"] == {"memory": "4Gi"}
    # Kubelet would make it as root's, before the agent can make it as its own.
    assert {v["name"]: v for v in spec["volumes"]}["folder"]["hostPath"]["type"] == "Directory"
    assert "models" in {v["name"] for v in spec["volumes"]}


def test_only_seats_with_a_process_have_pods() -> None:
    """Spares and lost ranks have none, and neither has an engine that lives in the agent."""
    told = answer(seat(0), seat(1, state="LOST"), seat(2, state="SPARE", start_count=0))
    assert [s.rank.rank for s in pods.seats(told)] == [0]
    assert list(pods.seats(answer(seat(0), driver="simulated"))) == []


def test_what_was_up_is_known_by_its_start() -> None:
    """Another start of the same rank is another process."""
    told = answer(seat(0, start_count=2))
    assert pods.started(told) == {("decode", 0, 0, 2)}


def test_long_names_are_cut_and_stay_apart() -> None:
    """At most 63 characters, and a hash of the whole."""
    first, second = short_name("a" * 60, "decode", 0, 1), short_name("a" * 60, "decode", 0, 2)
    assert len(first) == len(second) == 63
    assert first != second
    assert short_name("demo", "decode", 0) == "demo-decode-0"


def test_a_front_door_serves_the_job_behind_its_service() -> None:
    """A Deployment, its model, and a Service of the job's own name on port 80."""
    told, resource = answer(seat(0)), inference_job()
    told.job.spec.model.config = "{}"
    model, deployment, service = pods.front_door(SITE, told.job, resource)
    assert service["metadata"]["name"] == "demo"
    assert service["spec"]["ports"][0]["port"] == 80
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert model["data"] == {"config.json": "{}"}
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    secrets = [v["secret"]["secretName"] for v in volumes if "secret" in v]
    assert secrets == ["raddle-tls-frontdoor"]
    command = deployment["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[command.index("--job") + 1] == "default/demo"
    made = {(item["kind"], item["metadata"]["name"]) for item in (model, deployment, service)}
    assert made == set(pods.front_door_names("demo"))


def test_a_front_door_that_is_replaced_ends_its_streams_first() -> None:
    """It gets no new requests any more, and as long as the longest request may take."""
    told, resource = answer(seat(0)), inference_job()
    _, deployment, _ = pods.front_door(SITE, told.job, resource)
    pod = deployment["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"]
    longest_s = int(command[command.index("--request-timeout-s") + 1])
    leaves_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert leaves_s > 0
    assert pod["terminationGracePeriodSeconds"] >= longest_s + leaves_s


def test_rank_tables_have_both_forms() -> None:
    """One ConfigMap an instance, complete when every Pod has its address."""
    told = answer(seat(0), seat(1))
    ranks = [make_table_rank(number) for number in (0, 1)]
    made = pods.rank_table(SITE, told.job, OWNER, "decode", 0, ranks)
    assert made["metadata"]["name"] == "demo-decode-0-ranktable"
    tables = {name: json.loads(text) for name, text in made["data"].items()}
    assert tables[pods.TABLE_1_2]["status"] == "completed"
    assert tables[pods.TABLE_2_0]["rank_count"] == 2
    mounted = [v for v in pod()["spec"]["volumes"] if v["name"] == "ranktable"]
    assert mounted[0]["configMap"]["name"] == made["metadata"]["name"]


def test_a_role_resource_carries_the_jobs_own_size() -> None:
    """So that a later change in the job can be told from one by `kubectl scale`."""
    made = pods.role_resource(SITE, inference_job(), role("decode"), 2)
    assert made["metadata"]["name"] == "demo-decode"
    assert made["metadata"]["annotations"] == {"raddle.dev/job-replicas": "2"}
    assert made["spec"] == {"job": "demo", "role": "decode", "kind": "decode", "replicas": 2}


def test_a_selector_finds_one_pod_for_each_replica() -> None:
    """Of an instance the first rank that is there, of a cache each; of a role that waits none."""
    told = answer(seat(0, "LOST"), seat(1), seat(2))
    told.placement.instances.add(role="decode", instance=3).ranks.append(seat(0))
    told.placement.instances.add(role="other", instance=1).ranks.append(seat(0))
    spec = pods.role_resource(SITE, inference_job(), role("decode"), 2)["spec"]
    of_role = "raddle.dev/job=demo,raddle.dev/role=decode"
    assert pods.selector(spec, told) == f"{of_role},raddle.dev/seat in (0-1,3-0)"
    assert pods.selector(spec, None) == f"{of_role},raddle.dev/seat in ()"
    assert pods.selector(spec | {"kind": "cache"}, told) == of_role
    assert pods.Seat("decode", 0, seat(1)).label_values()["raddle.dev/seat"] == "0-1"
