"""`config check` of the daemons finds what would make them refuse to start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from raddle.agent.engine.reference.frontdoor import main as front_door
from raddle.agent.main import main as agent
from raddle.scheduler.main import main as scheduler
from tests.certificates import Authority

Main = Callable[[Sequence[str]], None]
SCHEDULER = ("--etcd", "127.0.0.1:1")
AGENT = ("--etcd", "127.0.0.1:1", "--node", "sn0/n00", "--state-dir", "/tmp/none")
WRONG: tuple[tuple[Main, tuple[str, ...], str], ...] = (
    (scheduler, (), "--etcd"),
    (scheduler, (*SCHEDULER, "--policy", "/nope"), "/nope"),
    (scheduler, (*SCHEDULER, "--rebalance-every-s", "-1"), "rebalance_every_s"),
    (scheduler, (*SCHEDULER, "--rebalance-every-s", "nan"), "rebalance_every_s"),
    (scheduler, (*SCHEDULER, "--listen", "0.0.0.0:1"), "not loopback"),
    (scheduler, (*SCHEDULER, "--tls-ca", "/nope"), "--tls-ca, --tls-certificate, --tls-key"),
    (scheduler, (*SCHEDULER, "--etcd-ca", "/nope"), "--etcd-ca, --etcd-certificate, --etcd-key"),
    (agent, (*AGENT, "--rank-host", "0.0.0.0"), "not loopback"),
    (agent, (*AGENT, "--tls-ca", "/nope"), "--tls-ca, --tls-certificate, --tls-key"),
    (agent, (*AGENT, "--ranks", "threads"), "processes, pods"),
    (agent, (*AGENT, "--nodes-file", "/nope"), "--node or --nodes-file"),
    (agent, (*AGENT[:2], *AGENT[4:]), "--node or --nodes-file"),
    (agent, (*AGENT, "--etcd-key", "/nope"), "--etcd-ca, --etcd-certificate, --etcd-key"),
)


@pytest.mark.parametrize(("main", "flags", "word"), WRONG)
def test_a_check_refuses(
    main: Main, flags: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing files, half of TLS and an open address without TLS end the check with code 2."""
    with pytest.raises(SystemExit) as ended:
        main([*flags, "config", "check"])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert word in captured.err
    assert captured.out == ""


def test_a_nodes_file_may_come_later(capsys: pytest.CaptureFixture[str]) -> None:
    """The check passes while the file that names the nodes is not there yet."""
    agent([*AGENT[:2], *AGENT[4:], "--nodes-file", "/nope", "config", "check"])
    assert "nodes_file: /nope" in capsys.readouterr().out


def test_plain_http_off_loopback_must_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """A front door refuses to serve HTTP to other machines, and names the two ways to have it."""
    with pytest.raises(SystemExit) as ended:
        front_door(["--schedulers", "127.0.0.1:1", "--job", "a/b", "--listen", "0.0.0.0:1"])
    assert ended.value.code == 2
    assert "--http-certificate" in (error := capsys.readouterr().err)
    assert "--allow-plain-http" in error


@pytest.mark.parametrize(("main", "flags"), [(scheduler, SCHEDULER), (agent, AGENT)])
def test_a_check_reads_certificates(
    main: Main, flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Good certificates pass; a key of another certificate and a file of no PEM do not."""
    authority = Authority(tmp_path)
    one, other = (authority.issue(name) for name in ("client/a", "client/b"))
    noise = tmp_path / "noise"
    noise.write_text("no PEM")
    for ca, key, passes in (
        (one.ca, one.key, True),
        (one.ca, other.key, False),
        (noise, one.key, False),
    ):
        given = [*flags, "--tls-ca", str(ca), "--tls-certificate", str(one.certificate)]
        command = [*given, "--tls-key", str(key), "config", "check"]
        if passes:
            main(command)
            assert str(ca) in capsys.readouterr().out
            continue
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
        assert "PEM" in capsys.readouterr().err
