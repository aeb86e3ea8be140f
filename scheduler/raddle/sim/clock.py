"""An event loop whose time is virtual: it passes only when everything waits."""

from __future__ import annotations

import asyncio
import selectors


class _Selector(selectors.SelectSelector):
    """Never waits: where a selector would, the loop's clock is moved."""

    loop: VirtualClockLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("the simulation is stuck: everything waits and no timer is set")
        self.loop.pass_time(timeout)
        return []


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """`time()` begins at 0 and jumps to the next timer. No sockets, threads or processes."""

    def __init__(self) -> None:
        self._virtual_now_s = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self._virtual_now_s

    def pass_time(self, seconds: float) -> None:
        self._virtual_now_s += seconds
