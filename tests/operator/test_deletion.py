"""An InferenceJob that is deleted: its job ends, with its Pods, and then the resource goes.

The API server and the scheduler are dictionaries here: a rank that hangs needs a node elsewhere.
"""

from __future__ import annotations

from typing import Any, cast

from raddle.operator.cluster import Cluster
from raddle.operator.jobs import Jobs
from raddle.operator.machine import Machine
from raddle.operator.names import FINALIZER, MANAGER
from raddle.operator.scheduler_link import Picture, SchedulerLink
from raddle.v1 import scheduler_pb2
from tests.operator.resources import SITE, Object, answer, inference_job, seat


class ApiServer:
    """Objects by kind and name."""

    def __init__(self, *items: Object) -> None:
        self.items = {(item["kind"], item["metadata"]["name"]): item for item in items}

    async def get(self, kind: str, _namespace: str, name: str) -> Object | None:
        return self.items.get((kind, name))

    async def find(self, kind: str, _namespace: str = "", _selector: str = "") -> list[Object]:
        return [item for (known, _), item in self.items.items() if known == kind]

    async def patch(self, item: Object, change: Object, *, part: str = "") -> Object:
        found = self.items[item["kind"], item["metadata"]["name"]]
        for name, value in change.items():
            found[name] = (found.get(name) or {}) | value
        return found

    async def create(self, item: Object) -> Object:
        return self.items.setdefault((item["kind"], item["metadata"]["name"]), item)

    async def delete(self, item: Object) -> None:
        del self.items[item["kind"], item["metadata"]["name"]]


class Scheduler:
    """One job, and the calls that came."""

    def __init__(self, state: str) -> None:
        self.incidents = Picture("incident", "id")
        self.answer = answer(seat(0), state=state)
        self.answer.job.managed_by = MANAGER
        self.calls: list[str] = []

    async def call(self, method: str, _request: Any) -> Any:
        self.calls.append(method)
        if method == "GetJob":
            return self.answer
        return scheduler_pb2.CancelJobResponse(job=self.answer.job)


async def test_a_rank_that_hangs_ends_with_its_pod() -> None:
    """Nobody but a kubelet can end it: while the job is being ended its Pods are deleted."""
    resource = inference_job()
    resource["metadata"] |= {
        "deletionTimestamp": "2026-01-01T00:00:00Z",
        "finalizers": [FINALIZER],
        "resourceVersion": "1",
    }
    labels = {"raddle.dev/job": "demo", "app.kubernetes.io/component": "rank"}
    metadata = {"name": "demo-decode-0-0-1", "namespace": "default", "labels": labels}
    api = ApiServer(resource, {"kind": "Pod", "metadata": metadata})
    scheduler = Scheduler("STOPPING")
    jobs = Jobs(
        cast("Cluster", api),
        cast("SchedulerLink", scheduler),
        cast("Machine", None),
        SITE,
        ranks_in_pods=True,
    )
    assert await jobs.bring("default", "demo")
    assert await api.find("Pod") == []
    assert resource["metadata"]["finalizers"] == [FINALIZER]
    scheduler.answer.CopyFrom(Scheduler("CANCELLED").answer)
    await jobs.bring("default", "demo")
    assert scheduler.calls[-1] == "DeleteJob"
    assert resource["metadata"]["finalizers"] == []
