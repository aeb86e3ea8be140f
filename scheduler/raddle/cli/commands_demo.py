"""`raddle up` and `raddle demo`: a whole cluster on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from raddle.cli.options import Output, output_of


def up(
    machine: Annotated[str, typer.Option(help="built-in machine or YAML file")] = "cloudmatrix384",
    real_nodes: Annotated[
        int, typer.Option(help="nodes that run ranks of the reference engine", min=0)
    ] = 0,
    schedulers: Annotated[int, typer.Option(help="scheduler replicas", min=1, max=9)] = 1,
    port: Annotated[
        int,
        typer.Option(help="port of the first scheduler; 0 takes a free one", min=0, max=65_535),
    ] = 7400,
    data_dir: Annotated[
        str, typer.Option(help="folder for data and logs (default: a new one)")
    ] = "",
) -> None:
    """Run a whole cluster on this machine until Ctrl-C: etcd, scheduler, agents of all nodes.

    Examples: `raddle up`, `raddle up --machine nvl72 --real-nodes 4`
    """
    import asyncio
    import tempfile

    from raddle.cli.up import run_up

    folder = Path(data_dir or tempfile.mkdtemp(prefix="raddle-up-"))
    code = asyncio.run(
        run_up(folder, machine=machine, real_nodes=real_nodes, schedulers=schedulers, port=port)
    )
    raise typer.Exit(code)


def demo(
    ctx: typer.Context,
    output: Output = "",
    requests: Annotated[int, typer.Option(help="requests of the trace", min=8, max=96)] = 96,
    keep: Annotated[bool, typer.Option(help="keep data and logs")] = False,
) -> None:
    """Show it all: place DeepSeek-R1 on 768 dies, serve real tokens, kill a rank, then a node.

    Examples: `raddle demo`, `raddle demo --output json`
    """
    import asyncio

    from raddle.cli.demo.run import run_demo

    form = output_of(ctx, output)
    raise typer.Exit(asyncio.run(run_demo(output=form, requests=requests, keep=keep)))


def sim(ctx: typer.Context) -> None:
    """Run the real scheduler and agents against faults drawn from a seed, in virtual time.

    Options: --seed, --seeds, --machine, --faults, --jobs, --trace, --output; see `raddle sim
    --help`. Exit code 1 if a seed broke an invariant or did not converge.

    Examples: `raddle sim`, `raddle sim --seed 7 --trace`
    """
    # A process of its own: the command line starts daemons and never imports them.
    form = ctx.obj["output"]
    before = ["--output", form] if form else []
    os.execv(sys.executable, [sys.executable, "-m", "raddle.sim.main", *before, *ctx.args])


def register(app: typer.Typer) -> None:
    app.command()(up)
    app.command()(demo)
    passed_on = {"ignore_unknown_options": True, "allow_extra_args": True}
    app.command(add_help_option=False, context_settings=passed_on)(sim)
