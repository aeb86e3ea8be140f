"""Words about pods, as the API takes them."""

from __future__ import annotations

from raddle.model.errors import Reason
from raddle.scheduler.scheduler_service import PODS_MAX
from raddle.v1 import scheduler_pb2
from tests.scheduler.conftest import Served, refusal


async def test_words_about_pods_are_bounded_and_late_ones_do_nothing(served: Served) -> None:
    """Too many, unreadable ones and those of no job are refused; a job without ranks takes none."""
    stub = served.stub("operator")
    job = await served.submit("one", "default")
    request = scheduler_pb2.ReportPodsRequest(job_uid=job.uid)
    pod = request.pods.add(start_count=1, has_ended=True, reason="OOMKilled", message="too much")
    pod.rank.role = "decode"
    await stub.ReportPods(request)
    request.job_uid = "j-unknown"
    assert (await refusal(stub.ReportPods(request))).reason is Reason.NOT_FOUND
    request.job_uid, pod.message = job.uid, "two\nlines"
    assert (await refusal(stub.ReportPods(request))).reason is Reason.INVALID_ARGUMENT
    pod.message = "too much"
    request.pods.extend([pod] * PODS_MAX)
    assert (await refusal(stub.ReportPods(request))).reason is Reason.LIMIT_EXCEEDED
    await stub.CancelJob(scheduler_pb2.CancelJobRequest(job_uid=job.uid))
    del request.pods[1:]
    await stub.ReportPods(request)
    answer = await stub.Explain(scheduler_pb2.ExplainRequest(subject=f"job/{job.uid}"))
    assert not [line for line in answer.story if "OOMKilled" in line]
