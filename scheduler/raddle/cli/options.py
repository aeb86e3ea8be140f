"""What commands share: the session behind the global options, and an output option of their own."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from raddle.model.errors import RaddleError

Output = Annotated[str, typer.Option("--output", "-o", help="table, json or yaml")]


OUTPUTS = ("table", "json", "yaml")


def session(ctx: typer.Context, output: str = "") -> Any:
    """The session of this call; an output option after the command wins."""
    from raddle.cli.contexts import choose_context
    from raddle.cli.session import Session, fail

    given, form = ctx.obj, output_of(ctx, output)
    try:
        chosen = choose_context(given["context"], given["server"], given["namespace"])
    except RaddleError as error:
        fail(error)
    return Session(chosen, form, given["timeout"])


def output_of(ctx: typer.Context, output: str, default: str = "table") -> str:
    """The form of what goes to stdout: the option after the command, the one before it, a table.

    Raises:
        BadParameter: no form that there is.
    """
    require_output(output)
    return output or ctx.obj["output"] or default


def require_output(output: str) -> None:
    """Refuse a form that there is not; empty is not named.

    Raises:
        BadParameter: it is none of `OUTPUTS`.
    """
    if output and output not in OUTPUTS:
        raise typer.BadParameter(f"must be one of {', '.join(OUTPUTS)}", param_hint="--output")


SECONDS_MAX = 10 * 365 * 86_400.0


def seconds(value: float) -> float:
    """A time that one can wait for.

    Raises:
        BadParameter: not finite, not above 0, or more than ten years.
    """
    if not math.isfinite(value) or not 0 < value <= SECONDS_MAX:
        raise typer.BadParameter(f"must be a number of seconds above 0, at most {SECONDS_MAX:g}")
    return value
