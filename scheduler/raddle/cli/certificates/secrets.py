"""Certificates as Secrets of a Kubernetes namespace, one an identity.

Each is of type `kubernetes.io/tls` with `ca.crt` beside `tls.crt` and `tls.key`, as cert-manager
makes them: whoever mounts one need not know where it came from.
"""

from __future__ import annotations

import base64
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from raddle.cli.certificates.authority import Pair, Wanted, wanted
from raddle.cli.certificates.keep import file_name
from raddle.model.errors import PermanentError, Reason, TemporaryError
from raddle.telemetry.tls import FRONT_DOOR, RANK

#: Who has a certificate in a cluster on Kubernetes, by the last part of the Secret's name.
IDENTITIES = {
    "scheduler": "scheduler",
    "agent": "agent/*",
    "operator": "operator",
    "admin": "client/admin",
    "rank": RANK,
    "frontdoor": FRONT_DOOR,
    "etcd": "etcd",
}
_CONFLICT = 409
_NOT_FOUND = 404
_REFUSED = (401, 403)
_TIMEOUT_S = 10
_SUFFIXES = {file_name(identity): suffix for suffix, identity in IDENTITIES.items()}


def wanted_secrets(etcd_hosts: tuple[str, ...]) -> list[Wanted]:
    """What a release needs; without hosts of etcd it has none of its own."""
    return [
        wanted(identity, etcd_hosts)
        for identity in IDENTITIES.values()
        if identity != "etcd" or etcd_hosts
    ]


def connect() -> Any:
    """The API that this pod, or the user's kubeconfig, is meant for.

    Raises:
        PermanentError: INVALID_ARGUMENT when there is neither.
    """
    try:
        config.load_config()
    except config.ConfigException as error:
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"no Kubernetes is named by a pod's token, $KUBECONFIG or ~/.kube/config: {error}.",
        ) from error
    return client.CoreV1Api()


class Secrets:
    """The `<release>-tls-<who>` Secrets of a namespace."""

    def __init__(self, api: Any, namespace: str, release: str) -> None:
        self._api = api
        self._namespace = namespace
        self._release = release

    def read(self, name: str) -> Pair | None:
        try:
            secret = self._api.read_namespaced_secret(
                self._name(name), self._namespace, _request_timeout=_TIMEOUT_S
            )
        except ApiException as error:
            if error.status == _NOT_FOUND:
                return None
            raise self._failed("read", name, error) from error
        data = {key: base64.b64decode(value) for key, value in (secret.data or {}).items()}
        return Pair(data.get("tls.crt", b""), data.get("tls.key", b""))

    def create(self, name: str, pair: Pair, authority: bytes) -> bool:
        try:
            self._api.create_namespaced_secret(
                self._namespace, self._secret(name, pair, authority), _request_timeout=_TIMEOUT_S
            )
        except ApiException as error:
            if error.status == _CONFLICT:
                return False
            raise self._failed("create", name, error) from error
        return True

    def replace(self, name: str, pair: Pair, authority: bytes) -> None:
        body = {"data": self._secret(name, pair, authority)["data"]}
        try:
            self._api.patch_namespaced_secret(
                self._name(name), self._namespace, body, _request_timeout=_TIMEOUT_S
            )
        except ApiException as error:
            raise self._failed("patch", name, error) from error

    def _name(self, name: str) -> str:
        return f"{self._release}-tls-{_SUFFIXES.get(name, name)}"

    def _secret(self, name: str, pair: Pair, authority: bytes) -> dict[str, Any]:
        parts = {"ca.crt": authority, "tls.crt": pair.certificate, "tls.key": pair.key}
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "kubernetes.io/tls",
            "metadata": {
                "name": self._name(name),
                "labels": {
                    "app.kubernetes.io/name": "raddle",
                    "app.kubernetes.io/instance": self._release,
                    "app.kubernetes.io/component": "certificates",
                },
            },
            "data": {key: base64.b64encode(value).decode() for key, value in parts.items()},
        }

    def _failed(self, verb: str, name: str, error: ApiException) -> PermanentError | TemporaryError:
        what = f"cannot {verb} Secret {self._namespace}/{self._name(name)}: {error.reason}"
        if error.status in _REFUSED:
            return PermanentError(
                Reason.PERMISSION_DENIED, f"{what}; give the caller that right on Secrets."
            )
        return TemporaryError(Reason.STORE_UNAVAILABLE, f"{what}; run this again.")
