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
from raddle.scheduler.leader import Deposed, Leader, Outdated
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
        term = await _win(election, mirror)
        if term is None:
            continue
        log.info("leading", revision=term.revision)
        leader = make_leader(term)
        await leads(leader)
        try:
            await leader.run()
        except Deposed as why:
            log.warning("no longer leading", why=str(why))
            if not isinstance(why, Outdated):
                election.deposed()
        finally:
            await leads(None)
            with contextlib.suppress(RaddleError):
                await term.resign(store)


async def _win(election: Election, mirror: Mirror) -> Term | None:
    """A term, or None once there is a record that only a newer version can lead with."""
    campaigning = asyncio.create_task(election.campaign())
    outdated = asyncio.create_task(mirror.wait_too_new())
    try:
        await asyncio.wait((campaigning, outdated), return_when=asyncio.FIRST_COMPLETED)
        return campaigning.result() if campaigning.done() else None
    finally:
        for task in (campaigning, outdated):
            task.cancel()
        await asyncio.gather(campaigning, outdated, return_exceptions=True)
