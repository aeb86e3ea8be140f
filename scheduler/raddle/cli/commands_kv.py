"""Commands about KV caches: status, locate, and what a trace makes of a pool (simulate)."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raddle.cli.commands_jobs import find_job
from raddle.cli.options import Output, session
from raddle.core.kvcache.figures import (
    BLOCK_BYTES,
    PREFILL_TOKENS_PER_S,
    REPAIR_BYTES_PER_S,
    WRITE_BYTES_PER_S,
)
from raddle.model.errors import PermanentError, RaddleError, Reason
from raddle.model.kv import TraceRequest

if TYPE_CHECKING:
    from raddle.core.kvcache.replay import Action, ReplayConfig, ReplayResult

FORMATS = ("mooncake", "azure", "servegen")
#: More take minutes: every block is ranked over all hosts.
HOSTS_MAX = 1_024
RANKS_MAX = 100_000
_GIB = 1 << 30
_POOL_GIB_MAX, _POOL_BLOCKS_MAX = 1e9, 10**12
_BLOCK_BYTES_MAX = 1 << 40
_RATE_MAX = 1e18
_NO_IDS = "the trace carries no block ids: no block is shared"
_MADE_UP = "the trace carries no block ids: sharing is made up by --synthetic-prefix"

app = typer.Typer(
    name="kv",
    help="Where KV blocks are, and what a pool would do.\n\nExample: `raddle kv status chat`",
)


JobName = Annotated[str, typer.Argument(help="job name or uid")]


@app.command()
def status(ctx: typer.Context, job: JobName, output: Output = "") -> None:
    """Show a job's pool: members, copies, hit rate, and what became of lost sequences.

    Example: `raddle kv status chat`
    """
    from raddle.v1 import scheduler_pb2

    s = session(ctx, output)

    async def work(stub: Any) -> None:
        found = (await find_job(stub, job, s.context.namespace, s.timeout_s)).job
        request = scheduler_pb2.GetKvStatusRequest(job_uid=found.uid)
        answer = await stub.GetKvStatus(request, timeout=s.timeout_s)
        rows = [
            ["blocks", answer.blocks],
            ["blocks by copies (0, 1, ...)", " ".join(map(str, answer.blocks_by_copies))],
            ["copies wanted", answer.replicas],
            ["protection", f"{answer.protection:.4f}"],
            ["time to protection", f"{seconds_of(answer.time_to_protection):.1f} s"],
            ["hit rate", f"{answer.hit_rate:.3f}"],
            ["tokens restored", answer.kv_tokens_restored],
            ["tokens recomputed", answer.kv_tokens_recomputed],
        ]
        rows += [
            [f"{m.rank.role}/{m.rank.instance}/{m.rank.rank} on {m.node}", _member(m)]
            for m in answer.members
        ]
        rows += [[f"incident {one.incident_id}", _told(one)] for one in answer.recoveries]
        s.show(answer, ["WHAT", "VALUE"], rows)

    s.run(work)


def _member(member: Any) -> str:
    """A pool member in a line: what it holds, and what it makes again."""
    text = f"{member.blocks} blocks"
    repair = member.repair
    if repair.copies_made or repair.copies_left:
        left = f"{repair.copies_left} left ({seconds_of(repair.left):.1f} s)"
        text += f", {repair.copies_made} copies made again, {left}"
    return text + (", hands its blocks on" if member.draining else "")


def seconds_of(duration: Any) -> float:
    return float(duration.seconds + duration.nanos / 1e9)


def _told(one: Any) -> str:
    """One recovery in a line."""
    times = [
        f"{name} back in {seconds_of(actual):.3f} s ({seconds_of(predicted):.3f} s predicted)"
        for name, actual, predicted in (
            ("half", one.median_actual, one.median_predicted),
            ("all", one.last_actual, one.last_predicted),
        )
    ]
    return (
        f"{one.sequences_back} of {one.sequences} sequences back, {one.kv_tokens_restored} tokens"
        f" restored, {one.kv_tokens_recomputed} recomputed; {', '.join(times)}"
    )


@app.command()
def locate(
    ctx: typer.Context,
    job: JobName,
    block_hashes: Annotated[list[str], typer.Argument(help="hexadecimal hashes, in order")],
    lora: Annotated[str, typer.Option(help="blocks made with this adapter")] = "",
    tenant_salt: Annotated[str, typer.Option(help="blocks of this tenant, `tenant|salt`")] = "",
    kv_group: Annotated[int, typer.Option(min=0, help="blocks of this group of layers")] = 0,
    output: Output = "",
) -> None:
    """Say where copies of blocks are, and how long a prefix of them is present.

    Example: `raddle kv locate chat 0c7d55a41b337e2d770d6b52eacd6141 --lora sql`
    """
    from raddle.v1 import engine_pb2, scheduler_pb2

    s = session(ctx, output)

    async def work(stub: Any) -> None:
        found = (await find_job(stub, job, s.context.namespace, s.timeout_s)).job
        request = scheduler_pb2.LocateKvBlocksRequest(
            job_uid=found.uid,
            block_hashes=block_hashes,
            lora=lora,
            tenant_salt=tenant_salt,
            kv_group=kv_group,
        )
        answer = await stub.LocateKvBlocks(request, timeout=s.timeout_s)
        rows = []
        for block in answer.blocks:
            places = [
                f"{p.rank.role}/{p.rank.instance}/{p.rank.rank} on {p.node}"
                f" ({engine_pb2.KvTier.Name(p.tier).removeprefix('KV_TIER_')})"
                for p in block.places
            ]
            rows.append([block.block_hash, len(places), ", ".join(places) or "-"])
        s.show(answer, ["BLOCK", "COPIES", "WHERE"], rows)

    s.run(work)


def moments(values: list[str] | None, kind_name: str, option: str) -> list[Action]:
    """SECOND:NUMBER of an option that may be given many times.

    Raises:
        BadParameter: not in that form.
    """
    from raddle.core.kvcache.replay import Action, ActionKind

    kind = ActionKind[kind_name]
    found = []
    for value in values or ():
        second, _, number = value.rpartition(":")
        try:
            action = Action(float(second), kind, int(number))
        except ValueError as error:
            raise typer.BadParameter(
                f"{value!r} must be SECOND:NUMBER, such as 1800:3", param_hint=option
            ) from error
        if not 0 <= action.time_s < float("inf") or action.subject < 0:
            raise typer.BadParameter(
                f"{value!r}: second and number must be at least 0", param_hint=option
            )
        if kind is not ActionKind.LOSE_RANK and action.subject >= HOSTS_MAX:
            raise typer.BadParameter(
                f"{value!r}: hosts are 0 to {HOSTS_MAX - 1}", param_hint=option
            )
        found.append(action)
    return found


def _rate(help_text: str) -> Any:
    return typer.Option(min=1, max=_RATE_MAX, help=help_text)


def _hosts(help_text: str) -> Any:
    return typer.Option(metavar="SECOND:HOST", help=help_text)


Trace = Annotated[Path, typer.Option(help="file of a public trace")]
Form = Annotated[str, typer.Option("--format", help=f"one of {', '.join(FORMATS)}")]
Hosts = Annotated[int, typer.Option(min=1, max=HOSTS_MAX, help="pool hosts 0 to N-1, one a node")]
Gib = Annotated[
    float | None,
    typer.Option(min=0, max=_POOL_GIB_MAX, help="memory of all hosts together, GiB"),
]
Blocks = Annotated[
    int | None,
    typer.Option(min=0, max=_POOL_BLOCKS_MAX, help="copies that fit into all hosts together"),
]
Replicas = Annotated[int, typer.Option(min=1, max=16, help="copies of each block")]
Fail = Annotated[list[str] | None, _hosts("a host is lost with its copies")]
Drain = Annotated[list[str] | None, _hosts("a host is emptied, then leaves")]
Join = Annotated[list[str] | None, _hosts("an empty host comes")]
Ranks = Annotated[int, typer.Option(min=0, max=RANKS_MAX, help="decode ranks 0 to N-1, 16 a node")]
LoseRank = Annotated[
    list[str] | None, typer.Option(metavar="SECOND:RANK", help="a decode rank is lost")
]
BlockBytes = Annotated[int, typer.Option(min=1, max=_BLOCK_BYTES_MAX, help="bytes of a block")]
RepairRate = Annotated[float, _rate("repair's budget of each host")]
WriteRate = Annotated[float, _rate("write-back of one rank")]
PrefillRate = Annotated[float, _rate("rate of a prefill instance")]
Synthetic = Annotated[bool, typer.Option(help="make sharing up for traces without block ids")]
Plot = Annotated[Path | None, typer.Option(help="draw a .png or .svg")]
Seed = Annotated[int, typer.Option(min=0, help="of everything that is drawn")]


@app.command()
def simulate(  # noqa: PLR0913, PLR0917 - the options of one experiment
    ctx: typer.Context,
    trace: Trace,
    form: Form = "mooncake",
    hosts: Hosts = 48,
    pool_gib: Gib = None,
    pool_blocks: Blocks = None,
    replicas: Replicas = 1,
    fail: Fail = None,
    drain: Drain = None,
    join: Join = None,
    ranks: Ranks = 0,
    lose_rank: LoseRank = None,
    block_bytes: BlockBytes = BLOCK_BYTES,
    repair_bytes_per_second: RepairRate = REPAIR_BYTES_PER_S,
    write_bytes_per_second: WriteRate = WRITE_BYTES_PER_S,
    prefill_tokens_per_second: PrefillRate = PREFILL_TOKENS_PER_S,
    synthetic_prefix: Synthetic = False,
    plot: Plot = None,
    seed: Seed = 0,
    output: Output = "",
) -> None:
    """Replay a trace against a pool: hit rate, losses, repair, and lost ranks' sequences.

    A pool without --pool-gib or --pool-blocks is infinite. SECOND is trace time; past the end it
    is after the last request.

    Example: `raddle kv simulate --trace conversation_trace.jsonl --pool-gib 2048 --replicas 2
    --fail 1800:3 --output json`
    """
    from raddle.cli.session import fail as leave_with
    from raddle.core.kvcache.replay import ReplayConfig

    if form not in FORMATS:
        raise typer.BadParameter(f"must be one of {', '.join(FORMATS)}", param_hint="--format")
    if synthetic_prefix and form == "mooncake":
        raise typer.BadParameter(
            "the mooncake format carries block ids, no sharing is made up",
            param_hint="--synthetic-prefix",
        )
    if lose_rank and not ranks:
        raise typer.BadParameter("needs --ranks", param_hint="--lose-rank")
    if pool_gib is not None and pool_blocks is not None:
        raise typer.BadParameter("give --pool-gib or --pool-blocks", param_hint="--pool-blocks")
    if pool_gib is not None:
        pool_blocks = int(pool_gib * _GIB) // block_bytes
    config = ReplayConfig(
        hosts=hosts,
        pool_blocks=pool_blocks,
        replicas=replicas,
        ranks=ranks,
        block_bytes=block_bytes,
        repair_bytes_per_s=repair_bytes_per_second,
        write_bytes_per_s=write_bytes_per_second,
        prefill_tokens_per_s=prefill_tokens_per_second,
    )
    actions = [
        *moments(fail, "FAIL", "--fail"),
        *moments(drain, "DRAIN", "--drain"),
        *moments(join, "JOIN", "--join"),
        *moments(lose_rank, "LOSE_RANK", "--lose-rank"),
    ]
    s = session(ctx, output)
    source = Source(trace, form, seed, synthetic_prefix=synthetic_prefix)
    try:
        data = simulated(config, actions, source, plot)
    except RaddleError as error:
        leave_with(error)
    s.show_values(data)


@dataclass(frozen=True, slots=True)
class Source:
    """Where requests come from."""

    path: Path
    form: str
    seed: int
    synthetic_prefix: bool


def simulated(
    config: ReplayConfig, actions: list[Action], source: Source, plot: Path | None
) -> dict[str, Any]:
    """Replay, draw if asked to, and give the figures.

    Raises:
        PermanentError: INVALID_ARGUMENT.
    """
    from raddle.core.kvcache.replay import Replay, check_actions

    if plot is not None:
        check_plot(plot)
    check_actions(config, actions)
    requests = read_trace(source)
    actions = in_trace_time(actions, requests)
    result = Replay(config, requests, actions).run()
    if plot is not None:
        draw(plot, result, actions)
    lost_ranks = any(action.kind.name == "LOSE_RANK" for action in actions)
    data = result_data(config, result, source.form, lost_ranks=lost_ranks)
    if source.form != "mooncake":
        data["synthetic_prefix"] = source.synthetic_prefix
        data["note"] = _MADE_UP if source.synthetic_prefix else _NO_IDS
        if not source.synthetic_prefix:
            data["hit_rate"] = None
    return data


def read_trace(source: Source) -> list[TraceRequest]:
    """The requests of a trace file, in order.

    Raises:
        PermanentError: INVALID_ARGUMENT; also for a trace without requests.
    """
    from raddle.traces import formats

    rng = random.Random(source.seed)  # noqa: S311 - it must repeat, nothing secret is drawn
    if source.form == "mooncake":
        requests = formats.read_mooncake(source.path, rng)
    else:
        read = formats.read_azure if source.form == "azure" else formats.read_servegen
        requests = read(source.path, rng, synthetic_prefix=source.synthetic_prefix)
    if not requests:
        raise PermanentError(Reason.INVALID_ARGUMENT, f"{source.path.name} holds no request.")
    return requests


def in_trace_time(actions: list[Action], requests: list[TraceRequest]) -> list[Action]:
    """The actions, those past the trace's last stamp after the last request.

    The last batch is spread beyond its stamp, so what follows it moves along.
    """
    from dataclasses import replace

    last_s = max(request.arrival_s for request in requests)
    stamp_s = max(request.stamp_s for request in requests)
    shift_s = last_s - stamp_s
    return [replace(a, time_s=a.time_s + shift_s) if a.time_s > stamp_s else a for a in actions]


def result_data(
    config: ReplayConfig, result: ReplayResult, form: str, *, lost_ranks: bool
) -> dict[str, Any]:
    """The figures by the names that scripts rely on."""
    copies = config.pool_blocks
    data: dict[str, Any] = {
        "format": form,
        "hosts": config.hosts,
        "replicas": config.replicas,
        "pool_blocks": copies,
        "pool_gib": None if copies is None else round(copies * config.block_bytes / _GIB, 3),
        "requests": result.requests,
        "references": result.references,
        "unique_blocks": result.unique_blocks,
        "hits": result.hits,
        "hit_rate": result.hits / result.references if result.references else 0.0,
        "recovery_bytes": result.recovery_copies * config.block_bytes,
        "drain_bytes": result.drain_copies * config.block_bytes,
        "unprotected_seconds": result.unprotected_s,
        "blocks_lost": result.blocks_lost,
        "blocks_evicted": result.blocks_evicted,
    }
    if lost_ranks:
        data["sequences_lost"] = result.sequences_lost
        data["tokens_recomputed"] = result.tokens_recomputed
        data["tokens_recomputed_without_pool"] = result.tokens_recomputed_without_pool
    return data


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be written when all is done; nothing is made yet.

    Raises:
        PermanentError: INVALID_ARGUMENT.
    """
    if path.suffix.lower() not in {".png", ".svg"}:
        raise PermanentError(Reason.INVALID_ARGUMENT, f"--plot {path}: must end in .png or .svg.")
    place = path if path.exists() else path.parent
    if path.is_dir() or not place.exists() or not os.access(place, os.W_OK):
        raise PermanentError(
            Reason.INVALID_ARGUMENT, f"--plot {path} cannot be written: choose another place."
        )


def draw(path: Path, result: ReplayResult, actions: list[Action]) -> None:
    """Hit rate, blocks in the pool and blocks without enough copies over trace time.

    Raises:
        PermanentError: INVALID_ARGUMENT: no library to draw with, or no place for the file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PermanentError(
            Reason.INVALID_ARGUMENT, "--plot needs matplotlib: install raddle[plot]."
        ) from error
    figure = Figure(figsize=(9, 6), layout="constrained")
    rates, blocks = figure.subplots(2, 1, sharex=True)
    times = [sample.time_s for sample in result.samples]
    rates.plot(times, [s.hits / s.references if s.references else 0.0 for s in result.samples])
    rates.set_ylabel("hit rate since the beginning")
    rates.set_ylim(0, 1)
    blocks.plot(times, [s.blocks for s in result.samples], label="blocks in the pool")
    blocks.plot(times, [s.blocks_below for s in result.samples], label="without enough copies")
    blocks.set_ylabel("blocks")
    blocks.set_xlabel("trace time, s")
    blocks.legend()
    for action in actions:
        for axes in (rates, blocks):
            axes.axvline(action.time_s, color="grey", linewidth=0.8, linestyle=":")
        name = f"{action.kind.name.lower().replace('_', ' ')} {action.subject}"
        rates.annotate(name, (action.time_s, 0.95), rotation=90, va="top", fontsize=8)
    try:
        figure.savefig(path, format=path.suffix[1:].lower())
    except OSError as error:
        raise PermanentError(
            Reason.INVALID_ARGUMENT, f"{path} cannot be written: {error}."
        ) from error


def register(root: typer.Typer) -> None:
    root.add_typer(app)
