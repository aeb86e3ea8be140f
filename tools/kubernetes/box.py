"""A box: a machine within the machine, in namespaces and cgroups of its own.

`unshare` gives it mounts, network, processes, IPC, host name and cgroups; its pid 1 is
`box-init.sh`. Killing that pid 1 ends all that runs in it, and its mounts and interfaces go with
it. Its cgroups lie below the caller's and are removed afterwards. Nothing is made outside.
"""

from __future__ import annotations

import functools
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

INIT = Path(__file__).resolve().parent / "box-init.sh"
CGROUPS = Path("/sys/fs/cgroup")
#: Controllers that a kubelet asks for on cgroup v2.
CONTROLLERS = frozenset({"cpu", "memory", "pids"})
# Moves itself into the groups named before `--`, then becomes the command after it.
_JOIN = 'while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs"; shift; done; shift; exec "$@"'
_NAMESPACES = ("--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Look again and again until a condition holds, at most half of the time.

    Raises:
        TimeoutError: naming what did not come.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        began = time.monotonic()
        if condition():
            return
        ended = time.monotonic()
        if ended > deadline:
            raise TimeoutError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(max(0.1, ended - began))  # the pause between two looks


def start_time(pid: int) -> str:
    """When a process began, in ticks of the kernel: with its pid, it names it for ever."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def bound_to_us(command: Sequence[str]) -> list[str]:
    """The command line of a process that the kernel kills when ours ends, however that ends.

    The kernel takes the thread that starts a process for its parent: one that a worker thread
    started would be killed when that thread's pool ends.
    """
    assert threading.current_thread() is threading.main_thread(), f"{command[0]}: main thread only"
    return ["setpriv", "--pdeathsig", "KILL", *command]


class Box:
    """One box, known by its folder, so that another process can find it again.

    Attributes:
        folder: its files: configuration, logs, `pid` (host pid of its pid 1) and `cgroups`.
    """

    def __init__(self, folder: Path, cluster: str, *, bound: bool = False) -> None:
        """With `bound`, it is killed when the process that starts it ends, however that ends."""
        self.folder = folder
        self._bound = bound
        self.name = folder.name
        self._group = f"raddle-{cluster}-{self.name}"
        self._starter: subprocess.Popen[str] | None = None

    def start(self, nameserver: str) -> None:
        """Return when its mounts and cgroups are there.

        Raises:
            RuntimeError: with what its pid 1 said.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        groups = self._make_groups()
        (self.folder / "cgroups").write_text("".join(f"{group}\n" for group in groups))
        unshare = ["unshare", *_NAMESPACES, "--fork", "--kill-child=KILL", "--mount-proc"]
        init = ["--propagation", "private", "bash", str(INIT), self.name, str(self.folder)]
        made = [*unshare, *init, nameserver]
        log = self.folder / "box.log"
        with log.open("w") as errors:
            self._starter = subprocess.Popen(
                [*self._join(groups), *(bound_to_us(made) if self._bound else made)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                cwd="/",
            )
        assert self._starter.stdout
        with self._starter.stdout as said:
            if said.readline() != "ready\n":
                raise RuntimeError(f"no box {self.name}: {log.read_text().strip()}")
        parent = self._starter.pid
        pid = int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])
        (self.folder / "pid").write_text(f"{pid} {start_time(pid)}")

    @property
    def pid(self) -> int:
        """Host pid of its pid 1."""
        return int((self.folder / "pid").read_text().split()[0])

    @property
    def groups(self) -> list[Path]:
        """Its cgroups, as the machine sees them."""
        file = self.folder / "cgroups"
        return [Path(line) for line in file.read_text().splitlines()] if file.exists() else []

    def command(self, *command: str) -> list[str]:
        """The command line that runs a command inside."""
        enter = ["nsenter", "--target", str(self.pid), *_NAMESPACES, "--"]
        return [*self._join(self.groups), *enter, *command]

    def run(self, *command: str) -> str:
        """Run a command inside and return its output.

        Raises:
            subprocess.CalledProcessError: it failed; its output is in the error.
        """
        result = subprocess.run(
            self.command(*command), capture_output=True, text=True, check=True, cwd="/"
        )
        return result.stdout

    def spawn(self, log: str, *command: str) -> None:
        """Start a server inside, as a child of the box's pid 1; it writes to `<log>.log`."""
        with (self.folder / f"{log}.log").open("a") as output:
            subprocess.run(
                self.command("setsid", "--fork", *command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=True,
                cwd="/",
            )

    def stop(self) -> None:
        """Kill all that runs inside at once, and remove its cgroups. Stopped boxes are left."""
        file = self.folder / "pid"
        if file.exists():
            pid, started = file.read_text().split()
            _kill(int(pid), started)
        if self._starter is not None:
            self._starter.wait(timeout=30)
        for group in self.groups:
            wait_until(functools.partial(_remove, group), f"{group} is empty", 30.0)
        file.unlink(missing_ok=True)

    def _join(self, groups: list[Path]) -> list[str]:
        inner = [group / "init" for group in groups]
        paths = [str(path if path.exists() else path.parent) for path in inner]
        return ["bash", "-c", _JOIN, "join", *paths, "--"]

    def _make_groups(self) -> list[Path]:
        """One group below the caller's in each hierarchy; on cgroup v2 that is one."""
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        rows = [tuple(line.split(":", 2)) for line in lines]
        if [number for number, _, _ in rows] == ["0"]:
            groups = [_delegating(CGROUPS / rows[0][2].strip("/")) / self._group]
        else:
            named = [(names.removeprefix("name="), path) for _, names, path in rows if names]
            at = [CGROUPS / names / path.strip("/") for names, path in named]
            groups = [path / self._group for path in at if path.is_dir()]
        for group in groups:
            group.mkdir(exist_ok=True)
            _copy_cpuset(group)
        return groups


def _delegating(group: Path) -> Path:
    """The nearest group from the caller's upwards that hands its controllers down (cgroup v2)."""
    for candidate in (group, *group.parents):
        control = candidate / "cgroup.subtree_control"
        if control.exists() and set(control.read_text().split()) >= CONTROLLERS:
            return candidate
    raise RuntimeError(f"no cgroup above {group} hands down {', '.join(sorted(CONTROLLERS))}")


def _copy_cpuset(group: Path) -> None:
    """A new cpuset of cgroup v1 is empty and takes no process."""
    if (group / "cpuset.cpus").exists() and (group / "cgroup.clone_children").exists():
        for name in ("cpuset.cpus", "cpuset.mems"):
            (group / name).write_text((group.parent / name).read_text())
        (group / "cgroup.clone_children").write_text("1")


def _kill(pid: int, started: str) -> None:
    """SIGKILL a process unless its pid has become another's, and wait for its end."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if start_time(pid) != started:
            return
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(30_000):
            raise TimeoutError(f"process {pid} does not end")
    except (ProcessLookupError, FileNotFoundError):
        pass
    finally:
        os.close(handle)


def _remove(group: Path) -> bool:
    """Remove a group and all below it; False while a process is still in one of them."""
    for folder, _, _ in os.walk(group, topdown=False):
        try:
            Path(folder).rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return False
    return True
