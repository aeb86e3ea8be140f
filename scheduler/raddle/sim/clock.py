"""An event loop whose time is virtual: it passes only when everything waits."""

from __future__ import annotations

import asyncio
import selectors

# More rounds than this without a moment's passing are no progress, however busy.
ROUNDS_A_MOMENT_MAX = 200_000


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
        self._rounds = 0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self._virtual_now_s

    def pass_time(self, seconds: float) -> None:
        """Move the clock; one round of the loop is over.

        Raises:
            RuntimeError: the parts wake each other for ever and no time passes.
        """
        self._rounds = 0 if seconds > 0 else self._rounds + 1
        if self._rounds > ROUNDS_A_MOMENT_MAX:
            # Told once: what is under way is cancelled after that.
            self._rounds = 0
            raise RuntimeError(
                f"the simulation runs in circles: {ROUNDS_A_MOMENT_MAX} rounds at"
                f" {self.time():.6f} s"
            )
        self._virtual_now_s += seconds
