"""Certificates and the identities in them.

Off loopback both sides show a certificate of the same CA. The subject's common name is the
identity: `scheduler`, `agent/<node>`, `rank`, `frontdoor`, `operator`, `client/<name>`. An agent of
several nodes is `agent/<pattern>` (`agent/sn0/*`, `agent/*`), a front door of some namespaces alone
`frontdoor/<name>`. The alternative name is the server's kind (`raddle-scheduler`, `raddle-rank`),
whatever host it runs on. Ranks that an agent starts itself show its certificate, so it carries
`raddle-rank` beside `raddle-agent`, by which etcd knows agents. On loopback without TLS a caller
names itself in metadata.

Somebody else may renew the files at any time: each new connection shows what they hold then.
"""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import grpc

from raddle.model.errors import PermanentError, Reason
from raddle.telemetry.renewed import Renewed

IDENTITY_METADATA = "raddle-identity"
DEFAULT_IDENTITY = "client/local"
SCHEDULER_NAME = "raddle-scheduler"
AGENT_NAME = "raddle-agent"
RANK_NAME = "raddle-rank"
RANK = "rank"
FRONT_DOOR = "frontdoor"


@dataclass(frozen=True, slots=True)
class Pems:
    """What the files held at one moment, found to belong together."""

    ca: bytes
    certificate: bytes
    key: bytes
    server_context: ssl.SSLContext = field(repr=False, compare=False)
    client_context: ssl.SSLContext = field(repr=False, compare=False)

    def server_configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], self.ca)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of one process."""

    ca: Path
    certificate: Path
    key: Path
    _pems: Renewed[Pems] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        paths = (self.ca, self.certificate, self.key)
        object.__setattr__(self, "_pems", Renewed(paths, self._found))

    def newest(self) -> Pems:
        """What the files hold; while they are half written, what they held before.

        Raises:
            OSError: they have never been a CA, a certificate and its key.
        """
        return self._pems.newest()

    def server_credentials(self) -> grpc.ServerCredentials:
        """Clients must show a certificate of the same CA; asked anew for each connection.

        A handshake that fails here (no certificate, an expired one, another CA) is not logged:
        gRPC for Python has no hook for it, neither interceptors nor the callback below hear of it,
        and what its core logs at GRPC_VERBOSITY=INFO names the reason, but not the caller. The
        caller is told, as UNAVAILABLE.
        """
        shown = self.newest()

        def renewed() -> Any:
            # None is no change: gRPC crashes when connections that come together each bring one.
            nonlocal shown
            if (newest := self.newest()) == shown:
                return None
            shown = newest
            return newest.server_configuration()

        return grpc.dynamic_ssl_server_credentials(
            shown.server_configuration(), renewed, require_client_authentication=True
        )

    def socket_context(self, *, server: bool) -> ssl.SSLContext:
        """For a plain socket between ranks that is connected now."""
        pems = self.newest()
        return pems.server_context if server else pems.client_context

    def _found(self, ca: bytes, certificate: bytes, key: bytes) -> Pems:
        """That contexts can be made of them is the proof that they belong together."""
        server = self._context(ssl.PROTOCOL_TLS_SERVER)
        client = self._context(ssl.PROTOCOL_TLS_CLIENT)
        return Pems(ca, certificate, key, server, client)

    def _context(self, protocol: int) -> ssl.SSLContext:
        """Both sides show a certificate; who connects says which name the other's must carry."""
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.ca)
        context.load_cert_chain(self.certificate, self.key)
        return context


def renew_for_each_connection(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Let a server's context show to each new connection what the files hold then.

    Raises:
        OSError: they hold no certificate with its key.
    """

    def found(_certificate: bytes, _key: bytes) -> ssl.SSLContext:
        made = ssl.SSLContext(context.protocol)
        made.load_cert_chain(certificate, key)
        return made

    renewed = Renewed((certificate, key), found)
    renewed.newest()

    def connected(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = renewed.newest()

    context.sni_callback = connected


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
        files.newest()
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


def is_rank(identity: str) -> bool:
    """Is it a rank? Those that an agent starts itself show their agent's certificate."""
    return identity == RANK or identity.startswith("agent/")


def is_front_door(identity: str) -> bool:
    """Is it the front door of all namespaces, or one of some?"""
    return identity == FRONT_DOOR or identity.startswith(f"{FRONT_DOOR}/")
