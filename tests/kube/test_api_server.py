"""The API server alone: objects are checked and kept, also over its own end."""

from __future__ import annotations

import pytest
from tools.kubernetes.cluster import CommandError

from tests.kubernetes import ApiServer


def test_objects_outlive_a_killed_api_server(api_server: ApiServer) -> None:
    """After SIGKILL and a new start what was stored is there; the version is the pinned one."""
    api_server.kubectl("create", "namespace", "stays")
    api_server.kill()
    with pytest.raises(CommandError, match="refused"):
        api_server.kubectl("get", "namespace", "stays")
    api_server.start()
    assert "stays" in api_server.kubectl("get", "namespace", "stays")
    assert "v1.37" in api_server.kubectl("version")


def test_bad_objects_are_refused(api_server: ApiServer) -> None:
    """The server validates as any Kubernetes does."""
    with pytest.raises(CommandError, match="RFC 1123"):
        api_server.kubectl("create", "namespace", "Not_A_Name")
