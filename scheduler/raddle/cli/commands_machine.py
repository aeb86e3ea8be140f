"""Commands about the machine: nodes, dies, cordon, uncordon, drain, inject, supernode."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from raddle.cli.options import Output, seconds, session
from raddle.model.errors import RaddleError

Subject = Annotated[str, typer.Argument(help="position: sn0/n07, sn0/n07/npu3, sn0/n07/npu3/die1")]
_POLL_S = 0.3


def nodes(ctx: typer.Context, output: Output = "") -> None:
    """List nodes with what the leader believes of them.

    Example: `raddle nodes`
    """
    from raddle.v1 import scheduler_pb2

    s = session(ctx, output)

    async def work(stub: Any) -> None:
        answer = await stub.ListNodes(scheduler_pb2.ListNodesRequest(), timeout=s.timeout_s)
        rows = [
            [
                n.node,
                n.state,
                n.dies,
                n.dies_free,
                n.dies_held,
                n.dies_faulty,
                ",".join(n.drivers),
                n.why.message,
            ]
            for n in answer.nodes
        ]
        columns = ["NODE", "STATE", "DIES", "FREE", "HELD", "FAULTY", "DRIVERS", "WHY"]
        s.show(answer, columns, rows)

    s.run(work)


def dies(
    ctx: typer.Context,
    node: Annotated[str, typer.Argument(help="only dies of this node")] = "",
    output: Output = "",
) -> None:
    """List dies: hold, health and work, three separate things.

    Example: `raddle dies sn0/n07`
    """
    from raddle.v1 import health_pb2, scheduler_pb2

    s = session(ctx, output)

    async def work(stub: Any) -> None:
        request = scheduler_pb2.ListDiesRequest(node=node)
        answer = await stub.ListDies(request, timeout=s.timeout_s)
        rows = []
        for die in answer.dies:
            level = health_pb2.FaultLevel.Name(die.health).removeprefix("FAULT_LEVEL_")
            rank = f"{die.rank.role}/{die.rank.instance}/{die.rank.rank}" if die.job_uid else ""
            health = "OK" if level == "UNSPECIFIED" else level
            kinds = ",".join(dict.fromkeys(hold.kind for hold in die.holds))
            rows.append(
                [
                    die.die,
                    kinds or die.hold or "-",
                    health,
                    die.job_uid or "-",
                    rank,
                    die.rank_state,
                ]
            )
        s.show(answer, ["DIE", "HOLD", "HEALTH", "JOB", "RANK", "SEAT"], rows)

    s.run(work)


def cordon(
    ctx: typer.Context,
    subject: Subject,
    message: Annotated[str, typer.Option("--message", "-m", help="why")] = "",
    output: Output = "",
) -> None:
    """Forbid new work on a part of the machine; what runs goes on.

    Example: `raddle cordon sn0/n07 -m "fan noise"`
    """
    from raddle.v1 import scheduler_pb2

    s = session(ctx, output)

    async def work(stub: Any) -> None:
        request = scheduler_pb2.CordonRequest(subject=subject, message=message)
        answer = await stub.Cordon(request, timeout=s.timeout_s)
        hold = answer.hold
        s.show(answer, ["SUBJECT", "HOLD", "WHY"], [[hold.subject, hold.kind, hold.message]])

    s.run(work)


def uncordon(ctx: typer.Context, subject: Subject, output: Output = "") -> None:
    """Lift a cordon: the part takes work again, unless a drain or another cordon covers it.

    Example: `raddle uncordon sn0/n07`
    """
    from raddle.v1 import scheduler_pb2

    s = session(ctx, output)

    async def work(stub: Any) -> None:
        request = scheduler_pb2.UncordonRequest(subject=subject)
        answer = await stub.Uncordon(request, timeout=s.timeout_s)
        held = ", ".join(f"{hold.kind} on {hold.subject}" for hold in answer.holds)
        said = f"the cordon is lifted; still held by {held}" if held else "takes work again"
        s.tell(answer, f"{subject}: {said}")

    s.run(work)


def lost(
    ctx: typer.Context,
    node: Annotated[str, typer.Argument(help="position of the node, sn0/n07")],
    message: Annotated[str, typer.Option("--message", "-m", help="how you know")] = "",
    output: Output = "",
) -> None:
    """Say that a silent node is gone: what ran there moves. Refused while its agent reports.

    Example: `raddle lost sn0/n07 -m "no power in rack 2"`
    """
    from raddle.v1 import scheduler_pb2

    s = session(ctx, output)

    async def work(stub: Any) -> None:
        request = scheduler_pb2.DeclareNodeLostRequest(node=node, message=message)
        answer = await stub.DeclareNodeLost(request, timeout=s.timeout_s)
        s.tell(answer, f"{node} is lost: {answer.why.message}")

    s.run(work)


_MAINTENANCE = ["ID", "SUBJECT", "STATE", "MOVED", "TOTAL", "WHY"]


def _maintenance_row(record: Any) -> list[Any]:
    from raddle.v1 import incident_pb2

    state = incident_pb2.MaintenanceState.Name(record.state).removeprefix("MAINTENANCE_STATE_")
    moved, total = record.ranks_moved, record.ranks_total
    return [record.id, record.subject, state, moved, total, record.why.message]


def drain(
    ctx: typer.Context,
    subject: Annotated[
        str, typer.Argument(help="position, or with --cancel a maintenance id")
    ] = "",
    deadline: Annotated[
        float, typer.Option(help="seconds until the drain gives up", callback=seconds)
    ] = 3600.0,
    message: Annotated[str, typer.Option("--message", "-m", help="why")] = "",
    wait: Annotated[bool, typer.Option(help="wait until nothing runs there")] = False,
    dry_run: Annotated[
        bool, typer.Option(help="say how many ranks would move, change nothing, wait for nothing")
    ] = False,
    cancel: Annotated[bool, typer.Option(help="cancel the maintenance with this id")] = False,
    output: Output = "",
) -> None:
    """Move what runs away from a part of the machine; without a subject list all drains.

    Examples: `raddle drain sn0/n07 --wait`, `raddle drain m-12ab34cd --cancel`, `raddle drain`
    """
    from google.protobuf.duration_pb2 import Duration

    from raddle.v1 import incident_pb2, scheduler_pb2

    s = session(ctx, output)

    async def work(stub: Any) -> int:
        if not subject:
            request = scheduler_pb2.ListMaintenancesRequest()
            listed = await stub.ListMaintenances(request, timeout=s.timeout_s)
            s.show(listed, _MAINTENANCE, [_maintenance_row(m) for m in listed.maintenances])
            return 0
        if cancel:
            gone = scheduler_pb2.CancelMaintenanceRequest(id=subject)
            answer = await stub.CancelMaintenance(gone, timeout=s.timeout_s)
        else:
            made = scheduler_pb2.CreateMaintenanceRequest(
                subject=subject,
                timeout=Duration(seconds=int(deadline), nanos=int(deadline % 1 * 1e9)),
                message=message,
                dry_run=dry_run,
            )
            answer = await stub.CreateMaintenance(made, timeout=s.timeout_s)
        record = answer.maintenance
        while wait and record.id and record.state == incident_pb2.MAINTENANCE_STATE_DRAINING:
            await asyncio.sleep(_POLL_S)
            get = scheduler_pb2.GetMaintenanceRequest(id=record.id)
            record = (await stub.GetMaintenance(get, timeout=s.timeout_s)).maintenance
        s.show(record, _MAINTENANCE, [_maintenance_row(record)])
        return 1 if record.state == incident_pb2.MAINTENANCE_STATE_EXPIRED else 0

    s.run(work)


def inject(
    ctx: typer.Context,
    subject: Subject,
    code: Annotated[
        str, typer.Option(help="fault code as the device would report it")
    ] = "80E18005",
    level: Annotated[str, typer.Option(help="fault level, e.g. SEPARATE_NPU")] = "SEPARATE_NPU",
    clear: Annotated[bool, typer.Option(help="clear the code instead")] = False,
    output: Output = "",
) -> None:
    """Set a fault on a simulated device, as a rehearsal; refused unless the scheduler allows it.

    Example: `raddle inject sn0/n07/npu3/die1`
    """
    from raddle.v1 import health_pb2, scheduler_pb2

    s = session(ctx, output)
    names = [name.removeprefix("FAULT_LEVEL_") for name in health_pb2.FaultLevel.keys()]  # noqa: SIM118
    if level not in names[1:]:
        raise typer.BadParameter(f"must be one of {', '.join(names[1:])}", param_hint="--level")

    async def work(stub: Any) -> None:
        request = scheduler_pb2.InjectFaultRequest(
            subject=subject,
            code=code,
            level=health_pb2.FaultLevel.Value(f"FAULT_LEVEL_{level}"),
            clear=clear,
        )
        answer = await stub.InjectFault(request, timeout=s.timeout_s)
        s.show(answer, ["RESULT"], [[answer.why.message]])

    s.run(work)


def supernode(
    ctx: typer.Context,
    machine: Annotated[str, typer.Argument(help="built-in machine or YAML file")],
    output: Output = "",
) -> None:
    """Apply the description of a supernode; the same one again changes nothing.

    Example: `raddle supernode cloudmatrix384`
    """
    from raddle.cli.session import fail
    from raddle.machines import load_machine
    from raddle.v1 import scheduler_pb2, topology_pb2
    from raddle.wire.codec import to_message

    s = session(ctx, output)
    try:
        described = load_machine(machine)
    except RaddleError as error:
        fail(error)

    async def work(stub: Any) -> None:
        request = scheduler_pb2.ApplySuperNodeRequest(
            supernode=to_message(described, topology_pb2.SuperNode)
        )
        answer = await stub.ApplySuperNode(request, timeout=s.timeout_s)
        found = answer.supernode
        rows = [[found.name, found.machine, found.nodes, answer.changed]]
        s.show(answer, ["SUPERNODE", "MACHINE", "NODES", "CHANGED"], rows)

    s.run(work)


def register(app: typer.Typer) -> None:
    for command in (nodes, dies, cordon, uncordon, lost, drain, inject, supernode):
        app.command()(command)
