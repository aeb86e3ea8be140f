"""Ranks that somebody else starts: life lines, and what the agent makes of them.

The pods of these tests are processes that claim their folder as a rank does; `tests/e2e/test_pods`
has real ranks in namespaces of their own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from raddle.agent.engine.launcher import Running, make_folder
from raddle.agent.engine.pod import PodLauncher
from raddle.agent.engine.reference.config import (
    ADDRESS_FILE,
    CONFIG_FILE,
    RankConfig,
    read_address,
    read_config,
    write_config,
)
from raddle.agent.engine.reference.life import LIFE_FILE, LifeLine, connect
from raddle.model.errors import PermanentError, TemporaryError
from raddle.model.kinds import RoleKind
from tests.support import eventually

CONFIG = RankConfig(
    job_uid="u1",
    epoch=1,
    role="decode",
    kind=RoleKind.DECODE,
    instance=0,
    rank=0,
    incarnation="u1-decode-0-0-1-abcdef",
    node="sn0/n00",
    die="sn0/n00/npu0/die0",
    model_config="raddle-demo",
    checkpoint="/nowhere",
    kv_block_tokens=16,
)
# Claims the folder, says where it serves if asked to, and ends when told or when its input does.
_RANK = """
import asyncio, sys
from pathlib import Path
from raddle.agent.engine.reference.config import CONFIG_FILE, read_config, write_address
from raddle.agent.engine.reference.life import LifeLine

async def main(folder, serves):
    life, stop = LifeLine(folder), asyncio.Event()
    life.serve(stop.set)
    if serves:
        write_address(folder, read_config(folder / CONFIG_FILE), "10.0.0.1:1", "")
    print("up", flush=True)
    await stop.wait()

asyncio.run(main(Path(sys.argv[1]), sys.argv[2] == "serves"))
"""


class Pods:
    """Processes that stand for pods; all end with the test."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def start(self, folder: Path, serves: str = "serves") -> subprocess.Popen[bytes]:
        """One that has claimed the folder when this returns."""
        command = [sys.executable, "-c", _RANK, str(folder), serves]
        child = self._stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        self._stack.callback(child.kill)
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        return child

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def pods() -> Iterator[Pods]:
    made = Pods()
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ranks" / "sn0-n00" / "u1" / "decode-0-0-1"


def always() -> bool:
    return True


def modes(*paths: Path) -> list[int]:
    return [path.stat().st_mode & 0o777 for path in paths]


def write_folder(folder: Path) -> None:
    """What an agent leaves that ends while it waits for a rank."""
    make_folder(folder)
    write_config(folder / CONFIG_FILE, CONFIG)


async def started(folder: Path, pods: Pods) -> tuple[Running, subprocess.Popen[bytes]]:
    """A rank that came up after its config was there."""
    coming = asyncio.create_task(PodLauncher().start(folder, CONFIG, always))
    await eventually((folder / CONFIG_FILE).exists, "the config is written")
    child = await asyncio.to_thread(pods.start, folder)
    found = await coming
    assert found is not None
    return found, child


async def test_a_rank_is_attached_to_once_it_serves(folder: Path, pods: Pods) -> None:
    """The agent writes the config in a folder of its own user's, and finds who serves there."""
    found, _ = await started(folder, pods)
    assert found.config == CONFIG
    assert found.address.incarnation == CONFIG.incarnation
    assert found.address.engine_address == "10.0.0.1:1"
    assert modes(folder, folder / LIFE_FILE) == [0o700, 0o600]
    found.life.close()


async def test_the_end_of_a_killed_rank_is_seen(folder: Path, pods: Pods) -> None:
    """SIGKILL of a rank whose number nobody knows ends its life line."""
    found, child = await started(folder, pods)
    waiting = asyncio.create_task(found.life.wait())
    child.kill()
    assert await waiting == -1


async def test_a_rank_is_asked_to_end(folder: Path, pods: Pods) -> None:
    """`end` on the life line ends the rank, and its end is seen after that."""
    found, child = await started(folder, pods)
    await found.life.end()
    assert await found.life.wait() == -1
    assert await asyncio.to_thread(child.wait) == 0


async def test_a_rank_that_hangs_is_not_told_as_gone(folder: Path, pods: Pods) -> None:
    """A stopped rank that was asked to end is there until it is killed from outside."""
    found, child = await started(folder, pods)
    os.kill(child.pid, signal.SIGSTOP)
    await found.life.end()
    waiting = asyncio.create_task(found.life.wait())
    # A round trip over another connection: the loop has had its chance to see an end.
    again = await PodLauncher().adopt(folder)
    assert again is not None
    assert not waiting.done()
    again.life.close()
    child.kill()
    assert await waiting == -1


async def test_a_new_agent_adopts_what_runs(folder: Path, pods: Pods) -> None:
    """The rank of an agent that let go is found again, with its config."""
    found, child = await started(folder, pods)
    found.life.close()
    again = await PodLauncher().adopt(folder)
    assert again is not None
    assert (again.address, again.config) == (found.address, CONFIG)
    waiting = asyncio.create_task(again.life.wait())
    child.kill()
    await waiting
    # Its listening socket may close a moment after the connections.
    await asyncio.to_thread(child.wait)
    assert await PodLauncher().adopt(folder) is None
    assert not folder.parent.exists(), "the folder of a rank that ended is removed"


async def test_a_folder_whose_pod_is_still_coming_is_left_alone(folder: Path, pods: Pods) -> None:
    """Adoption leaves a young folder and one whose rank does not serve yet; `start` goes on."""
    write_folder(folder)
    assert await PodLauncher().adopt(folder) is None
    assert read_config(folder / CONFIG_FILE) == CONFIG
    await asyncio.to_thread(pods.start, folder, "silent")
    assert await PodLauncher().adopt(folder) is None
    assert read_config(folder / CONFIG_FILE) == CONFIG
    # What the rank may have read stays, whatever the new agent would write.
    other = replace(CONFIG, incarnation="another")
    with pytest.raises(TemporaryError, match="does not serve"):
        await PodLauncher(0.0).start(folder, other, always)


async def test_an_old_folder_whose_pod_never_came_is_removed(folder: Path) -> None:
    """Nothing is left of a rank that did not come up within the time that it has."""
    write_folder(folder)
    os.utime(folder, (0, 0))
    assert await PodLauncher().adopt(folder) is None
    assert not (folder / CONFIG_FILE).exists()


async def test_a_pod_that_does_not_come_is_named(folder: Path) -> None:
    """Without a pod the start fails with what to look at, and a late rank finds no config."""
    with pytest.raises(TemporaryError, match="no pod of the rank came up within 0 s"):
        await PodLauncher(0.0).start(folder, CONFIG, always)
    assert not (folder / CONFIG_FILE).exists()


async def test_a_rank_that_ends_before_it_serves_is_told_at_once(folder: Path, pods: Pods) -> None:
    """A rank that dies while it starts fails the start without waiting for the time-out."""
    coming = asyncio.create_task(PodLauncher().start(folder, CONFIG, always))
    await eventually((folder / CONFIG_FILE).exists, "the config is written")
    child = await asyncio.to_thread(pods.start, folder, "silent")
    child.kill()
    with pytest.raises(TemporaryError, match="ended before the rank served"):
        await coming


async def test_a_start_that_is_not_wanted_any_more_leaves_nobody(folder: Path, pods: Pods) -> None:
    """Before the pod is up the config goes; a rank that is up is asked to end, and awaited."""
    assert await PodLauncher().start(folder, CONFIG, lambda: False) is None
    assert not (folder / CONFIG_FILE).exists()
    child = await asyncio.to_thread(pods.start, folder, "silent")
    assert await PodLauncher().start(folder, CONFIG, lambda: False) is None
    assert await asyncio.to_thread(child.wait) == 0


@pytest.mark.parametrize("left", [ADDRESS_FILE, LIFE_FILE, f"{LIFE_FILE}.new"])
def test_a_used_folder_is_refused(folder: Path, left: str) -> None:
    """A rank never starts where another one has been, whatever that one left."""
    folder.mkdir(parents=True)
    (folder / left).touch()
    with pytest.raises(PermanentError, match="of a rank that ran before"):
        LifeLine(folder)


def test_a_folder_that_is_not_there_is_named(folder: Path) -> None:
    """A missing mount is a clear error."""
    with pytest.raises(PermanentError, match="cannot be used: No such file"):
        LifeLine(folder)


def test_a_folder_has_one_rank(folder: Path) -> None:
    """The second of two ranks in a folder is refused, and the first one is still reached."""
    folder.mkdir(parents=True)
    first = LifeLine(folder)
    with pytest.raises(PermanentError):
        LifeLine(folder)
    connection = connect(folder)
    assert connection is not None
    connection.close()
    first._listener.close()
    with pytest.raises(ConnectionRefusedError):
        connect(folder)


async def test_long_folders_have_life_lines(tmp_path: Path, pods: Pods) -> None:
    """A folder far longer than the address of a unix socket may be."""
    folder = tmp_path.joinpath(*["a-folder-with-a-long-name-of-63-characters-as-names-may-be"] * 8)
    assert len(str(folder)) > 400
    found, child = await started(folder, pods)
    child.kill()
    assert await found.life.wait() == -1


def test_a_rank_takes_from_its_place_what_its_agent_cannot_know() -> None:
    """Address and certificates of the pod win over the agent's; the rest is the agent's."""
    there = {"RADDLE_RANK_HOST": "10.1.2.3", "RADDLE_TLS_CA": "/etc/raddle/tls/ca.crt"}
    placed = CONFIG.placed_in(there | {"RADDLE_RANK": "decode/0/0", "HOME": "/"})
    assert (placed.host, placed.tls_ca) == ("10.1.2.3", "/etc/raddle/tls/ca.crt")
    assert CONFIG.placed_in({}) == CONFIG


# A rank loads what it needs within seconds; on a busy machine within a minute.
_END_TIMEOUT_S = 100

# --- the real rank -------------------------------------------------------------------------------


def rank_process(folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "raddle.agent.engine.reference.rank", str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment
    )


def test_a_rank_refuses_a_used_folder(folder: Path) -> None:
    """A rank that is started anew in its old folder ends with code 2 and says why."""
    folder.mkdir(parents=True)
    (folder / ADDRESS_FILE).touch()
    with rank_process(folder) as child:
        _, error = child.communicate(timeout=_END_TIMEOUT_S)
    assert child.returncode == 2
    assert b"of a rank that ran before" in error
    assert b"Traceback" not in error


def test_a_rank_does_not_listen_to_all_without_certificates(folder: Path) -> None:
    """An address off loopback without TLS ends the rank before it serves."""
    write_folder(folder)
    with rank_process(folder, RADDLE_RANK_HOST="0.0.0.0") as child:
        _, error = child.communicate(timeout=_END_TIMEOUT_S)
    assert child.returncode == 2
    assert b"not loopback" in error
    assert read_address(folder) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, None])
async def test_a_waiting_rank_ends_when_told(folder: Path, number: signal.Signals | None) -> None:
    """Before there is a config, SIGTERM and a stop on the life line end a rank."""
    make_folder(folder)
    with rank_process(folder) as child:
        await eventually((folder / LIFE_FILE).exists, "the rank is up")
        if number is None:
            assert await PodLauncher().start(folder, CONFIG, lambda: False) is None
        else:
            # Its life line is heard once its signals are.
            connection = connect(folder)
            assert connection is not None
            connection.close()
            child.send_signal(number)
        await asyncio.to_thread(child.communicate, timeout=_END_TIMEOUT_S)
    assert child.returncode in (0, 128 + signal.SIGTERM)
