"""The certificate authority of a cluster and what it signs.

In go identities and times, out come PEM texts; where they are kept is the business of `keep`. The
subject's common name is the identity (`raddle.telemetry.tls`). Servers carry the name of their kind
as alternative name; a client carries none, so that it cannot pass for a server.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from raddle.model.errors import PermanentError, Reason
from raddle.telemetry.tls import AGENT_NAME, RANK, RANK_NAME, SCHEDULER_NAME

AUTHORITY_LIFETIME = dt.timedelta(days=3650)
# Machines of one cluster may disagree about the time by this much.
_CLOCK_SKEW = dt.timedelta(hours=1)
_NO_PASSWORD = serialization.NoEncryption()


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, both PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Wanted:
    """One certificate that a cluster needs: whose, and the names it answers to."""

    identity: str
    #: Host names and addresses; empty for a mere client.
    names: tuple[str, ...] = ()


def wanted(identity: str, hosts: Sequence[str] = ()) -> Wanted:
    """The certificate of an identity: schedulers, agents, ranks and etcd are servers.

    `hosts` are the addresses that etcd is reached at; the others are known by their kind.
    """
    if identity == "scheduler":
        return Wanted(identity, (SCHEDULER_NAME,))
    if identity.startswith("agent/"):
        return Wanted(identity, (AGENT_NAME, RANK_NAME))
    if identity == RANK:
        return Wanted(identity, (RANK_NAME,))
    if identity == "etcd":
        return Wanted(identity, (*hosts, "localhost", "127.0.0.1"))
    return Wanted(identity)


class Authority:
    """Signs with one key. `create` makes a new one, `load` reads one that was kept."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, now: dt.datetime, name: str = "raddle CA") -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(name)
        builder = _builder(subject, subject, key, now, now + AUTHORITY_LIFETIME)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        builder = builder.add_extension(_usage(signs_certificates=True), True)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = builder.add_extension(identifier, False)
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, pair: Pair, now: dt.datetime) -> Authority:
        """Read one that was kept.

        Raises:
            PermanentError: INVALID_ARGUMENT when it is no authority with its key, or has ended.
        """
        try:
            certificate = x509.load_pem_x509_certificate(pair.certificate)
            key = serialization.load_pem_private_key(pair.key, None)
        except (ValueError, TypeError) as error:
            raise _unfit(f"is no certificate with its key in PEM ({error})") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise _unfit("has no elliptic-curve key")
        if key.public_key() != certificate.public_key():
            raise _unfit("has another key than its certificate")
        if certificate.not_valid_after_utc <= now:
            raise _unfit(f"ended on {certificate.not_valid_after_utc:%Y-%m-%d}")
        return cls(certificate, key)

    @property
    def end(self) -> dt.datetime:
        return self._certificate.not_valid_after_utc

    def pair(self) -> Pair:
        return Pair(_pem(self._certificate), _key_pem(self._key))

    def issue(self, what: Wanted, start: dt.datetime, end: dt.datetime) -> Pair:
        """A new key and its certificate, which never outlives the authority."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(what.identity)
        builder = _builder(subject, self._certificate.subject, key, start, min(end, self.end))
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        builder = builder.add_extension(_usage(signs_certificates=False), True)
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if what.names:
            purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
            names = x509.SubjectAlternativeName([_general_name(name) for name in what.names])
            builder = builder.add_extension(names, False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), False)
        public = self._key.public_key()
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(public)
        builder = builder.add_extension(identifier, False)
        return Pair(_pem(builder.sign(self._key, hashes.SHA256())), _key_pem(key))

    def why_not(self, pair: Pair, what: Wanted, needed_until: dt.datetime) -> str:
        """Why a kept certificate does not do (any more); empty if it does."""
        try:
            certificate = x509.load_pem_x509_certificate(pair.certificate)
            key = serialization.load_pem_private_key(pair.key, None)
        except (ValueError, TypeError):
            return "it is no certificate with its key in PEM"
        if key.public_key() != certificate.public_key():
            return "its key is another one's"
        try:
            certificate.verify_directly_issued_by(self._certificate)
        except (ValueError, TypeError, InvalidSignature):
            return "another authority signed it"
        if certificate.subject != _name(what.identity):
            return f"it is not {what.identity}'s"
        if _names(certificate) != set(what.names):
            return "its names changed"
        if certificate.not_valid_after_utc < min(needed_until, self.end):
            return f"it ends on {certificate.not_valid_after_utc:%Y-%m-%d}"
        return ""


def _unfit(why: str) -> PermanentError:
    return PermanentError(
        Reason.INVALID_ARGUMENT,
        f"the kept authority {why}: delete it and all certificates that it signed, run this again,"
        " and restart all of Raddle.",
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    start: dt.datetime,
    end: dt.datetime,
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    return builder.not_valid_before(start - _CLOCK_SKEW).not_valid_after(end)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _names(certificate: x509.Certificate) -> set[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return {str(name.value) for name in found}


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(pem, pkcs8, _NO_PASSWORD)
