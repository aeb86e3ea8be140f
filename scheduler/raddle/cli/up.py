"""`raddle up`: run a cluster in the foreground and watch over its parts."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from raddle.cli.cluster import LocalCluster
from raddle.cli.session import EXIT_FAILED, EXIT_OK, say
from raddle.model.errors import RaddleError
from raddle.store.ports import is_free

_WATCH_S = 0.5


async def run_up(folder: Path, *, machine: str, real_nodes: int, schedulers: int, port: int) -> int:
    """Until SIGINT, SIGTERM or SIGHUP, or until a part ends by itself; gives the exit code."""
    if port and not is_free(port):
        say(
            f"raddle up: port {port} of this machine is in use: name another one with --port, or"
            " end what listens there."
        )
        return EXIT_FAILED
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # SIGHUP is what a terminal that is closed sends.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    cluster = LocalCluster(
        folder,
        machine=machine,
        real_nodes=real_nodes,
        schedulers=schedulers,
        listen_port=port,
        tell=say,
    )
    try:
        await cluster.start()
        address = cluster.addresses[0]
        say(f"ready: {cluster.supernode.dies} dies; try `raddle --server {address} nodes`")
        while not stop.is_set():
            cluster.check_children()
            try:
                await asyncio.wait_for(stop.wait(), _WATCH_S)
            except TimeoutError:
                continue
    except RaddleError as error:
        say(f"raddle up: {error}")
        return EXIT_FAILED
    finally:
        say("stopping")
        await cluster.stop()
    return EXIT_OK
