"""A certificate authority for tests: one CA, a certificate for each identity."""

from __future__ import annotations

import datetime as dt
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from raddle.telemetry.tls import AGENT_NAME, SCHEDULER_NAME, TlsFiles

_DAY = dt.timedelta(days=1)
_NOT_ENCRYPTED = serialization.NoEncryption()


class Authority:
    """Writes `ca.crt`, and `<identity>.crt` and `.key` with `/` as `-` and `*` as `all`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "raddle test CA")])
        builder = self._builder(self._name, self._key.public_key(), expired=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        self._write("ca", builder.sign(self._key, hashes.SHA256()))

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, expired: bool
    ) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        end = now - _DAY if expired else now + _DAY
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name)
        builder = builder.public_key(key).serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - 2 * _DAY).not_valid_after(end)

    def issue(self, identity: str, *, expired: bool = False, name: str = "") -> TlsFiles:
        """A certificate for an identity; `name` is the file's name if it is to be another."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity)])
        server = AGENT_NAME if identity.startswith("agent/") else SCHEDULER_NAME
        names = [
            x509.DNSName(server),
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        ]
        builder = self._builder(subject, key.public_key(), expired=expired)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        file = name or identity.replace("/", "-").replace("*", "all")
        self._write(file, builder.sign(self._key, hashes.SHA256()))
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, _NOT_ENCRYPTED
        )
        (self.folder / f"{file}.key").write_bytes(pem)
        return self.files(file)

    def files(self, file: str) -> TlsFiles:
        folder = self.folder
        return TlsFiles(folder / "ca.crt", folder / f"{file}.crt", folder / f"{file}.key")

    def _write(self, file: str, certificate: x509.Certificate) -> None:
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        (self.folder / f"{file}.crt").write_bytes(pem)
