"""One replica's life: stand by, lead a term, stand by again.

In go a store, its mirror and a way to make a leader; `leader` is the one who leads in this process
now. The simulator runs this same code over a memory store.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from raddle.model.errors import RaddleError
from raddle.scheduler.leader import Deposed, Leader
from raddle.scheduler.mirror import Mirror
from raddle.store.election import Election, Term
from raddle.store.protocol import Store

_UNFIT_WAIT_S = 5.0
log = structlog.get_logger()


async def campaign(
    store: Store,
    mirror: Mirror,
    election: Election,
    make_leader: Callable[[Term], Leader],
    leads: Callable[[Leader | None], Awaitable[None]],
) -> None:
    """Lead whenever the election allows it, for ever; `leads` is told each change."""
    while True:
        await mirror.wait_revision(1)
        if mirror.too_new:
            key, why = next(iter(mirror.too_new.items()))
            log.error("this replica must not lead", key=key, why=why)
            await asyncio.sleep(_UNFIT_WAIT_S)
            continue
        term = await election.campaign()
        log.info("leading", revision=term.revision)
        leader = make_leader(term)
        await leads(leader)
        try:
            await leader.run()
        except Deposed as why:
            log.warning("no longer leading", why=str(why))
            election.deposed()
        finally:
            await leads(None)
            with contextlib.suppress(RaddleError):
                await term.resign(store)
