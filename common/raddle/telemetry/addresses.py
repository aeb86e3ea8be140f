"""Addresses as text: `host:port`, a host with colons in brackets."""

from __future__ import annotations


def host_port(host: str, port: int) -> str:
    """One text of both: `10.0.0.5:7400`, `[fd00::5]:7400`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Host, without brackets, and port.

    Raises:
        ValueError: there is no port.
    """
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)
