"""Ports of the loopback interface for child processes that want theirs as an argument."""

from __future__ import annotations

import os
import secrets
import socket
from collections import deque
from pathlib import Path

_LOWEST = 20_000
_DEFAULT_EPHEMERAL = 32_768  # Linux's own default, where /proc cannot be read
_TRIES = 1000

# The last ports that were handed out stay reserved: their processes may not have bound them yet.
_reserved: deque[int] = deque()
_RESERVED_MAX = 256


def free_port() -> int:
    """A port that nobody listens on and that no other caller on this host is given meanwhile.

    It lies below the range from which the kernel takes ports of outgoing connections: one of those
    could take it between this call and the child's bind.

    Raises:
        OSError: no port of the range is free.
    """
    highest = _ephemeral_range_start()
    lowest = min(_LOWEST, highest // 2)
    for _ in range(_TRIES):
        port = lowest + secrets.randbelow(highest - lowest)
        reservation = _reserve(port)
        if reservation is None:
            continue
        _reserved.append(reservation)
        if len(_reserved) > _RESERVED_MAX:
            os.close(_reserved.popleft())
        if is_free(port):
            return port
    raise OSError(f"no free port between {lowest} and {highest}")


def _reserve(port: int) -> int | None:
    """An abstract socket as a lock between processes: it ends with its holder, however that ends.

    Returns its descriptor; None when another holds it.
    """
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind(f"\0raddle-port-{port}")
        except OSError:
            return None
        return lock.detach()


def is_free(port: int) -> bool:
    """Can a server listen on this port of the loopback now?"""
    with socket.socket() as probe:
        # As servers do: connections that have just ended do not keep a port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _ephemeral_range_start() -> int:
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    except OSError:
        return _DEFAULT_EPHEMERAL
    return int(text.split()[0])
