"""Certificates and the identities in them.

Off loopback both sides show a certificate of the same CA. The subject's common name is the
identity: `scheduler`, `agent/<node>`, `operator`, `client/<name>`. An agent of several nodes is
`agent/<pattern>` (`agent/sn0/*`, `agent/*`). The alternative name is the
server's kind (`raddle-scheduler`, `raddle-agent`), whatever host it runs on; ranks show the
certificate of their agent. On loopback without TLS a caller names itself in metadata.
"""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import grpc

from raddle.model.errors import PermanentError, Reason

IDENTITY_METADATA = "raddle-identity"
DEFAULT_IDENTITY = "client/local"
SCHEDULER_NAME = "raddle-scheduler"
AGENT_NAME = "raddle-agent"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of one process."""

    ca: Path
    certificate: Path
    key: Path

    def server_credentials(self) -> grpc.ServerCredentials:
        """Clients must show a certificate of the same CA."""
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        return grpc.ssl_server_credentials(
            [pair], root_certificates=self.ca.read_bytes(), require_client_auth=True
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            self.ca.read_bytes(), self.key.read_bytes(), self.certificate.read_bytes()
        )

    def socket_context(self, *, server: bool) -> ssl.SSLContext:
        """For plain sockets between ranks: both sides show a certificate, hosts have no names."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.ca)
        context.load_cert_chain(self.certificate, self.key)
        return context


def tls_files(ca: str, certificate: str, key: str, *, prefix: str = "--tls-") -> TlsFiles | None:
    """All three or none; `prefix` is how the caller's settings with the three names begin.

    Raises:
        PermanentError: INVALID_ARGUMENT when only some are given, one cannot be read, or they are
            no certificates with their key.
    """
    given = [text for text in (ca, certificate, key) if text]
    if not given:
        return None
    names = (ca, certificate, key)
    if len(given) < len(names):
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"TLS needs three files: {prefix}ca, {prefix}certificate, {prefix}key.",
        )
    for text in given:
        if not Path(text).is_file():
            raise PermanentError(Reason.INVALID_ARGUMENT, f"{text} is no readable file.")
    files = TlsFiles(*(Path(text) for text in names))
    try:
        files.socket_context(server=False)
    except OSError as error:
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"{', '.join(names)} are no CA, certificate and its key in PEM: {error}.",
        ) from error
    return files


def is_loopback(address: str) -> bool:
    """Is `host:port` (or a unix socket) reachable from this machine only?"""
    if address.startswith("unix:"):
        return True
    host = address.rsplit(":", 1)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_safe_listen(address: str, tls: TlsFiles | None) -> None:
    """Refuse to listen without TLS where other machines can connect.

    Raises:
        PermanentError: PERMISSION_DENIED.
    """
    if tls is None and not is_loopback(address):
        raise PermanentError(
            Reason.PERMISSION_DENIED,
            f"{address} is not loopback: give --tls-ca, --tls-certificate and --tls-key, or listen"
            " on 127.0.0.1.",
        )


def identity_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Who calls: the certificate's common name, or on a plain loopback what the caller says."""
    auth = context.auth_context()
    # A plain connection says "insecure" here; only TLS has names to show.
    if b"ssl" in (auth.get("transport_security_type") or []):
        names = auth.get("x509_common_name") or []
        name = next(iter(names), b"")
        return name.decode()
    for key, value in context.invocation_metadata() or ():
        if key == IDENTITY_METADATA:
            return value.decode() if isinstance(value, bytes) else value
    return DEFAULT_IDENTITY


def is_agent_of(node: str, identity: str) -> bool:
    """Is it the agent of the node, or one of several nodes whose pattern holds the node?"""
    return identity.startswith("agent/") and fnmatchcase(f"agent/{node}", identity)
