"""Commands about jobs: submit, status, describe, explain, watch, scale, cancel, delete."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from raddle.cli.options import Output, output_of, session
from raddle.model.errors import PermanentError, RaddleError, Reason

AllNamespaces = Annotated[
    bool, typer.Option("--all-namespaces", "-A", help="jobs of all namespaces")
]
JobName = Annotated[str, typer.Argument(help="uid, name, or namespace/name")]
_POLL_S = 0.2
_UID = re.compile(r"j-[0-9a-f]{12}\Z")


def _state(job: Any) -> str:
    from raddle.v1 import job_pb2

    return job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")


def _row(job: Any) -> list[Any]:
    return [job.spec.namespace, job.spec.name, job.uid, _state(job), job.epoch, job.why.message]


_COLUMNS = ["NAMESPACE", "NAME", "UID", "STATE", "EPOCH", "WHY"]


async def find_job(stub: Any, name: str, namespace: str, timeout_s: float) -> Any:
    """GetJob by uid, name or namespace/name."""
    import grpc

    from raddle.v1 import scheduler_pb2

    space, _, short = name.rpartition("/")
    by_name = scheduler_pb2.GetJobRequest(namespace=space or namespace, name=short)
    if _UID.match(name):
        try:
            by_uid = scheduler_pb2.GetJobRequest(job_uid=name)
            return await stub.GetJob(by_uid, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            # A name may look like a uid; namespace/name never does.
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
    return await stub.GetJob(by_name, timeout=timeout_s)


def submit(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="job file (YAML or JSON)")],
    dry_run: Annotated[bool, typer.Option(help="check and place, change nothing")] = False,
    wait: Annotated[bool, typer.Option(help="wait until the job is ready")] = False,
    idempotency_key: Annotated[str, typer.Option(help="the same key gives the same job")] = "",
    output: Output = "",
) -> None:
    """Submit a job.

    Examples: `raddle submit examples/small.yaml --wait`, `raddle submit job.yaml --dry-run -o json`
    """
    from raddle.cli.session import fail, say
    from raddle.v1 import scheduler_pb2
    from raddle.wire.parse import job_message

    s = session(ctx, output)
    try:
        spec = job_message(_read(file), file.parent)
    except RaddleError as error:
        fail(error)
    if s.context.namespace != "default" and not spec.namespace:
        spec.namespace = s.context.namespace

    async def work(stub: Any) -> int:
        request = scheduler_pb2.SubmitJobRequest(
            spec=spec, idempotency_key=idempotency_key, dry_run=dry_run
        )
        answer = await stub.SubmitJob(request, timeout=s.timeout_s)
        code = 0
        if dry_run:
            s.show(
                answer,
                ["FITS NOW", "WHY"],
                [[bool(answer.placement.instances), answer.job.why.message]],
            )
            return 0
        if wait:
            say(f"job {answer.job.uid} accepted; waiting until it is ready")
            answer.job.CopyFrom(await _wait_ready(stub, answer.job.uid, s.timeout_s))
            code = 0 if _state(answer.job) == "READY" else 1
        s.show(answer, _COLUMNS, [_row(answer.job)])
        return code

    s.run(work)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError as error:
        raise PermanentError(Reason.NOT_FOUND, f"there is no file {file}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise PermanentError(Reason.INVALID_ARGUMENT, f"{file} cannot be read: {error}.") from error


async def _wait_ready(stub: Any, job_uid: str, timeout_s: float) -> Any:
    from raddle.cli.session import say

    last = ""
    while True:
        job = (await find_job(stub, job_uid, "", timeout_s)).job
        now = f"{_state(job)}: {job.why.message}"
        if now != last:
            say(now)
            last = now
        if _state(job) in ("READY", "CANCELLED", "FAILED"):
            return job
        await asyncio.sleep(_POLL_S)


def status(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(help="only this job")] = "",
    all_namespaces: AllNamespaces = False,
    output: Output = "",
) -> None:
    """List the jobs of the namespace with their state and why.

    Examples: `raddle status`, `raddle status -A`, `raddle -n team-a status`
    """
    from raddle.v1 import scheduler_pb2

    s = session(ctx, output)

    async def work(stub: Any) -> None:
        if job:
            answer = await find_job(stub, job, s.context.namespace, s.timeout_s)
            s.show(answer, _COLUMNS, [_row(answer.job)])
            return
        answer = scheduler_pb2.ListJobsResponse()
        token = ""
        while True:
            request = scheduler_pb2.ListJobsRequest(
                namespace="" if all_namespaces else s.context.namespace,
                page_size=1000,
                page_token=token,
            )
            page = await stub.ListJobs(request, timeout=s.timeout_s)
            answer.jobs.extend(page.jobs)
            answer.revision = page.revision
            token = page.next_page_token
            if not token:
                break
        s.show(answer, _COLUMNS, [_row(item) for item in answer.jobs])

    s.run(work)


def describe(ctx: typer.Context, job: JobName, output: Output = "") -> None:
    """Show one job whole: its roles, and where each rank sits.

    Example: `raddle describe deepseek-r1`
    """
    s = session(ctx, output)

    async def work(stub: Any) -> None:
        answer = await find_job(stub, job, s.context.namespace, s.timeout_s)
        rows = [
            [
                f"{part.role}/{part.instance}/{r.rank}",
                r.die or "(host)",
                r.node,
                r.state,
                r.why.message,
            ]
            for part in answer.placement.instances
            for r in part.ranks
        ]
        if s.output == "table":
            from raddle.cli.session import print_table

            print_table(_COLUMNS, [_row(answer.job)])
        s.show(answer, ["RANK", "DIE", "NODE", "STATE", "WHY"], rows)

    s.run(work)


def explain(
    ctx: typer.Context,
    subject: Annotated[
        str, typer.Argument(help="job/UID, incident/ID, die/POSITION or node/POSITION")
    ],
    output: Output = "",
) -> None:
    """Tell why something is as it is, with the story so far.

    Examples: `raddle explain incident/i-000001`, `raddle explain node/sn0/n07`
    """
    from raddle.v1 import scheduler_pb2

    s = session(ctx, output)

    async def work(stub: Any) -> None:
        request = scheduler_pb2.ExplainRequest(subject=_in_namespace(subject, s.context.namespace))
        answer = await stub.Explain(request, timeout=s.timeout_s)
        rows = [[f"{answer.why.reason}: {answer.why.message}"], *([line] for line in answer.story)]
        s.show(answer, [subject], rows)

    s.run(work)


def _in_namespace(subject: str, namespace: str) -> str:
    """`job/NAME` is a job of the namespace that this call is about."""
    kind, _, name = subject.partition("/")
    plain = kind == "job" and name and "/" not in name and not _UID.match(name)
    return f"job/{namespace}/{name}" if plain else subject


def watch(
    ctx: typer.Context,
    after_revision: Annotated[int, typer.Option(help="only changes after this revision")] = 0,
    all_namespaces: AllNamespaces = False,
    output: Annotated[
        str, typer.Option("--output", "-o", help="json (default): a line each; table or yaml")
    ] = "",
) -> None:
    """Follow the jobs of the namespace: all of them first, then each change as it comes.

    Examples: `raddle watch | jq .job.state`, `raddle watch -A -o table`
    """
    from raddle.v1 import scheduler_pb2

    s = session(ctx, output_of(ctx, output, default="json"))

    async def work(stub: Any) -> None:
        request = scheduler_pb2.WatchJobsRequest(
            after_revision=after_revision,
            namespace="" if all_namespaces else s.context.namespace,
        )
        async for message in stub.WatchJobs(request):
            _show_change(message, s.output)

    s.run(work, leader_only=True)


def _show_change(message: Any, output: str) -> None:
    """One JSON line, one YAML document, or a line for people; at once, since more may take long."""
    import json
    import sys

    import yaml

    from raddle.cli.session import printable, to_data
    from raddle.v1 import scheduler_pb2

    if output == "json":
        text = json.dumps(to_data(message)) + "\n"
    elif output == "yaml":
        text = yaml.safe_dump(to_data(message), sort_keys=False, explicit_start=True)
    else:
        kind = scheduler_pb2.WatchKind.Name(message.kind).removeprefix("WATCH_KIND_")
        cells = _row(message.job) if message.HasField("job") else [f"revision {message.revision}"]
        text = printable("  ".join(map(str, [f"{kind:<8}", *cells]))) + "\n"
    sys.stdout.write(text)
    sys.stdout.flush()


ManagedBy = Annotated[
    str, typer.Option(help="act as the owner of a job that is managed by somebody, e.g. operator")
]


def scale(
    ctx: typer.Context,
    job: JobName,
    role: Annotated[str, typer.Argument(help="name of the role")],
    instances: Annotated[int, typer.Option(help="new number of instances")] = 0,
    ranks: Annotated[int, typer.Option(help="new number of ranks an instance")] = 0,
    managed_by: ManagedBy = "",
    output: Output = "",
) -> None:
    """Change the size of a role: the job is placed anew at its next epoch.

    Example: `raddle scale deepseek-r1 prefill --instances 4`
    """
    from raddle.v1 import scheduler_pb2

    s = session(ctx, output)

    async def work(stub: Any) -> None:
        found = (await find_job(stub, job, s.context.namespace, s.timeout_s)).job
        request = scheduler_pb2.ScaleJobRequest(
            job_uid=found.uid,
            role=role,
            instances=instances,
            ranks=ranks,
            managed_by=managed_by,
        )
        answer = await stub.ScaleJob(request, timeout=s.timeout_s)
        s.show(answer, _COLUMNS, [_row(answer.job)])

    s.run(work)


def update(
    ctx: typer.Context,
    job: JobName,
    priority: Annotated[
        int | None,
        typer.Option(help="new priority; higher goes first", min=-(2**31), max=2**31 - 1),
    ] = None,
    queue: Annotated[str, typer.Option(help="new queue")] = "",
    expected_generation: Annotated[
        int, typer.Option(help="refuse if the job has another generation")
    ] = 0,
    managed_by: ManagedBy = "",
    output: Output = "",
) -> None:
    """Change what can be changed of a job while it runs.

    Example: `raddle update deepseek-r1 --priority 10`
    """
    from raddle.v1 import scheduler_pb2

    s = session(ctx, output)
    paths = [p for p, given in (("priority", priority is not None), ("queue", queue)) if given]
    if not paths:
        raise typer.BadParameter("say what to change: --priority or --queue")

    async def work(stub: Any) -> None:
        found = (await find_job(stub, job, s.context.namespace, s.timeout_s)).job
        request = scheduler_pb2.UpdateJobRequest(
            job_uid=found.uid, expected_generation=expected_generation, managed_by=managed_by
        )
        request.spec.priority, request.spec.queue = priority or 0, queue
        request.update_mask.paths.extend(paths)
        answer = await stub.UpdateJob(request, timeout=s.timeout_s)
        s.show(answer, _COLUMNS, [_row(answer.job)])

    s.run(work)


def cancel(
    ctx: typer.Context, job: JobName, managed_by: ManagedBy = "", output: Output = ""
) -> None:
    """End a job; its record stays until it is deleted.

    Example: `raddle cancel deepseek-r1`
    """
    from raddle.v1 import scheduler_pb2

    s = session(ctx, output)

    async def work(stub: Any) -> None:
        found = (await find_job(stub, job, s.context.namespace, s.timeout_s)).job
        request = scheduler_pb2.CancelJobRequest(job_uid=found.uid, managed_by=managed_by)
        answer = await stub.CancelJob(request, timeout=s.timeout_s)
        s.show(answer, _COLUMNS, [_row(answer.job)])

    s.run(work)


def delete(
    ctx: typer.Context, job: JobName, managed_by: ManagedBy = "", output: Output = ""
) -> None:
    """Remove the record of an ended job; its name is free again.

    Example: `raddle delete deepseek-r1`
    """
    from raddle.v1 import scheduler_pb2

    s = session(ctx, output)

    async def work(stub: Any) -> None:
        found = (await find_job(stub, job, s.context.namespace, s.timeout_s)).job
        request = scheduler_pb2.DeleteJobRequest(job_uid=found.uid, managed_by=managed_by)
        answer = await stub.DeleteJob(request, timeout=s.timeout_s)
        s.tell(answer, f"job {found.uid} is deleted")

    s.run(work)


def register(app: typer.Typer) -> None:
    for command in (submit, status, describe, explain, watch, scale, update, cancel, delete):
        app.command()(command)
