"""What broke in one simulation: told where it is seen, raised where the simulation waits.

An assertion that fails inside an agent's or a leader's task may end up in a log. So whoever sees
that something must not be tells it here too, and every wait of the simulation looks.
"""

from __future__ import annotations

import asyncio


class Findings:
    """The trace of one simulation, and the first things that must not have happened."""

    def __init__(self) -> None:
        self.trace: list[str] = []
        self.broken: list[str] = []

    def say(self, what: str) -> None:
        """One line of the trace."""
        self.trace.append(f"{asyncio.get_running_loop().time():.6f} {what}")

    def require(self, condition: object, story: str) -> None:
        """Raise, and remember, what must not be.

        Raises:
            AssertionError: with the story.
        """
        if not condition:
            self.broke(story)
            raise AssertionError(story)

    def broke(self, story: str) -> None:
        """Remember what must not be."""
        self.say(f"BROKEN {story}")
        self.broken.append(story)

    def check(self) -> None:
        """Raise the first thing that broke anywhere.

        Raises:
            AssertionError: with its story.
        """
        assert not self.broken, self.broken[0]
