"""Ports for child processes."""

from __future__ import annotations

import socket
import subprocess
import sys

from raddle.store.ports import free_port

_TAKE_200 = "from raddle.store.ports import free_port; print(*(free_port() for _ in range(200)))"


def test_no_port_is_given_twice_while_its_taker_lives() -> None:
    """200 ports are all different, in one process and in two at once, and each can be bound."""
    with subprocess.Popen(
        [sys.executable, "-c", _TAKE_200 + "; input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        theirs = {int(port) for port in other.stdout.readline().split()}
        ours = {free_port() for _ in range(200)}
        other.communicate("\n")
    assert len(theirs) == len(ours) == 200
    assert not theirs & ours
    for port in ours:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_a_port_in_use_is_not_given() -> None:
    """A port that somebody listens on is passed over, however often one is asked for."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
        listener.listen()
        taken = listener.getsockname()[1]
        assert taken not in {free_port() for _ in range(500)}
