"""The objects that a placement asks for: a Pod a rank, rank tables, front door, Service. Pure.

A rank's Pod is bound to the Kubernetes node that carries the rank's node and is never started
again: another start of the rank is another Pod. Agent and rank share one folder of the host.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raddle.model.kinds import RoleKind, SeatState
from raddle.operator.names import (
    API_VERSION,
    DIE_ANNOTATION,
    GROUP,
    JOB_REPLICAS,
    role_name,
    short_name,
)
from raddle.operator.pod_problems import RANK_CONTAINER
from raddle.v1 import health_pb2, job_pb2, scheduler_pb2
from raddle.wire.rank_tables import TableRank, table_1_2, table_2_0

#: Engine drivers whose ranks are processes; those of others live in the agent.
_WITH_PROCESSES = ("reference",)
STATE_PATH = "/var/lib/raddle"
#: Label of the instance and rank that a Pod is of, whichever start of the rank.
_SEAT = f"{GROUP}/seat"
_TLS_PATH = "/etc/raddle/tls"
_TABLE_PATH = "/etc/raddle/ranktable"
TABLE_1_2, TABLE_2_0 = "hccl-1.2.json", "hccl-2.0.json"
_MODEL_PATH = "/etc/raddle/model"
HTTP_PORT = 8000
#: The user of the images.
_USER = 65_532
#: Longest time of one request at the front door.
_REQUEST_TIMEOUT_S = 120
#: Within this time nobody sends new requests to a front door that is about to end.
_LEAVES_BALANCERS_S = 5
Object = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What all Pods of one installation share."""

    release: str
    namespace: str
    image: str
    pull_policy: str
    pull_secrets: tuple[str, ...]
    host_path: str
    schedulers: tuple[str, ...]
    tls: bool
    device_resource: str

    @property
    def rank_secret(self) -> str:
        return f"{self.release}-tls-rank"

    @property
    def front_door_secret(self) -> str:
        return f"{self.release}-tls-frontdoor"

    def secret_in(self, namespace: str, secret: str) -> str:
        """The name that a Secret of the release has in a namespace: elsewhere it is a copy's.

        A release of the same name in another namespace has copies of its own there.
        """
        return secret if namespace == self.namespace else f"{self.namespace}.{secret}"


@dataclass(frozen=True, slots=True)
class Seat:
    """One rank with a process: where it sits and which start of it this is."""

    role: str
    instance: int
    rank: job_pb2.RankPlacement

    def label_values(self) -> dict[str, str]:
        return {
            f"{GROUP}/role": self.role,
            f"{GROUP}/instance": str(self.instance),
            f"{GROUP}/rank": str(self.rank.rank),
            _SEAT: _seat_value(self.instance, self.rank.rank),
            f"{GROUP}/start-count": str(self.rank.start_count),
        }


def role_specs(job: job_pb2.Job) -> dict[str, job_pb2.RoleSpec]:
    return {role.name: role for role in job.spec.roles}


def has_processes(role: job_pb2.RoleSpec) -> bool:
    return role.engine.driver in _WITH_PROCESSES


def seats(answer: scheduler_pb2.GetJobResponse) -> Iterator[Seat]:
    """Seats of the placement that have a process of their own."""
    roles = role_specs(answer.job)
    for part in answer.placement.instances:
        if has_processes(roles[part.role]):
            for rank in part.ranks:
                if rank.state == SeatState.ACTIVE and rank.start_count:
                    yield Seat(part.role, part.instance, rank)


def started(answer: scheduler_pb2.GetJobResponse) -> set[tuple[str, int, int, int]]:
    """(role, instance, rank, start) of processes that were up, whatever became of them."""
    return {
        (rank.role, rank.instance, rank.rank, rank.start_count)
        for rank in answer.ranks
        if rank.stage != health_pb2.RANK_STAGE_UNSPECIFIED
    }


def seat_key(seat: Seat) -> tuple[str, int, int, int]:
    return (seat.role, seat.instance, seat.rank.rank, seat.rank.start_count)


def pod_name(job: str, seat: Seat) -> str:
    return short_name(job, seat.role, seat.instance, seat.rank.rank, seat.rank.start_count)


def table_name(job: str, role: str, instance: int | str) -> str:
    return short_name(job, role, instance, "ranktable")


def labels(site: Site, component: str = "", job: job_pb2.Job | None = None) -> dict[str, str]:
    """The labels of everything that belongs to the release, or to one job of it."""
    found = {
        "app.kubernetes.io/name": "raddle",
        "app.kubernetes.io/instance": site.release,
        "app.kubernetes.io/managed-by": "raddle-operator",
    }
    if component:
        found["app.kubernetes.io/component"] = component
    if job is not None:
        found |= {f"{GROUP}/job": job.spec.name, f"{GROUP}/job-uid": job.uid}
    return found


def selector(spec: Mapping[str, Any], answer: scheduler_pb2.GetJobResponse | None) -> str:
    """Pods that stand for one replica of a role each: of an instance the first of its ranks.

    The first one that is there: an instance that lost some goes on.
    """
    chosen = f"{GROUP}/job={spec['job']},{GROUP}/role={spec['role']}"
    if spec["kind"] == RoleKind.CACHE:
        return chosen
    instances = answer.placement.instances if answer is not None else ()
    firsts = [
        _seat_value(part.instance, first)
        for part in instances
        if part.role == spec["role"] and (first := _first_rank(part)) is not None
    ]
    return f"{chosen},{_SEAT} in ({','.join(firsts)})"


def _first_rank(instance: job_pb2.InstancePlacement) -> int | None:
    ranks = (rank.rank for rank in instance.ranks if rank.state == SeatState.ACTIVE)
    return min(ranks, default=None)


def _seat_value(instance: int, rank: int) -> str:
    return f"{instance}-{rank}"


def owner(resource: Mapping[str, Any]) -> list[Object]:
    """The reference by which an object goes with its owner."""
    return [
        {
            "apiVersion": API_VERSION,
            "kind": resource["kind"],
            "name": resource["metadata"]["name"],
            "uid": resource["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]


def rank_pod(
    site: Site,
    answer: scheduler_pb2.GetJobResponse,
    seat: Seat,
    *,
    host: str,
    role_resource: Mapping[str, Any],
    template: Mapping[str, Any],
    device: int | None,
) -> Object:
    """The Pod of one start of one rank on the Kubernetes node `host`."""
    job, rank = answer.job, seat.rank
    relative = (
        f"ranks/{rank.node.replace('/', '-')}/{job.uid}/"
        f"{seat.role}-{seat.instance}-{rank.rank}-{rank.start_count}"
    )
    folder = f"{STATE_PATH}/{relative}"
    table = table_name(job.spec.name, seat.role, seat.instance)
    container = _rank_container(site, job, seat, folder, device)
    # The agent makes both folders, as the user that the rank runs as, and kubelet waits for them:
    # what it made itself would be root's, and each rank would need the rights to give it away.
    volumes = [
        {"name": "folder", "hostPath": _folder(f"{site.host_path}/{relative}")},
        {"name": "checkpoints", "hostPath": _folder(f"{site.host_path}/checkpoints")},
        {"name": "ranktable", "configMap": {"name": table, "optional": True}},
        {"name": "temporary", "emptyDir": {"sizeLimit": "1Gi"}},
    ]
    namespace = role_resource["metadata"]["namespace"]
    _mount_secret(site, container, volumes, site.secret_in(namespace, site.rank_secret))
    spec = {
        "nodeName": host,
        "restartPolicy": "Never",
        # What a node's end takes with it is decided by the scheduler, not by taints.
        "tolerations": [{"operator": "Exists"}],
        "terminationGracePeriodSeconds": 10,
        **_pod_basics(site),
        "containers": [container],
        "volumes": volumes,
    }
    metadata = {
        "name": pod_name(job.spec.name, seat),
        "namespace": namespace,
        "labels": labels(site, "rank", job) | seat.label_values(),
        "annotations": {DIE_ANNOTATION: rank.die, f"{GROUP}/node": rank.node},
        "ownerReferences": owner(role_resource),
    }
    return overlaid(
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}, template
    )


def _rank_container(
    site: Site, job: job_pb2.Job, seat: Seat, folder: str, device: int | None
) -> Object:
    rank = seat.rank
    environment = {
        "RADDLE_JOB_UID": job.uid,
        "RADDLE_RANK": f"{seat.role}/{seat.instance}/{rank.rank}",
        "RADDLE_DIE": rank.die,
        "RANK_TABLE_FILE": f"{_TABLE_PATH}/{TABLE_1_2}",
    }
    if device is not None:
        environment["ASCEND_VISIBLE_DEVICES"] = str(device)
    container: Object = {
        "name": RANK_CONTAINER,
        "image": site.image,
        "imagePullPolicy": site.pull_policy,
        "command": ["python", "-m", "raddle.agent.engine.reference.rank", folder],
        "env": [
            {"name": "RADDLE_RANK_HOST", "valueFrom": _field("status.podIP")},
            *({"name": name, "value": value} for name, value in environment.items()),
        ],
        "readinessProbe": {
            # It says where it listens once it does.
            "exec": {"command": ["test", "-s", f"{folder}/rank.json"]},
            "periodSeconds": 5,
            "timeoutSeconds": 5,
        },
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}},
        "securityContext": _container_security(),
        "volumeMounts": [
            {"name": "folder", "mountPath": folder},
            {"name": "checkpoints", "mountPath": f"{STATE_PATH}/checkpoints", "readOnly": True},
            {"name": "ranktable", "mountPath": _TABLE_PATH, "readOnly": True},
            {"name": "temporary", "mountPath": "/tmp"},  # noqa: S108 - an empty volume
        ],
    }
    if site.device_resource and rank.die:
        container["resources"]["limits"] = {site.device_resource: 1}
    return container


def _field(path: str) -> Object:
    return {"fieldRef": {"fieldPath": path}}


def _folder(path: str) -> Object:
    return {"path": path, "type": "Directory"}


def _pod_basics(site: Site) -> Object:
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "imagePullSecrets": [{"name": name} for name in site.pull_secrets],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def _container_security() -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _mount_secret(site: Site, container: Object, volumes: list[Any], secret: str) -> None:
    if site.tls:
        volumes.append({"name": "tls", "secret": {"secretName": secret, "defaultMode": 0o440}})
        mount = {"name": "tls", "mountPath": _TLS_PATH, "readOnly": True}
        container["volumeMounts"].append(mount)


def overlaid(pod: Object, template: Mapping[str, Any]) -> Object:
    """The Pod with a user's template under it: what Raddle says goes before.

    Labels and annotations join; fields of the Pod that Raddle does not set are the template's; the
    template's container `rank` adds what ours leaves open (resources replace ours), other
    containers, init containers and volumes come beside.
    """
    found, template = copy.deepcopy(pod), copy.deepcopy(dict(template))
    theirs, metadata = template.get("spec") or {}, template.get("metadata") or {}
    for name in ("labels", "annotations"):
        found["metadata"][name] = (metadata.get(name) or {}) | found["metadata"][name]
    ours = found["spec"]["containers"][0]
    others = [c for c in theirs.get("containers") or () if c.get("name") != ours["name"]]
    for extra in theirs.get("containers") or ():
        if extra.get("name") == ours["name"]:
            ours = _container(ours, extra)
    spec = {**theirs, **found["spec"]}
    spec["containers"] = [ours, *others]
    names = {volume["name"] for volume in found["spec"]["volumes"]}
    more = [v for v in theirs.get("volumes") or () if v.get("name") not in names]
    spec["volumes"] = [*found["spec"]["volumes"], *more]
    found["spec"] = spec
    return found


def _container(ours: Object, theirs: Mapping[str, Any]) -> Object:
    found = {**theirs, **ours}
    taken = {item["name"] for item in ours["env"]}
    found["env"] = [*ours["env"], *(e for e in theirs.get("env") or () if e["name"] not in taken)]
    found["volumeMounts"] = [*ours["volumeMounts"], *(theirs.get("volumeMounts") or ())]
    wanted = theirs.get("resources") or {}
    mine = ours["resources"]
    found["resources"] = {
        name: {**(mine.get(name) or {}), **(wanted.get(name) or {})}
        for name in ("requests", "limits")
        if mine.get(name) or wanted.get(name)
    }
    return found


def rank_table(
    site: Site,
    job: job_pb2.Job,
    role_resource: Mapping[str, Any],
    role: str,
    instance: int,
    ranks: Sequence[TableRank],
) -> Object:
    """The ConfigMap with the tables of one instance, whose ranks come in order."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": table_name(job.spec.name, role, instance),
            "namespace": role_resource["metadata"]["namespace"],
            "labels": labels(site, "rank", job) | {f"{GROUP}/role": role},
            "ownerReferences": owner(role_resource),
        },
        "data": {
            TABLE_1_2: json.dumps(table_1_2(ranks)),
            TABLE_2_0: json.dumps(table_2_0(ranks)),
        },
    }


def is_served(job: job_pb2.Job) -> bool:
    """Has the job ranks that a front door can speak to?"""
    return all(has_processes(role) for role in job.spec.roles)


def front_door(site: Site, job: job_pb2.Job, resource: Mapping[str, Any]) -> list[Object]:
    """The job's model, front door and Service, by which clients reach it."""
    name, namespace = job.spec.name, resource["metadata"]["namespace"]
    said = labels(site, "frontdoor", job)
    chosen = {key: said[key] for key in ("app.kubernetes.io/component", f"{GROUP}/job")}

    def metadata(suffix: str = "") -> Object:
        return {
            "name": short_name(name, suffix) if suffix else name,
            "namespace": namespace,
            "labels": said,
            "ownerReferences": owner(resource),
        }

    model = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata("model"),
        "data": {"config.json": job.spec.model.config},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(),
        "spec": {
            "selector": chosen,
            "ports": [{"name": "http", "port": 80, "targetPort": HTTP_PORT, "protocol": "TCP"}],
        },
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata("frontdoor"),
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": chosen},
            "template": {
                "metadata": {"labels": said},
                "spec": _front_door_pod(site, job, short_name(name, "model")),
            },
        },
    }
    return [model, deployment, service]


def _front_door_pod(site: Site, job: job_pb2.Job, model: str) -> Object:
    command = ["python", "-m", "raddle.agent.engine.reference.frontdoor"]
    flags = {
        "--schedulers": ",".join(site.schedulers),
        "--job": f"{job.spec.namespace}/{job.spec.name}",
        "--model": f"{_MODEL_PATH}/config.json",
        "--listen": f"0.0.0.0:{HTTP_PORT}",
        "--request-timeout-s": str(_REQUEST_TIMEOUT_S),
    }
    if site.tls:
        flags |= {
            "--tls-ca": f"{_TLS_PATH}/ca.crt",
            "--tls-certificate": f"{_TLS_PATH}/tls.crt",
            "--tls-key": f"{_TLS_PATH}/tls.key",
        }
    flat = [text for flag in flags.items() for text in flag]

    def probe(path: str, **more: int) -> Object:
        return {"httpGet": {"path": path, "port": "http"}, "timeoutSeconds": 5, **more}

    container: Object = {
        "name": "frontdoor",
        "image": site.image,
        "imagePullPolicy": site.pull_policy,
        # Inside the cluster, as its Service says; the network is the cluster's to protect.
        "command": [*command, *flat, "--allow-plain-http"],
        "ports": [{"name": "http", "containerPort": HTTP_PORT, "protocol": "TCP"}],
        "readinessProbe": probe("/ready", periodSeconds=2),
        "livenessProbe": probe("/live", periodSeconds=10, failureThreshold=6),
        # Whoever balances has to hear first that it takes no more.
        "lifecycle": {"preStop": {"sleep": {"seconds": _LEAVES_BALANCERS_S}}},
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}},
        "securityContext": _container_security(),
        "volumeMounts": [
            {"name": "model", "mountPath": _MODEL_PATH, "readOnly": True},
            {"name": "temporary", "mountPath": "/tmp"},  # noqa: S108 - an empty volume
        ],
    }
    volumes: list[Any] = [
        {"name": "model", "configMap": {"name": model}},
        {"name": "temporary", "emptyDir": {"sizeLimit": "64Mi"}},
    ]
    secret = site.secret_in(job.spec.namespace, site.front_door_secret)
    _mount_secret(site, container, volumes, secret)
    # The streams that are open when it is replaced come to their ends.
    grace = {"terminationGracePeriodSeconds": _LEAVES_BALANCERS_S + _REQUEST_TIMEOUT_S}
    return {**_pod_basics(site), **grace, "containers": [container], "volumes": volumes}


def role_resource(
    site: Site, resource: Mapping[str, Any], role: Mapping[str, Any], replicas: int
) -> Object:
    """The InferenceRole of one role, as an object to apply."""
    job = resource["metadata"]["name"]
    return {
        "apiVersion": API_VERSION,
        "kind": "InferenceRole",
        "metadata": {
            "name": role_name(job, role["name"]),
            "namespace": resource["metadata"]["namespace"],
            "labels": labels(site) | {f"{GROUP}/job": job},
            "annotations": {JOB_REPLICAS: str(replicas)},
            "ownerReferences": owner(resource),
        },
        "spec": {"job": job, "role": role["name"], "kind": role["kind"], "replicas": replicas},
    }


def to_delete(
    present: Collection[Mapping[str, Any]], wanted: Collection[str]
) -> list[Mapping[str, Any]]:
    """Pods of a job whose ranks are not in its placement any more."""
    return [pod for pod in present if pod["metadata"]["name"] not in wanted]


def front_door_names(job: str) -> list[tuple[str, str]]:
    """(kind, name) of what `front_door` makes."""
    return [
        ("Deployment", short_name(job, "frontdoor")),
        ("Service", job),
        ("ConfigMap", short_name(job, "model")),
    ]
