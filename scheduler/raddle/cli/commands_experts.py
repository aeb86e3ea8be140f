"""`raddle experts ...`: place, repair, rebalance, check, cover and convert expert maps in files.

No server is asked: the decision core runs here, on files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from raddle.cli.options import Output, output_of, seconds
from raddle.model.errors import PermanentError, RaddleError, Reason

app = typer.Typer(
    help="""Expert maps in files: place, repair, rebalance, check, coverage, convert.

    Example: `raddle experts place --loads L.npy --dies 32 --slots-per-die 9 --out map.json`
    """,
    no_args_is_help=True,
)

DEFAULT_EXPERT_BYTES = 44_040_192
Loads = Annotated[Path, typer.Option("--loads", help="[layers, experts]: .npy, CSV or JSON")]
MapOption = Annotated[Path, typer.Option("--map", help="file of the map")]
MapArgument = Annotated[Path, typer.Argument(help="file of the map")]
Out = Annotated[Path, typer.Option("--out", help="file for the new map")]
Machine = Annotated[str, typer.Option(help="built-in machine or YAML file")]
Form = Annotated[
    str,
    typer.Option("--map-format", help="raddle, sglang, vllm, vllm-ascend or deepseek"),
]
Dies = Annotated[
    int, typer.Option("--dies", help="dies of a map whose format does not say it", min=0)
]
Bytes = Annotated[int, typer.Option(help="bytes of one expert in one layer", min=1)]
Slow = Annotated[list[str] | None, typer.Option(help="dies that are slower, die:3=0.5,npu:7=0.8")]
To = Annotated[
    str, typer.Option("--to", help="format of the new map; default: that of the old one")
]
Compact = Annotated[
    bool,
    typer.Option("--compact", help="leave out dies that hold nothing, and number the others anew"),
]
Swaps = Annotated[
    int | None,
    typer.Option(
        help="exchanges a layer; default: as many as reach balance 0.95 within 10 % of the slots",
        min=0,
        max=100_000,
    ),
]


def place(
    ctx: typer.Context,
    loads: Loads,
    dies: Annotated[int, typer.Option(help="dies, from 0", min=1)],
    slots_per_die: Annotated[
        str, typer.Option(help="slots a layer: one number, or one a die: 9,9,8")
    ],
    out: Out,
    machine: Machine = "cloudmatrix384",
    shared_expert_dies: Annotated[
        int, typer.Option(help="the last so many dies hold the shared expert alone", min=0)
    ] = 0,
    slow: Slow = None,
    map_format: Form = "raddle",
    bytes_per_expert: Bytes = DEFAULT_EXPERT_BYTES,
    output: Output = "",
) -> None:
    """Place experts on dies: even, no expert twice on a die, copies in different domains.

    Example: `raddle experts place --loads L.npy --dies 32 --slots-per-die 9 --out map.json`
    """
    from raddle.cli.experts import files, run

    with _explained():
        document = files.new_document(
            machine, dies, files.slots_of(slots_per_die, dies), shared_expert_dies, slow or ()
        )
        wanted = files.read_loads(loads)
        result = run.place(document, wanted)
        files.write(out, result.document, map_format)
        run.show(result, output_of(ctx, output), bytes_per_expert)


def repair(
    ctx: typer.Context,
    map_: MapOption,
    loads: Loads,
    out: Out,
    lost: Annotated[
        list[str] | None, typer.Option(help="what is lost: die:17,npu:3,node:2,rack:0")
    ] = None,
    drained: Annotated[
        list[str] | None, typer.Option(help="what is to be empty but can still be read")
    ] = None,
    joined: Annotated[
        list[str] | None, typer.Option(help="what is back, with nothing in memory")
    ] = None,
    slow: Slow = None,
    swaps: Swaps = None,
    map_format: Form = "raddle",
    to: To = "",
    compact: Compact = False,
    dies: Dies = 0,
    machine: Machine = "cloudmatrix384",
    bytes_per_expert: Bytes = DEFAULT_EXPERT_BYTES,
    output: Output = "",
) -> None:
    """Repair a map after dies were lost, drained, slowed or came back: keep what is fine.

    Options that name dies may be repeated. If there are too few slots for all experts, the map
    is written all the same, the experts without a copy are named and the exit code is 1.

    Example: `raddle experts repair --map map.json --loads L.npy --lost die:17 --out new.json`
    """
    from raddle.cli.experts import files, run
    from raddle.cli.session import EXIT_FAILED

    with _explained():
        before = files.read(map_, map_format, dies, machine)
        wanted = files.read_loads(loads)
        after, fresh = files.changed(
            before, lost=lost or (), drained=drained or (), joined=joined or (), slow=slow or ()
        )
        rates = files.bandwidths(machine, bytes_per_expert)
        result = run.repair(before, after, wanted, fresh, swaps, rates)
        files.write(out, result.document, to or map_format, compact=compact)
        whole = run.show(result, output_of(ctx, output), bytes_per_expert)
    if not whole:
        sys.exit(EXIT_FAILED)


def rebalance(
    ctx: typer.Context,
    map_: MapOption,
    loads: Loads,
    out: Out,
    horizon: Annotated[
        float, typer.Option(help="seconds in which the moves have to pay", callback=seconds)
    ] = 600.0,
    gain: Annotated[
        float, typer.Option(help="smallest gain of balance, 0.05 = 5 %", min=0.0)
    ] = 0.05,
    swaps: Swaps = None,
    map_format: Form = "raddle",
    to: To = "",
    compact: Compact = False,
    dies: Dies = 0,
    machine: Machine = "cloudmatrix384",
    bytes_per_expert: Bytes = DEFAULT_EXPERT_BYTES,
    output: Output = "",
) -> None:
    """Follow drifting loads, if the gain pays for the moves; else the map stays as it is.

    Example: `raddle experts rebalance --map map.json --loads now.npy --out new.json`
    """
    from raddle.cli.experts import files, run

    with _explained():
        before = files.read(map_, map_format, dies, machine)
        wanted = files.read_loads(loads)
        rates = files.bandwidths(machine, bytes_per_expert)
        result = run.rebalance(before, wanted, rates, horizon_s=horizon, gain_min=gain, swaps=swaps)
        files.write(out, result.document, to or map_format, compact=compact)
        run.show(result, output_of(ctx, output), bytes_per_expert)


def check(
    ctx: typer.Context,
    map_: MapArgument,
    map_format: Form = "raddle",
    dies: Dies = 0,
    machine: Machine = "cloudmatrix384",
    output: Output = "",
) -> None:
    """Name every defect of a map, one a line; exit code 1 if there is one.

    Example: `raddle experts check map.json`
    """
    from raddle.cli.experts import files, run
    from raddle.cli.session import EXIT_FAILED

    with _explained():
        clean = run.check(files.inspect(map_, map_format, dies, machine), output_of(ctx, output))
    if not clean:
        sys.exit(EXIT_FAILED)


def coverage(
    ctx: typer.Context,
    map_: MapArgument,
    map_format: Form = "raddle",
    dies: Dies = 0,
    machine: Machine = "cloudmatrix384",
    output: Output = "",
) -> None:
    """Say what a map can lose: the worst one and two members of each level, and the margin.

    Example: `raddle experts coverage map.json`
    """
    from raddle.cli.experts import files, run

    with _explained():
        run.coverage(files.read(map_, map_format, dies, machine), output_of(ctx, output))


def convert(
    map_: MapArgument,
    to: Annotated[str, typer.Option("--to", help="raddle, sglang, vllm, vllm-ascend or deepseek")],
    out: Out,
    map_format: Form = "raddle",
    compact: Compact = False,
    dies: Dies = 0,
    machine: Machine = "cloudmatrix384",
) -> None:
    """Write a map in another format.

    Example: `raddle experts convert --to vllm-ascend map.json --out expert_map.json`
    """
    from raddle.cli.experts import files

    with _explained():
        files.write(out, files.read(map_, map_format, dies, machine), to, compact=compact)


@contextmanager
def _explained() -> Iterator[None]:
    """A refusal ends the program with its sentence and exit code."""
    from raddle.cli.session import fail

    try:
        yield
    except RaddleError as error:
        fail(error)
    except MemoryError:
        fail(PermanentError(Reason.LIMIT_EXCEEDED, "the map is too large for this machine."))


def register(root: typer.Typer) -> None:
    for command in (place, repair, rebalance, check, coverage, convert):
        app.command()(command)
    root.add_typer(app, name="experts")
