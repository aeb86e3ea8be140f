"""Commands about what happened, and about the command line itself: incidents, events, config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from raddle.cli.options import Output, output_of, session
from raddle.model.errors import PermanentError, RaddleError, Reason

config_app = typer.Typer(help="Contexts of the command line.", no_args_is_help=True)


def _phase(incident: Any) -> str:
    from raddle.v1 import incident_pb2

    return incident_pb2.IncidentPhase.Name(incident.phase).removeprefix("INCIDENT_PHASE_")


def _row(incident: Any) -> list[Any]:
    total = sum(e.duration.seconds * 1e3 + e.duration.nanos / 1e6 for e in incident.timeline)
    return [incident.id, incident.subject, _phase(incident), f"{total:.0f}", incident.why.message]


def incidents(
    ctx: typer.Context,
    incident: Annotated[str, typer.Argument(help="only this one, with its plan")] = "",
    output: Output = "",
) -> None:
    """List incidents, newest first; `raddle explain incident/ID` tells one whole.

    Example: `raddle incidents`
    """
    from raddle.v1 import scheduler_pb2

    s = session(ctx, output)
    columns = ["ID", "SUBJECT", "PHASE", "TOTAL MS", "WHY"]

    async def work(stub: Any) -> None:
        if incident:
            one = scheduler_pb2.GetIncidentRequest(id=incident)
            answer = await stub.GetIncident(one, timeout=s.timeout_s)
            s.show(answer, columns, [_row(answer.incident)])
            return
        listed = await stub.ListIncidents(
            scheduler_pb2.ListIncidentsRequest(page_size=1000), timeout=s.timeout_s
        )
        s.show(listed, columns, [_row(item) for item in listed.incidents])

    s.run(work)


def events(
    ctx: typer.Context,
    subject: Annotated[str, typer.Argument(help="only of this job, node or die")] = "",
    last: Annotated[int, typer.Option(help="how many")] = 100,
    output: Output = "",
) -> None:
    """Show the history, newest last.

    Example: `raddle events --last 20`
    """
    from raddle.v1 import scheduler_pb2

    s = session(ctx, output)

    async def work(stub: Any) -> None:
        request = scheduler_pb2.ListEventsRequest(subject=subject, page_size=last)
        answer = await stub.ListEvents(request, timeout=s.timeout_s)
        rows = [
            [e.time.ToJsonString(), e.kind, e.subject, e.epoch or "", e.message, e.identity]
            for e in answer.events
        ]
        s.show(answer, ["TIME", "KIND", "SUBJECT", "EPOCH", "MESSAGE", "BY"], rows)

    s.run(work)


def version(ctx: typer.Context, output: Output = "") -> None:
    """Show the versions of this program and of the server, and who leads.

    Example: `raddle version`
    """
    from importlib.metadata import version as package_version

    from raddle.v1 import scheduler_pb2

    s = session(ctx, output)

    async def work(stub: Any) -> None:
        answer = await stub.GetStatus(scheduler_pb2.GetStatusRequest(), timeout=s.timeout_s)
        client = package_version("raddle")
        rows = [[client, answer.version, answer.leader_identity, answer.store_version]]
        s.show(answer, ["CLIENT", "SERVER", "LEADER", "ETCD"], rows)

    s.run(work)


@config_app.command("check")
def config_check() -> None:
    """Read the configuration and say whether it is right.

    Example: `raddle config check`
    """
    from raddle.cli.contexts import config_path, load_config
    from raddle.cli.session import fail, say

    try:
        config = load_config(strict=True)
        if config.current and config.current not in config.contexts:
            raise PermanentError(
                Reason.INVALID_ARGUMENT,
                f"{config_path()}: the current context {config.current!r} does not exist.",
            )
        for context in config.contexts.values():
            context.check()
    except RaddleError as error:
        fail(error)
    say(f"{config_path()}: {len(config.contexts)} contexts, current {config.current or 'none'}")


@config_app.command("contexts")
def config_contexts(ctx: typer.Context, output: Output = "") -> None:
    """List the contexts.

    Example: `raddle config contexts`
    """
    from dataclasses import asdict

    from raddle.cli.contexts import load_config
    from raddle.cli.session import fail, print_data, print_table

    form = output_of(ctx, output)
    try:
        config = load_config()
    except RaddleError as error:
        fail(error)
    if form != "table":
        print_data(asdict(config), form)
        return
    rows = [
        ["*" if name == config.current else "", name, c.server, c.namespace]
        for name, c in sorted(config.contexts.items())
    ]
    print_table(["", "NAME", "SERVER", "NAMESPACE"], rows)


@config_app.command("set-context")
def config_set_context(
    name: Annotated[str, typer.Argument(help="name of the context")],
    server: Annotated[str, typer.Option(help="address of a scheduler")],
    namespace: Annotated[str, typer.Option(help="namespace of jobs")] = "default",
    ca: Annotated[str, typer.Option(help="CA (PEM)")] = "",
    certificate: Annotated[str, typer.Option(help="our certificate (PEM)")] = "",
    key: Annotated[str, typer.Option(help="our key (PEM)")] = "",
) -> None:
    """Add or change a context and make it the current one; TLS needs all three files.

    Example: `raddle config set-context lab --server 10.0.0.5:7400 --namespace team-a`
    """
    from raddle.cli.contexts import CliConfig, CliContext, load_config, save_config
    from raddle.cli.session import fail

    for what, text in (("name", name), ("--server", server)):
        if not text or not text.isprintable() or (what == "name" and "/" in text):
            raise typer.BadParameter(f"{what} must be a printable text, and a name has no slash")
    try:
        config = load_config()
        made = CliContext(server, namespace, _whole(ca), _whole(certificate), _whole(key))
        made.check()
        save_config(CliConfig(name, config.contexts | {name: made}))
    except RaddleError as error:
        fail(error)


def _whole(path: str) -> str:
    """The file is named from any folder later."""
    return str(Path(path).expanduser().absolute()) if path else ""


@config_app.command("use-context")
def config_use_context(name: Annotated[str, typer.Argument(help="name of the context")]) -> None:
    """Make a context the current one.

    Example: `raddle config use-context lab`
    """
    from raddle.cli.contexts import CliConfig, choose_context, load_config, save_config
    from raddle.cli.session import fail

    try:
        choose_context(name, "", "")
        save_config(CliConfig(name, load_config().contexts))
    except RaddleError as error:
        fail(error)


def register(app: typer.Typer) -> None:
    for command in (incidents, events, version):
        app.command()(command)
    app.add_typer(config_app, name="config")
