"""A simulated `metrics.k8s.io`: the API server passes requests for it on to this process.

The Pods are the API server's; what they are said to use is the test's.
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tools.kubernetes.authority import Authority

GROUP_VERSION = "metrics.k8s.io/v1beta1"
Object = dict[str, Any]
#: (namespace, selector) -> name and milliseconds of CPU a second of each Pod.
Usage = Callable[[str, str], dict[str, int]]


class SimulatedMetrics:
    """Serves on loopback until stopped."""

    def __init__(self, folder: Path, usage: Usage) -> None:
        Authority(folder).issue("metrics", "metrics", names=("localhost",))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "metrics.crt", folder / "metrics.key")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(usage))
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def objects(self, namespace: str) -> list[Object]:
        """What tells the API server to pass requests on: a Service and an APIService."""
        port = self._server.server_port
        return [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "simulated-metrics", "namespace": namespace},
                "spec": {"type": "ExternalName", "externalName": "localhost"},
            },
            {
                "apiVersion": "apiregistration.k8s.io/v1",
                "kind": "APIService",
                "metadata": {"name": "v1beta1.metrics.k8s.io"},
                "spec": {
                    "group": "metrics.k8s.io",
                    "version": "v1beta1",
                    "groupPriorityMinimum": 100,
                    "versionPriority": 100,
                    "insecureSkipTLSVerify": True,
                    "service": {
                        "name": "simulated-metrics",
                        "namespace": namespace,
                        "port": port,
                    },
                },
            },
        ]

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(usage: Usage) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            parts = url.path.strip("/").split("/")
            selector = parse_qs(url.query).get("labelSelector", [""])[0]
            if parts == ["apis", *GROUP_VERSION.split("/")]:
                self._answer(_RESOURCES)
            elif parts[3:4] == ["namespaces"] and parts[5:] == ["pods"]:
                self._answer(_pod_metrics(parts[4], usage(parts[4], selector)))
            else:
                self.send_error(404)

        def _answer(self, content: Object) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler


_RESOURCES = {
    "kind": "APIResourceList",
    "apiVersion": "v1",
    "groupVersion": GROUP_VERSION,
    "resources": [
        {
            "name": "pods",
            "singularName": "",
            "namespaced": True,
            "kind": "PodMetrics",
            "verbs": ["get", "list"],
        }
    ],
}


def _pod_metrics(namespace: str, used: dict[str, int]) -> Object:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "kind": "PodMetricsList",
        "apiVersion": GROUP_VERSION,
        "metadata": {},
        "items": [
            {
                "metadata": {"name": name, "namespace": namespace},
                "timestamp": now,
                "window": "10s",
                "containers": [{"name": "rank", "usage": {"cpu": f"{millis}m"}}],
            }
            for name, millis in used.items()
        ],
    }
