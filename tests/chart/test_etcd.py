"""The etcd of the chart, as a process with the chart's own flags."""

from __future__ import annotations

import datetime as dt
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from raddle.cli.certificates.keep import Folder, Lifetimes, bring_up_to_date, file_name
from raddle.cli.certificates.secrets import IDENTITIES, wanted_secrets
from raddle.model.errors import RaddleError
from raddle.store.embedded import find_etcd
from raddle.store.etcd.store import EtcdStore
from raddle.store.ports import free_port
from raddle.telemetry.tls import TlsFiles
from tests.chart.rendering import one, render
from tests.support import eventually

#: Whom etcd of the chart takes for a client.
CLIENTS = {"scheduler", "agent"}


def _flags(folder: Path, port: int) -> list[str]:
    """The chart's flags, with files and addresses of this machine in place of the pod's."""
    (container,) = one(render({}), "StatefulSet", "raddle-etcd")["spec"]["template"]["spec"][
        "containers"
    ]
    places = {
        "https://0.0.0.0:2379": f"https://127.0.0.1:{port}",
        "https://raddle-etcd.space.svc:2379": f"https://127.0.0.1:{port}",
        "http://127.0.0.1:2380": f"http://127.0.0.1:{free_port()}",
        "http://0.0.0.0:2381": f"http://127.0.0.1:{free_port()}",
        "/var/lib/etcd": str(folder / "etcd"),
        "/etc/raddle/tls/tls": str(folder / "etcd"),
        "/etc/raddle/tls/ca": str(folder / "ca"),
    }
    flags = "\n".join(container["command"][1:])
    for theirs, ours in places.items():
        assert theirs in flags, theirs
        flags = flags.replace(theirs, ours)
    return flags.splitlines()


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[str]:
    """Its address; `tmp_path` has a certificate of each identity of a release."""
    wants = wanted_secrets(("127.0.0.1",))
    bring_up_to_date(Folder(tmp_path), wants, dt.datetime.now(dt.UTC), Lifetimes())
    port = free_port()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [str(find_etcd().path), *_flags(tmp_path, port)], stdout=log, stderr=log
        )
    yield f"127.0.0.1:{port}"
    process.kill()
    process.wait()


def files(folder: Path, who: str) -> TlsFiles:
    name = file_name(IDENTITIES[who])
    return TlsFiles(folder / "ca.crt", folder / f"{name}.crt", folder / f"{name}.key")


async def is_served(address: str, tls: TlsFiles) -> bool:
    """Does etcd answer whoever shows this certificate?"""
    store = EtcdStore([address], "test", operation_key="operations/test", tls=tls)
    try:
        return await store.get("leader") is None
    except RaddleError:
        return False
    finally:
        await store.close()


async def test_etcd_takes_schedulers_and_agents_and_refuses_all_others(
    etcd: str, tmp_path: Path
) -> None:
    """A rank's, a front door's or a client's certificate of the same authority is no way in."""
    await eventually(lambda: is_served(etcd, files(tmp_path, "agent")), "etcd answers an agent")
    served = {who for who in IDENTITIES if await is_served(etcd, files(tmp_path, who))}
    assert served == CLIENTS
    assert "client certificate authentication failed" in (tmp_path / "log").read_text()
