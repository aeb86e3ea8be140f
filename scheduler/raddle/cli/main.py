"""`raddle`: the command line. Commands import what they need when they run."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as package_version
from typing import Annotated

import typer

from raddle.cli.options import Output, require_output, seconds
from raddle.model.errors import PermanentError, RaddleError, Reason

app = typer.Typer(
    name="raddle",
    help="Schedule inference jobs on an AI supernode and keep them running when dies fail.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(value: bool) -> None:
    if value:
        sys.stdout.write(f"raddle {package_version('raddle')}\n")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    server: Annotated[
        str, typer.Option(envvar="RADDLE_SERVER", help="address of a scheduler, host:port")
    ] = "",
    context: Annotated[
        str, typer.Option(envvar="RADDLE_CONTEXT", help="context of the configuration file")
    ] = "",
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="namespace of jobs")] = "",
    output: Output = "",
    timeout: Annotated[
        float, typer.Option(help="seconds that a call may take", callback=seconds)
    ] = 10.0,
    version: Annotated[  # noqa: ARG001 - the callback acts
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="version")
    ] = False,
) -> None:
    """Global options come before the command: `raddle --output json status`."""
    require_output(output)
    ctx.obj = {
        "server": server,
        "context": context,
        "namespace": namespace,
        "output": output,
        "timeout": timeout,
    }


def _register() -> None:
    from raddle.cli.commands_certificates import register as certificates
    from raddle.cli.commands_demo import register as demo
    from raddle.cli.commands_experts import register as experts
    from raddle.cli.commands_history import register as history
    from raddle.cli.commands_jobs import register as jobs
    from raddle.cli.commands_kv import register as kv
    from raddle.cli.commands_machine import register as machine

    for register in (jobs, machine, history, experts, kv, certificates, demo):
        register(app)


_register()


def require_text_arguments(arguments: list[str]) -> None:
    """Refuse bytes that are no UTF-8: they fit into no message.

    Raises:
        PermanentError: INVALID_ARGUMENT.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise PermanentError(
                Reason.INVALID_ARGUMENT, f"argument {argument!r} is no UTF-8."
            ) from error


def main() -> None:
    """Entry point."""
    # gRPC's own lines about connections are nothing to the user; read when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from raddle.cli.session import fail
    from raddle.telemetry.logging import configure_logging

    # Parts that run in this process log, and stdout is for data.
    configure_logging("cli")
    try:
        require_text_arguments(sys.argv[1:])
        app(prog_name="raddle")
    except RaddleError as error:
        fail(error)


if __name__ == "__main__":
    main()
