"""The API server's watches, by kopf: lists, reconnections, 410s, silent connections.

kopf runs in a thread and a loop of its own: in the main thread it would take the process's
signals, and at its end cancel every task of the loop that it shares. It only tells; what it tells
is handed to our loop.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import kopf
import structlog

EVERYWHERE = "*"
#: Nobody speaks on a watch for so long: the connection is taken for dead.
_INACTIVITY_S = 70.0
_RETRY_S_MIN = 1.0
_RETRY_S_MAX = 30.0
#: Metadata that differ after any change.
_OF_EVERY_CHANGE = ("resourceVersion", "managedFields")
#: Called with an object and with what happened to it: ADDED, MODIFIED, DELETED, or nothing for
#: one that was listed.
Mark = Callable[[Mapping[str, Any], str], None]
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Watch:
    """Objects of one kind, and who is told of them."""

    group: str
    version: str
    plural: str
    mark: Mark


class News:
    """Tells changes of objects from those of their status alone, which are mostly our own words.

    Work that was marked by what it wrote itself would be done twice, and without its pause.
    """

    def __init__(self) -> None:
        #: Uid -> metadata; the generation in it stands for the spec.
        self._known: dict[str, Mapping[str, Any]] = {}

    def is_one(self, body: Mapping[str, Any], what: str) -> bool:
        metadata = {k: v for k, v in body["metadata"].items() if k not in _OF_EVERY_CHANGE}
        before = self._known.get(metadata["uid"])
        if what == "DELETED":
            self._known.pop(metadata["uid"], None)
        else:
            self._known[metadata["uid"]] = metadata
        return what != "MODIFIED" or metadata != before


async def follow(watches: Sequence[Watch], namespaces: Sequence[str], kubeconfig: str) -> None:
    """Tell of every object and every change, until cancelled; begun again whatever happens."""
    pause_s = _RETRY_S_MIN
    while True:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            await _in_thread(_registry(watches, loop, kubeconfig), namespaces)
            why = "it ended"
        except Exception as error:  # noqa: BLE001 - the watches have to go on
            why = f"{type(error).__name__}: {error}"
        if loop.time() > began_s + _RETRY_S_MAX:
            pause_s = _RETRY_S_MIN
        log.warning("the API server's watches are begun again", why=why, after_s=pause_s)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _RETRY_S_MAX)


async def _in_thread(registry: kopf.OperatorRegistry, namespaces: Sequence[str]) -> None:
    """Run kopf in a thread until it ends, or until this is cancelled."""
    loop, stop = asyncio.get_running_loop(), threading.Event()
    ended: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if ended.done():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            asyncio.run(_kopf(registry, namespaces, stop))
        except BaseException as failure:  # noqa: BLE001 - told where the thread was begun
            error = failure
        # A loop that is closed has no use for it.
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="kopf", daemon=True).start()
    try:
        await ended
    finally:
        stop.set()


async def _kopf(
    registry: kopf.OperatorRegistry, namespaces: Sequence[str], stop: threading.Event
) -> None:
    """Watches and nothing else: no Events, no annotations, no look at definitions."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.watching.inactivity_timeout = _INACTIVITY_S
    settings.queueing.exit_timeout = 0.1
    everywhere = EVERYWHERE in namespaces
    # Without one kopf asks for the user's name, and in a container the user has none.
    identity: Any = "raddle-operator"
    await kopf.operator(
        registry=registry,
        settings=settings,
        standalone=True,
        clusterwide=everywhere,
        namespaces=() if everywhere else tuple(namespaces),
        stop_flag=stop,
        identity=identity,
    )


def _registry(
    watches: Sequence[Watch], loop: asyncio.AbstractEventLoop, kubeconfig: str
) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()
    for watch in watches:
        _register(registry, watch, loop)

    @kopf.on.login(registry=registry)
    def login(**more: Any) -> kopf.ConnectionInfo | None:
        if not kubeconfig:
            return kopf.login_with_service_account(**more)
        os.environ["KUBECONFIG"] = kubeconfig
        return kopf.login_with_kubeconfig(**more)

    return registry


def _register(
    registry: kopf.OperatorRegistry, watch: Watch, loop: asyncio.AbstractEventLoop
) -> None:
    @kopf.on.event(watch.group, watch.version, watch.plural, registry=registry, id=watch.plural)
    async def told(body: kopf.Body, type: str | None, **_: Any) -> None:  # noqa: A002 - kopf's
        if not loop.is_closed():
            loop.call_soon_threadsafe(watch.mark, dict(body), type or "")
