"""The API server as the operator writes to it: objects as plain mappings, errors as ours.

In go kinds, names and mappings; out come mappings, None for what is not there, and `RaddleError`:
temporary for everything that may be over soon, permanent for what the server refuses for good.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp
from kubernetes.aio import client, config

from raddle.model.errors import ConflictError, PermanentError, RaddleError, Reason, TemporaryError
from raddle.operator.names import API_VERSION, KINDS, MANAGER

TIMEOUT_S = 10.0
_MERGE = "application/merge-patch+json"
_APPLY = "application/apply-patch+yaml"
_TEMPORARY_FROM = HTTPStatus.INTERNAL_SERVER_ERROR
Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Resource:
    """Where the API server has objects of one kind."""

    api: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str, name: str = "", part: str = "") -> str:
        base = "/api/v1" if self.api == "v1" else f"/apis/{self.api}"
        space = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        return "/".join(text for text in (f"{base}{space}/{self.plural}", name, part) if text)


RESOURCES = {
    "Pod": Resource("v1", "pods"),
    "Node": Resource("v1", "nodes", namespaced=False),
    "ConfigMap": Resource("v1", "configmaps"),
    "Secret": Resource("v1", "secrets"),
    "Service": Resource("v1", "services"),
    "Event": Resource("v1", "events"),
    "Deployment": Resource("apps/v1", "deployments"),
    "Lease": Resource("coordination.k8s.io/v1", "leases"),
    **{
        kind: Resource(API_VERSION, names.plural, names.namespaced) for kind, names in KINDS.items()
    },
}


class Cluster:
    """Calls to the API server; `close` it in the end."""

    def __init__(self, configuration: Any) -> None:
        self._api: Any = client.ApiClient(configuration)

    @classmethod
    async def connect(cls, kubeconfig: str) -> Cluster:
        """By a kubeconfig file, or with the Pod's own account when there is none.

        Raises:
            PermanentError: INVALID_ARGUMENT when neither can be used.
        """
        configuration: Any = client.Configuration()
        try:
            if kubeconfig:
                await config.load_kube_config(
                    config_file=kubeconfig, client_configuration=configuration
                )
            else:
                config.load_incluster_config(client_configuration=configuration)
        except (config.ConfigException, OSError) as error:
            raise PermanentError(
                Reason.INVALID_ARGUMENT,
                f"no way to the API server: {error}; run in a Pod, or give --kubeconfig.",
            ) from error
        return cls(configuration)

    async def close(self) -> None:
        await self._api.close()

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        return await self._maybe("GET", RESOURCES[kind].path(namespace, name))

    async def find(self, kind: str, namespace: str = "", selector: str = "") -> list[Object]:
        """All objects of a namespace, or of all; each with its kind, which lists leave out."""
        query = [("labelSelector", selector)] if selector else []
        answer = await self._call("GET", RESOURCES[kind].path(namespace), query=query)
        about = {"apiVersion": RESOURCES[kind].api, "kind": kind}
        return [{**about, **item} for item in answer["items"]]

    async def create(self, item: Object) -> Object | None:
        """The created object; None if one of this name exists."""
        resource = RESOURCES[item["kind"]]
        path = resource.path(item["metadata"].get("namespace", ""))
        try:
            return await self._call("POST", path, item, query=_BY_US)
        except ConflictError:
            return None

    async def apply(self, item: Object) -> Object:
        """Server-side apply: our fields become as given, others stay whose they are."""
        metadata = item["metadata"]
        path = RESOURCES[item["kind"]].path(metadata.get("namespace", ""), metadata["name"])
        query = [*_BY_US, ("force", "true")]
        return await self._call("PATCH", path, item, query=query, content=_APPLY)

    async def patch(
        self, item: Mapping[str, Any], change: Object, *, part: str = ""
    ) -> Object | None:
        """A merge patch of an object or of a part of it; None if it is gone."""
        metadata = item["metadata"]
        resource = RESOURCES[item["kind"]]
        path = resource.path(metadata.get("namespace", ""), metadata["name"], part)
        return await self._maybe("PATCH", path, change, query=_BY_US, content=_MERGE)

    async def patch_node_condition(self, node: str, condition: Object) -> None:
        """Set one condition of a Kubernetes node; those of others stay."""
        path = RESOURCES["Node"].path("", node, "status")
        change = {"status": {"conditions": [condition]}}
        content = "application/strategic-merge-patch+json"
        await self._maybe("PATCH", path, change, query=_BY_US, content=content)

    async def replace(self, item: Object) -> Object:
        """Put a whole object.

        Raises:
            ConflictError: STALE_REVISION when it changed since it was read.
        """
        metadata = item["metadata"]
        path = RESOURCES[item["kind"]].path(metadata.get("namespace", ""), metadata["name"])
        return await self._call("PUT", path, item, query=_BY_US)

    async def delete(self, item: Mapping[str, Any]) -> None:
        """Delete this very object, if it is still there."""
        metadata = item["metadata"]
        path = RESOURCES[item["kind"]].path(metadata.get("namespace", ""), metadata["name"])
        options = {"propagationPolicy": "Background", "preconditions": {"uid": metadata["uid"]}}
        try:
            await self._maybe("DELETE", path, options)
        except ConflictError:
            # Another one of the same name: not the one that was meant.
            return

    async def _maybe(self, method: str, path: str, *args: Any, **more: Any) -> Object | None:
        try:
            return await self._call(method, path, *args, **more)
        except RaddleError as error:
            if error.reason is Reason.NOT_FOUND:
                return None
            raise

    async def _call(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        *,
        query: list[tuple[str, str]] | None = None,
        content: str = "application/json",
    ) -> Object:
        headers = {"Accept": "application/json", "Content-Type": content}
        try:
            request = await self._api.param_serialize(
                method,
                path,
                query_params=query or [],
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            async with asyncio.timeout(TIMEOUT_S):
                response = await self._api.call_api(*request, _request_timeout=TIMEOUT_S)
                data = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            said = str(error) or type(error).__name__
            raise TemporaryError(
                Reason.DEADLINE_EXCEEDED, f"the API server does not answer: {said}"
            ) from error
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise _error(response.status, data)
        found: Object = json.loads(data)
        return found


_BY_US = [("fieldManager", MANAGER)]


def _error(status: int, data: bytes) -> RaddleError:
    """What the server's refusal means to the operator."""
    try:
        message = str(json.loads(data)["message"])
    except (ValueError, KeyError, TypeError):
        message = data[:200].decode(errors="replace") or f"HTTP {status}"
    if status == HTTPStatus.NOT_FOUND:
        return PermanentError(Reason.NOT_FOUND, message)
    if status == HTTPStatus.CONFLICT:
        return ConflictError(Reason.STALE_REVISION, message)
    if status >= _TEMPORARY_FROM or status == HTTPStatus.TOO_MANY_REQUESTS:
        return TemporaryError(Reason.DEADLINE_EXCEEDED, message)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return PermanentError(Reason.PERMISSION_DENIED, message)
    return PermanentError(Reason.INVALID_ARGUMENT, message)
