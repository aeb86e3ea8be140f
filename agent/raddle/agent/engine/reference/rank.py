"""One rank of the reference engine as a process: `python -m raddle.agent.engine.reference.rank`.

It serves the `Engine` service to its agent, tokens or blocks to others, and expert traffic to its
peers. It outlives its agent on purpose: a new agent adopts it. In a pod it is started by others,
as process 1, and waits for its agent's word in the folder.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # Nothing ends a process 1 by default, not even while its modules are still loaded.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    # Orphans of what was executed in the pod become a process 1's children: nobody waits for them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import asyncio
import contextlib
import sys
from pathlib import Path

import grpc
import structlog

from raddle.agent.engine.reference.block_store import BlockStore
from raddle.agent.engine.reference.callers import Callers
from raddle.agent.engine.reference.config import (
    CONFIG_FILE,
    RankConfig,
    read_config,
    write_address,
)
from raddle.agent.engine.reference.engine_service import EngineService
from raddle.agent.engine.reference.exchange import ExchangeServer
from raddle.agent.engine.reference.fences import Standing
from raddle.agent.engine.reference.life import LifeLine
from raddle.agent.engine.reference.pool import PoolPeers
from raddle.agent.engine.reference.pool_service import OwnBlocksService, PoolService
from raddle.agent.engine.reference.repair import PoolRepair
from raddle.agent.engine.reference.reports import Reports
from raddle.agent.engine.reference.serving import Serving
from raddle.agent.engine.reference.token_service import TokenService
from raddle.model.errors import PermanentError, RaddleError, Reason
from raddle.model.kinds import RoleKind
from raddle.model.kv import KvTier
from raddle.model.stats import RankState
from raddle.model.types import Fence, RankKey
from raddle.telemetry.addresses import host_port
from raddle.telemetry.channels import OPTIONS
from raddle.telemetry.logging import configure_logging
from raddle.telemetry.tls import require_safe_listen
from raddle.v1 import engine_pb2_grpc, reference_pb2_grpc

# Real engines compute on dies; this one on the host's CPUs, which agents, schedulers and front
# doors need at once when a rank dies.
_NICENESS = 10
# A pod may be up long before its agent has the assignment: it may be updated just now.
CONFIG_TIMEOUT_S = 300.0
_POLL_S = 0.05
EXIT_REFUSED = 2
log = structlog.get_logger()


async def run(config: RankConfig, folder: Path, stop: asyncio.Event) -> None:
    """Serve until told to stop; where, is told in the folder."""
    key = RankKey(role=config.role, instance=config.instance, rank=config.rank)
    is_cache = config.kind is RoleKind.CACHE
    reports = Reports(key, config.incarnation, KvTier.DRAM if is_cache else KvTier.HBM)
    standing = Standing(config.job_uid, config.epoch)
    tls = config.tls()
    callers = () if tls is None else (Callers(config.node),)
    server = grpc.aio.server(options=OPTIONS, interceptors=callers)
    serving: Serving | None = None
    exchange: ExchangeServer | None = None
    peers = PoolPeers(key, config.node, tls)
    repair: PoolRepair | None = None
    if is_cache:
        blocks = BlockStore(config.dram_bytes, reports.kv_changed)
        reports.full_report = blocks.names
        repair = PoolRepair(
            key,
            blocks,
            peers,
            lambda: Fence(job_uid=standing.job_uid, epoch=standing.epoch),
            reports.repaired,
        )
        pool = PoolService(standing, blocks)
        reference_pb2_grpc.add_PoolMemberServicer_to_server(pool, server)
    else:
        serving = Serving(config, key, standing, reports)
        exchange = ExchangeServer(
            config.job_uid, serving.serve_peer, serving.weights, host=config.host, tls=tls
        )
        tokens = TokenService(standing, serving)
        reference_pb2_grpc.add_ReferenceRankServicer_to_server(tokens, server)
        own_blocks = OwnBlocksService(standing, serving.blocks)
        reference_pb2_grpc.add_PoolMemberServicer_to_server(own_blocks, server)
    engine = EngineService(config, key, standing, reports, serving, repair)
    engine_pb2_grpc.add_EngineServicer_to_server(engine, server)
    if tls is None:
        port = server.add_insecure_port(host_port(config.host, 0))
    else:
        port = server.add_secure_port(host_port(config.host, 0), tls.server_credentials())
    await server.start()
    standing.state = RankState.STARTING
    address = host_port(config.host, port)
    data_address = exchange.address if exchange is not None else ""
    write_address(folder, config, address, data_address)
    log.info("rank serves", incarnation=config.incarnation, address=address)
    repairing = asyncio.create_task(repair.run()) if repair is not None else None
    await stop.wait()
    if repairing is not None:
        repairing.cancel()
        await asyncio.gather(repairing, return_exceptions=True)
    await server.stop(grace=0.2)
    await peers.close()
    if serving is not None:
        await serving.close()
    if exchange is not None:
        exchange.close()


async def wait_config(folder: Path, stop: asyncio.Event) -> RankConfig | None:
    """What the agent says, placed where we are; None when told to stop before it said so.

    Raises:
        PermanentError: DEADLINE_EXCEEDED when it says nothing, PERMISSION_DENIED when we would
            listen without TLS where others can connect.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + CONFIG_TIMEOUT_S
    while not stop.is_set():
        with contextlib.suppress(FileNotFoundError):
            config = read_config(folder / CONFIG_FILE).placed_in(os.environ)
            require_safe_listen(host_port(config.host, 0), config.tls())
            return config
        if loop.time() > deadline:
            raise PermanentError(
                Reason.DEADLINE_EXCEEDED,
                f"no agent wrote {folder / CONFIG_FILE} within {CONFIG_TIMEOUT_S:g} s: look at the"
                " log of the node's agent.",
            )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _POLL_S)
    return None


async def _main(folder: Path, life: LifeLine) -> None:
    configure_logging("rank", json_lines=True)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    life.serve(stop.set)
    config = await wait_config(folder, stop)
    if config is None:
        return
    structlog.contextvars.bind_contextvars(
        job_uid=config.job_uid, rank=f"{config.role}/{config.instance}/{config.rank}"
    )
    await run(config, folder, stop)


def main() -> None:
    """Entry point: the only argument is the rank's state folder."""
    os.nice(_NICENESS)
    folder = Path(sys.argv[1])
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_main(folder, LifeLine(folder)))
    except RaddleError as error:
        sys.stderr.write(f"raddle rank: {error}\n")
        sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    main()
