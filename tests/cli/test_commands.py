"""The command line against a running cluster: what it prints, where, and how it ends."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import typer
from typer.testing import CliRunner

from raddle.cli.main import app
from raddle.cli.session import (
    EXIT_FAILED,
    EXIT_NOT_FOUND,
    EXIT_OK,
    EXIT_REFUSED,
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
)
from raddle.store.ports import free_port
from raddle.v1 import job_pb2
from tests.cli.nonsense import (
    ACCEPTED_CALLS,
    ACCEPTED_FILES,
    BAD_FILES,
    BAD_MACHINES,
    GOOD,
    MISUSES,
    NONSENSE,
    NOT_THERE,
)
from tests.cli.program import (
    CALL_TIMEOUT_S,
    PROGRAM,
    Program,
    Small,
    job_text,
    refused_somehow,
    small_cluster,
)
from tests.e2e.served import SMALL_MACHINE
from tests.support import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Small]:
    async with small_cluster(tmp_path_factory.mktemp("small")) as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module")
async def raddle(small: Small, tmp_path: Path) -> AsyncIterator[Program]:
    """The program with the cluster as its server; what it did there is taken back."""
    yield Program(tmp_path, small.address)
    await small.tidy()


async def submitted(raddle: Program, name: str, ranks: int = 4, slots: int = 16) -> str:
    """Submit a job and wait until it is ready; gives its uid."""
    file = raddle.file(f"{name}.yaml", job_text(name, ranks, slots))
    done = await raddle("submit", file, "--wait", "-o", "json")
    assert done.code == EXIT_OK, done
    return str(json.loads(done.out)["job"]["uid"])


# --- help, version, completion -----------------------------------------------------------------


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command's words; groups have none of their own."""
    for name, inner in command.commands.items():
        if hasattr(inner, "commands"):
            yield from _commands(inner, (*path, name))
        else:
            yield (*path, name)


COMMANDS = tuple(_commands(typer.main.get_command(app)))


async def test_every_command_explains_itself(alone: Program) -> None:
    """`--help` of each command goes to stdout, says what it is for and shows an example."""
    assert len(COMMANDS) > 20
    # Help is one program's text: only some calls need a process of their own.
    apart = {words: await alone(*words, "--help") for words in (("submit",), ("sim",))}
    for words in COMMANDS:
        if words in apart:
            text = apart[words].plain()
        else:
            result = CliRunner().invoke(app, [*words, "--help"], prog_name="raddle")
            assert result.exit_code == EXIT_OK, words
            assert result.stderr == "", words
            text = result.stdout
        head, _, body = text.partition("\n")
        assert head.lower().startswith(f"usage: raddle {' '.join(words)}"), words
        assert "example" in body.lower(), words
        assert f"raddle {' '.join(words)}" in body, words


async def test_the_program_lists_its_commands(alone: Program) -> None:
    """`raddle --help` and a bare `raddle` name every command; the bare one is a wrong use."""
    asked, bare, group = await alone.all(("--help",), (), ("config", "--help"))
    names = {words[0] for words in COMMANDS}
    assert all(f"  {name} " in asked.plain() for name in names)
    assert all(f"  {words[1]} " in group.plain() for words in COMMANDS if words[0] == "config")
    assert bare.code == EXIT_USAGE
    assert all(f"  {name} " in bare.out + bare.err for name in names)


async def test_completion(alone: Program) -> None:
    """The completion script is shown, and what it asks the program gives commands and options."""
    shown = await asyncio.to_thread(
        subprocess.run,
        # The shell that asks is found among the parents, so it must not become the program.
        ["bash", "-c", f"{shlex.join(PROGRAM)} --show-completion; true"],
        capture_output=True,
        env=alone.variables(),
        timeout=CALL_TIMEOUT_S,
        check=True,
    )
    script = shown.stdout.decode()
    assert "_RADDLE_COMPLETE=complete_bash" in script
    asking = alone.having(_RADDLE_COMPLETE="complete_bash", COMP_WORDS="raddle un", COMP_CWORD="1")
    assert (await asking()).out.split() == ["uncordon"]
    options = asking.having(COMP_WORDS="raddle submit --", COMP_CWORD="2")
    assert {"--dry-run", "--wait"} <= set((await options()).out.split())


async def test_versions(raddle: Program, alone: Program) -> None:
    """`--version` needs no server; `version` tells the server's too, and who leads."""
    own = (await alone("--version")).plain()
    number = own.removeprefix("raddle ").strip()
    table, data = await raddle.all(("version",), ("version", "-o", "json"))
    assert table.plain().splitlines()[1].split()[:3] == [number, number, "scheduler-0"]
    assert data.json()["version"] == number
    assert data.json()["leader_address"] == raddle.server


# --- jobs --------------------------------------------------------------------------------------


async def test_a_dry_run_changes_nothing(raddle: Program, small: Small) -> None:
    """`submit --dry-run` says where a job would sit, or why nowhere, and writes nothing."""
    before = await small.content()
    file = raddle.file("job.yaml", job_text("dry"))
    big = raddle.file("big.yaml", job_text("dry", ranks=33))
    table, data, too_big = await raddle.all(
        ("submit", file, "--dry-run"),
        ("submit", file, "--dry-run", "-o", "json"),
        ("submit", big, "--dry-run"),
    )
    assert table.plain().splitlines()[1].split()[0] == "True"
    assert len(data.json()["placement"]["instances"][0]["ranks"]) == 4
    too_big.refused(EXIT_REFUSED, "roles[0].ranks", "32", "DOES_NOT_FIT")
    assert await small.content() == before


async def test_submit_and_wait(raddle: Program, small: Small) -> None:
    """`submit --wait` tells each state on stderr and, when the job is ready, the job on stdout."""
    file = raddle.file("job.yaml", job_text("waited"))
    done = await raddle("submit", file, "--wait", "-o", "json")
    assert done.code == EXIT_OK
    job = json.loads(done.out)["job"]
    assert job["state"] == "JOB_STATE_READY"
    assert [line.split(":")[0] for line in done.err.splitlines()][-1] == "READY"
    assert job["uid"] in done.err.splitlines()[0]
    again = await raddle("submit", file)
    again.refused(EXIT_REFUSED, "default/waited exists", job["uid"], "choose another name")
    assert len(await small.jobs()) == 1


async def test_a_wait_ends_when_the_job_does(raddle: Program, small: Small) -> None:
    """`submit --wait` of a job that somebody cancels ends with exit code 1 and the job's record."""
    await submitted(raddle, "first", ranks=20)
    file = raddle.file("second.yaml", job_text("second", ranks=20))
    waiting = asyncio.create_task(raddle("submit", file, "--wait", "-o", "json"))

    async def waits() -> bool:
        return any(job.spec.name == "second" for job in await small.jobs())

    await eventually(waits, "the second job waits for free dies")
    (await raddle("cancel", "second")).plain()
    done = await waiting
    assert done.code == EXIT_FAILED
    assert json.loads(done.out)["job"]["state"] == "JOB_STATE_CANCELLED"
    assert "CANCELLED: cancelled by" in done.err


async def test_submit_from_a_pipe_once(raddle: Program, small: Small) -> None:
    """A job may come through a pipe; the same idempotency key gives the same job."""
    ask = ("submit", "/dev/stdin", "--idempotency-key", "k1", "-o", "json")
    first = await raddle(*ask, stdin=job_text("piped"))
    again = await raddle(*ask, stdin=job_text("piped"))
    assert first.json()["job"]["uid"] == again.json()["job"]["uid"]
    other = await raddle(*ask, stdin=job_text("piped", ranks=6))
    other.refused(EXIT_REFUSED, "IDEMPOTENCY_KEY_REUSED")
    assert len(await small.jobs()) == 1


async def test_what_is_said_of_one_job(raddle: Program) -> None:
    """`status`, `describe` and `explain` agree on a job, by name, namespace/name and uid."""
    uid = await submitted(raddle, "told")
    rows, one, by_uid, by_path, described, explained = await raddle.all(
        ("status",),
        ("status", "told", "-o", "json"),
        ("status", uid, "-o", "json"),
        ("status", "default/told", "-o", "json"),
        ("describe", "told"),
        ("explain", f"job/{uid}"),
    )
    assert rows.plain().splitlines()[1].split()[:4] == ["default", "told", uid, "READY"]
    assert one.json() == by_uid.json() == by_path.json()
    seats = [line.split() for line in described.plain().splitlines()[3:]]
    assert [seat[0] for seat in seats] == [f"decode/0/{rank}" for rank in range(4)]
    assert all(seat[1].startswith(seat[2]) and seat[3] == "ACTIVE" for seat in seats)
    assert "JOB_ACCEPTED: default/told" in explained.plain()


async def test_scale_and_cancel_and_delete(raddle: Program, small: Small) -> None:
    """A job is scaled to more dies, cancelled and deleted; each step tells the new state."""
    uid = await submitted(raddle, "sized")
    (await raddle("delete", "sized")).refused(EXIT_REFUSED, "cancel it before", "NOT_ENDED")
    scaled = (await raddle("scale", "sized", "decode", "--ranks", "6", "-o", "json")).json()
    assert scaled["job"]["spec"]["roles"][0]["ranks"] == 6

    async def seats() -> bool:
        answer = (await raddle("describe", "sized", "-o", "json")).json()
        return len(answer["placement"]["instances"][0]["ranks"]) == 6

    await eventually(seats, "the job has six seats")
    await small.state_is(uid, job_pb2.JOB_STATE_READY)
    assert (await raddle("cancel", "sized")).plain().splitlines()[1].split()[2] == uid
    await small.state_is(uid, job_pb2.JOB_STATE_CANCELLED)
    assert (await raddle("delete", "sized", "-o", "json")).json() == {}
    (await raddle("status", "sized")).refused(EXIT_NOT_FOUND, "default/sized", "raddle status")
    assert await small.jobs() == []


async def test_update(raddle: Program) -> None:
    """`update` changes the priority, refuses another generation, and wants something to do."""
    await submitted(raddle, "changed")
    done = await raddle("update", "changed", "--priority", "7", "-o", "json")
    assert done.json()["job"]["spec"]["priority"] == 7
    stale, nothing = await raddle.all(
        ("update", "changed", "--priority", "8", "--expected-generation", "99"),
        ("update", "changed"),
    )
    stale.refused(EXIT_REFUSED, "STALE_GENERATION")
    nothing.misused("--priority or --queue")
    assert (await raddle("status", "changed", "-o", "json")).json()["job"] == done.json()["job"]


async def test_watch_follows_jobs(raddle: Program) -> None:
    """`watch` prints one JSON document a line, new ones as they come, and Ctrl-C ends it."""
    process = await asyncio.create_subprocess_exec(
        *PROGRAM, "watch", stdout=asyncio.subprocess.PIPE, env=raddle.variables()
    )
    assert process.stdout is not None
    try:
        synced = json.loads(await asyncio.wait_for(process.stdout.readline(), 20.0))
        assert synced["kind"] == "WATCH_KIND_SYNCED"
        uid = await submitted(raddle, "watched")
        change = json.loads(await asyncio.wait_for(process.stdout.readline(), 20.0))
        assert change["kind"] == "WATCH_KIND_CHANGED"
        assert change["job"]["uid"] == uid
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 20.0) == 130
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_watch_in_other_forms(raddle: Program) -> None:
    """`watch` shows the namespace's jobs, or all with -A; as a table, YAML documents or JSON."""
    file = raddle.file("job.yaml", job_text("seen"))
    uid = (await raddle("-n", "team-a", "submit", file, "-o", "json")).json()["job"]["uid"]
    first = {}
    for words in (
        ("-n", "zz", "watch"),
        ("-n", "team-a", "watch", "-o", "table"),
        ("watch", "-A", "--output", "yaml"),
        ("-o", "yaml", "-n", "team-a", "watch"),
    ):
        process = await asyncio.create_subprocess_exec(
            *PROGRAM, *words, stdout=asyncio.subprocess.PIPE, env=raddle.variables()
        )
        assert process.stdout is not None
        try:
            lines = [(await asyncio.wait_for(process.stdout.readline(), 20.0)).decode()]
            if lines == ["---\n"]:
                lines.append((await asyncio.wait_for(process.stdout.readline(), 20.0)).decode())
            first[words] = "".join(lines)
        finally:
            process.send_signal(signal.SIGINT)
            await process.wait()
    none, row, everything, document = first.values()
    assert json.loads(none)["kind"] == "WATCH_KIND_SYNCED"
    assert row.split()[:4] == ["SNAPSHOT", "team-a", "seen", uid]
    assert everything == document == "---\nkind: WATCH_KIND_SNAPSHOT\n"


async def test_a_reader_that_goes_away(raddle: Program) -> None:
    """A listing or a watch whose pipe is closed ends without a traceback."""
    (await raddle("cordon", "sn0/n03")).plain()
    for words in ("watch", "events", "dies -o json"):
        done = await asyncio.to_thread(
            subprocess.run,
            ["bash", "-c", f"{shlex.join(PROGRAM)} {words} | head -c 1"],
            capture_output=True,
            env=raddle.variables(),
            timeout=CALL_TIMEOUT_S,
            check=False,
        )
        assert len(done.stdout) == 1, words
        assert done.stderr == b"", words
        if words == "watch":
            await submitted(raddle, "unseen")


async def test_names_like_uids(raddle: Program) -> None:
    """A job whose name looks like a uid, or begins like one, is found by its name."""
    for name in ("j-abc", "j-0123456789ab"):
        uid = await submitted(raddle, name)
        for words in (name, uid, f"default/{name}"):
            assert (await raddle("status", words, "-o", "json")).json()["job"]["uid"] == uid
        told = await raddle("explain", f"job/{name}")
        if name == "j-abc":
            assert "READY" in told.plain()


async def test_explain_looks_into_the_namespace(raddle: Program) -> None:
    """`-n SPACE explain job/NAME` tells of that namespace's job."""
    file = raddle.file("job.yaml", job_text("spaced"))
    (await raddle("-n", "team-a", "submit", file)).plain()
    there, here = await raddle.all(
        ("-n", "team-a", "explain", "job/spaced"), ("explain", "job/spaced")
    )
    assert "JOB_ACCEPTED: team-a/spaced" in there.plain()
    here.refused(EXIT_NOT_FOUND, "default/spaced")


async def test_namespaces(raddle: Program) -> None:
    """A job is put into the namespace that was named, and lists show only that one's jobs."""
    file = raddle.file("job.yaml", job_text("spaced"))
    (await raddle("-n", "team-a", "submit", file)).plain()
    here, there, everywhere, inside, outside = await raddle.all(
        ("status", "-o", "json"),
        ("-n", "team-a", "status", "-o", "json"),
        ("status", "-A", "-o", "json"),
        ("describe", "team-a/spaced"),
        ("describe", "spaced"),
    )
    assert here.json()["jobs"] == []
    assert there.json()["jobs"] == everywhere.json()["jobs"]
    assert len(there.json()["jobs"]) == 1
    assert "team-a" in inside.plain()
    outside.refused(EXIT_NOT_FOUND, "default/spaced")


# --- the machine -------------------------------------------------------------------------------


async def test_nodes_and_dies(raddle: Program) -> None:
    """`nodes` and `dies` list the machine; `dies NODE` only that node's part of it."""
    nodes, table, dies, some = await raddle.all(
        ("nodes", "-o", "json"), ("nodes",), ("dies", "-o", "json"), ("dies", "sn0/n02")
    )
    names = [node["node"] for node in nodes.json()["nodes"]]
    assert names == [f"sn0/n0{number}" for number in range(4)]
    assert [line.split()[:2] for line in table.plain().splitlines()[1:]] == [
        [name, "READY"] for name in names
    ]
    assert len(dies.json()["dies"]) == 32
    rows = some.plain().splitlines()[1:]
    assert len(rows) == 8
    assert all(row.startswith("sn0/n02/") for row in rows)


async def test_cordon_and_uncordon(raddle: Program) -> None:
    """A cordoned node is told with its reason and takes no work until it is uncordoned."""
    done = await raddle("cordon", "sn0/n01", "-m", "fan noise")
    assert done.plain().splitlines()[1].split() == ["sn0/n01", "CORDON", "fan", "noise"]
    file = raddle.file("job.yaml", job_text("whole", ranks=32))
    held, why, fits_not = await raddle.all(
        ("dies", "sn0/n01", "-o", "json"),
        ("explain", "node/sn0/n01"),
        ("submit", file, "--dry-run", "-o", "json"),
    )
    assert {die["hold"] for die in held.json()["dies"]} == {"CORDON"}
    assert "CORDON: fan noise" in why.plain()
    assert "placement" not in fits_not.json()
    assert "sn0/n01" in (await raddle("uncordon", "sn0/n01")).told()
    again, free, fits = await raddle.all(
        ("uncordon", "sn0/n01"),
        ("dies", "sn0/n01", "-o", "json"),
        ("submit", file, "--dry-run", "-o", "json"),
    )
    again.refused(EXIT_NOT_FOUND, "sn0/n01 has no hold", "raddle dies")
    assert {die["hold"] for die in free.json()["dies"]} == {""}
    assert len(fits.json()["placement"]["instances"]) == 1


async def test_drain(raddle: Program, small: Small) -> None:
    """`drain --wait` ends when nothing runs there; its hold is lifted by cancelling it alone."""
    before = await small.content()
    (await raddle("drain", "sn0/n00", "--dry-run")).plain()
    assert await small.content() == before
    uid = await submitted(raddle, "moved")
    job = (await raddle("describe", uid, "-o", "json")).json()
    node = job["placement"]["instances"][0]["ranks"][0]["node"]
    record = (await raddle("drain", node, "--wait", "-m", "disk", "-o", "json")).json()
    assert record["state"] == "MAINTENANCE_STATE_DRAINED"
    assert record["ranks_moved"] == 4
    listed, after, refused = await raddle.all(
        ("drain",), ("describe", uid, "-o", "json"), ("uncordon", node)
    )
    assert listed.plain().splitlines()[1].split()[:3] == [record["id"], node, "DRAINED"]
    seats = after.json()["placement"]["instances"][0]["ranks"]
    assert all(seat["node"] != node for seat in seats)
    refused.refused(EXIT_REFUSED, node, "cancel the maintenance")
    cancelled = (await raddle("drain", record["id"], "--cancel", "-o", "json")).json()
    assert cancelled["state"] == "MAINTENANCE_STATE_CANCELLED"
    (await raddle("uncordon", node)).refused(EXIT_NOT_FOUND, "no hold")


async def test_cordon_and_drain_are_apart(raddle: Program) -> None:
    """A cordon outlives the drain of its node and the other way round; both are shown."""
    (await raddle("cordon", "sn0/n02", "-m", "fan")).plain()
    record = (await raddle("drain", "sn0/n02", "--wait", "-o", "json")).json()
    again = (await raddle("drain", "sn0/n02", "-o", "json")).json()
    assert again["id"] == record["id"]
    both = (await raddle("dies", "sn0/n02")).plain().splitlines()[1:]
    assert {row.split()[1] for row in both} == {"DRAIN,CORDON"}
    lifted = (await raddle("uncordon", "sn0/n02", "-o", "json")).json()
    assert [(hold["kind"], hold["subject"]) for hold in lifted["holds"]] == [("DRAIN", "sn0/n02")]
    (await raddle("cordon", "sn0/n02", "-m", "fan")).plain()
    assert "still held by DRAIN" in (await raddle("uncordon", "sn0/n02")).told()
    (await raddle("cordon", "sn0/n02", "-m", "fan")).plain()
    (await raddle("drain", record["id"], "--cancel")).plain()
    left = (await raddle("dies", "sn0/n02")).plain().splitlines()[1:]
    assert {row.split()[1] for row in left} == {"CORDON"}
    assert (await raddle("uncordon", "sn0/n02")).told() == "sn0/n02: takes work again\n"


async def test_a_dry_drain(raddle: Program, small: Small) -> None:
    """`drain --dry-run` counts the ranks that would move and waits for nothing, even if told to."""
    uid = await submitted(raddle, "counted")
    job = (await raddle("describe", uid, "-o", "json")).json()
    node = job["placement"]["instances"][0]["ranks"][0]["node"]
    before = await small.content()
    record = (await raddle("drain", node, "--dry-run", "--wait", "-o", "json")).json()
    assert (record["id"], record["ranks_total"]) == ("", 4)
    assert "4 ranks would have to move" in record["why"]["message"]
    assert await small.content() == before


async def test_a_lost_node_must_be_silent(raddle: Program, small: Small) -> None:
    """`lost` is refused while the node's agent reports, and changes nothing."""
    before = await small.content()
    done = await raddle("lost", "sn0/n01", "-m", "no power")
    assert done.code in (EXIT_USAGE, EXIT_REFUSED), done
    done.refused(done.code, "sn0/n01", "silent", "raddle drain")
    assert await small.content() == before


async def test_the_same_supernode_changes_nothing(raddle: Program, small: Small) -> None:
    """`supernode` with the description that is known says that nothing changed."""
    before = await small.content()
    done = await raddle("supernode", small.cluster.machine, "-o", "json")
    assert done.json().get("changed") is False
    assert await small.content() == before


# --- faults and history ------------------------------------------------------------------------


async def test_an_injected_fault_is_told_to_its_end(raddle: Program, small: Small) -> None:
    """inject -> incident -> explain with the candidates -> events -> clear."""
    uid = await submitted(raddle, "hurt")
    job = (await raddle("describe", uid, "-o", "json")).json()
    die = job["placement"]["instances"][0]["ranks"][1]["die"]
    assert die in (await raddle("inject", die)).plain()

    async def closed() -> bool:
        return len(await small.closed_incidents(die)) == 1

    await eventually(closed, f"an incident about {die} is closed")
    listed = (await raddle("incidents", "-o", "json")).json()["incidents"]
    found = next(i for i in listed if i["subject"] == die)
    assert found["phase"] == "INCIDENT_PHASE_CLOSED"
    considered = found["plans"][0]["instances"][0]["considered"]
    assert sum(option["chosen"] for option in considered) == 1
    told, one, why, health, events = await raddle.all(
        ("explain", f"incident/{found['id']}"),
        ("incidents", found["id"], "-o", "json"),
        ("explain", f"die/{die}"),
        ("dies", die.rsplit("/", 2)[0]),
        ("events", uid, "-o", "json"),
    )
    lines = told.plain().splitlines()
    for option in considered:
        assert any(line.strip().startswith(f"{option['option']}: ") for line in lines), option
    assert one.json()["incident"] == found
    assert "80E18005" in why.plain()
    assert found["id"] in why.plain()
    row = next(line for line in health.plain().splitlines() if line.startswith(f"{die} "))
    assert "SEPARATE_NPU" in row
    kinds = [event["kind"] for event in events.json()["events"]]
    assert kinds.index("JOB_ACCEPTED") < kinds.index("JOB_READY")
    (await raddle("inject", die, "--clear")).plain()
    await eventually(small.is_healthy, "the die is healthy again")
    assert "SEPARATE_NPU" not in (await raddle("dies", die.rsplit("/", 2)[0])).plain()


async def test_events_are_the_newest(raddle: Program) -> None:
    """`events --last N` shows the newest N, oldest first, and only of a subject if one is named."""
    (await raddle("cordon", "sn0/n03", "-m", "noise")).plain()
    (await raddle("uncordon", "sn0/n03")).told()
    rows, data, other = await raddle.all(
        ("events", "--last", "2"),
        ("events", "sn0/n03", "--last", "2", "-o", "json"),
        ("events", "sn0/n99", "-o", "json"),
    )
    assert [line.split()[1] for line in rows.plain().splitlines()[1:]] == [
        "HOLD_CORDON",
        "HOLD_LIFTED",
    ]
    told = data.json()["events"]
    assert told[0]["message"] == "noise"
    assert [event["subject"] for event in told] == ["sn0/n03", "sn0/n03"]
    assert other.json()["events"] == []


# --- output ------------------------------------------------------------------------------------


async def test_data_is_data_and_nothing_else(raddle: Program) -> None:
    """JSON and YAML of every listing hold the same, whole; the option may stand at either place."""
    uid = await submitted(raddle, "shown")
    (await raddle("cordon", "sn0/n03", "-m", "yes: [no, \u201cmaybe\u201d]")).plain()
    listings: tuple[tuple[str, ...], ...] = (
        ("explain", "node/sn0/n03"),
        ("status", uid),
        ("dies",),
        ("events",),
        ("supernode", SMALL_MACHINE),
    )
    as_json = await raddle.all(*((*each, "--output", "json") for each in listings))
    as_yaml = await raddle.all(*(("--output", "yaml", *each) for each in listings))
    for one, other in zip(as_json, as_yaml, strict=True):
        assert one.json() == other.yaml(), one.arguments
    why = as_json[0].json()["why"]
    assert why["message"] == "yes: [no, \u201cmaybe\u201d]"
    last = await raddle("--output", "json", "nodes", "--output", "table")
    assert last.plain().startswith("NODE")


# --- the configuration -------------------------------------------------------------------------


async def test_contexts(raddle: Program, alone: Program) -> None:
    """Contexts are made, listed, chosen and used; a server or context named for one call wins."""
    nowhere = f"127.0.0.1:{free_port()}"
    for name, server in (("lab", raddle.server), ("gone", nowhere)):
        made = await alone(
            *("config", "set-context", name, "--server", server, "--namespace", "team-b")
        )
        assert made.code == EXIT_OK
    listed, checked, unreachable, named, served, by_name = await alone.all(
        ("config", "contexts"),
        ("config", "check"),
        ("nodes",),
        ("--context", "lab", "nodes"),
        ("--server", raddle.server, "nodes"),
        ("config", "use-context", "nobody"),
    )
    rows = [line.split() for line in listed.plain().splitlines()[1:]]
    assert rows == [["*", "gone", nowhere, "team-b"], ["lab", raddle.server, "team-b"]]
    assert str(alone.config) in checked.told()
    unreachable.refused(EXIT_UNAVAILABLE, nowhere, "raddle up", "--server")
    assert named.plain() == served.plain()
    by_name.refused(EXIT_NOT_FOUND, "'nobody'", "gone, lab")
    assert (await alone("config", "use-context", "lab")).code == EXIT_OK
    file = alone.file("job.yaml", job_text("contextual"))
    assert (await alone("submit", file, "-o", "json")).json()["job"]["spec"]["namespace"] == (
        "team-b"
    )
    by_variable = await alone.having(RADDLE_CONTEXT="gone").all(("nodes",))
    by_variable[0].refused(EXIT_UNAVAILABLE, nowhere)


# --- errors ------------------------------------------------------------------------------------


async def test_what_is_named_must_exist(raddle: Program, small: Small) -> None:
    """What does not exist ends with exit code 3, its name, and mostly where names are listed."""
    before = await small.content()
    calls = [call for call, _ in NOT_THERE]
    for (_, word), done in zip(NOT_THERE, await raddle.all(*calls), strict=True):
        done.refused(EXIT_NOT_FOUND, word)
    assert await small.content() == before


async def test_wrong_command_lines(raddle: Program) -> None:
    """Misuse ends with exit code 2, the usage on stderr, and names what is wrong."""
    calls = [call for call, _ in MISUSES]
    for (_, word), done in zip(MISUSES, await raddle.all(*calls), strict=True):
        done.misused(word)


async def test_nonsense_is_refused_and_changes_nothing(raddle: Program, small: Small) -> None:
    """Positions, names, texts and numbers that make no sense end with exit code 2."""
    uid = await submitted(raddle, "kept")
    before = await small.content()
    for name in ("j", "k"):
        raddle.file(f"{name}.yaml", job_text(name))
    calls = [call for call, _ in NONSENSE]
    for (_, word), done in zip(NONSENSE, await raddle.all(*calls), strict=True):
        done.refused(EXIT_USAGE, word)
    (await raddle("scale", "kept", "decode", "--ranks", "400")).refused(EXIT_REFUSED, "32")
    (await raddle("scale", "kept", "nobody", "--ranks", "4")).refused(EXIT_NOT_FOUND, "'nobody'")
    assert await small.content() == before
    assert [job.uid for job in await small.jobs()] == [uid]


@pytest.mark.parametrize("family", BAD_FILES)
async def test_bad_job_files_change_nothing(raddle: Program, small: Small, family: str) -> None:
    """Each bad file ends with exit code 2 and words that lead to the error; nothing is written."""
    before = await small.content()
    cases = BAD_FILES[family]
    files = [raddle.file(f"{number}.yaml", text) for number, (text, _) in enumerate(cases.values())]
    ends = await raddle.all(*(("submit", file) for file in files))
    for (case, (_, word)), done in zip(cases.items(), ends, strict=True):
        assert (case, done.code) == (case, EXIT_USAGE), done
        done.refused(EXIT_USAGE, word)
    assert await small.content() == before


async def test_files_that_cannot_be_used(raddle: Program, small: Small) -> None:
    """Huge files, folders, no text, and models that are not there are refused; nothing changes."""
    before = await small.content()
    raddle.file("huge.yaml", "name: x\n" + "#" * 1_500_000)
    raddle.file("binary.yaml", b"\xff\xfe\x01")
    raddle.file("model.yaml", GOOD.replace("config: raddle-demo", "config: nowhere.json"))
    raddle.file("text.yaml", GOOD.replace("config: raddle-demo", "config: model.yaml"))
    huge, folder, binary, model, text, machine = await raddle.all(
        *(("submit", file) for file in ("huge.yaml", ".", "binary.yaml", "model.yaml")),
        ("submit", "text.yaml"),
        ("supernode", "huge.yaml"),
    )
    for done in await raddle.all(("submit", "binary.yaml"), ("supernode", "binary.yaml")):
        done.refused(EXIT_USAGE, "binary.yaml", "utf-8")
    for done in (huge, machine):
        done.refused(done.code, "1000000 bytes")
        assert done.code in (EXIT_USAGE, EXIT_REFUSED)
    for done in (folder, binary):
        done.refused(done.code, "cannot be read")
        assert done.code in (EXIT_USAGE, EXIT_NOT_FOUND)
    model.refused(EXIT_NOT_FOUND, "nowhere.json", "raddle-demo")
    text.refused(EXIT_USAGE, "model.config is no JSON")
    assert await small.content() == before


async def test_bad_machine_files_change_nothing(raddle: Program, small: Small) -> None:
    """A supernode file with a bad size, name, field or shape is refused by the field's name."""
    before = await small.content()
    for name, (text, _) in BAD_MACHINES.items():
        raddle.file(f"{name}.yaml", text)
    ends = await raddle.all(*(("supernode", f"{name}.yaml") for name in BAD_MACHINES))
    for (_, word), done in zip(BAD_MACHINES.values(), ends, strict=True):
        done.refused(EXIT_USAGE, word)
    assert await small.content() == before


@pytest.mark.parametrize("case", ACCEPTED_CALLS)
async def test_more_nonsense_is_refused(raddle: Program, case: str) -> None:
    """Numbers out of range, parts that are not there and odd texts are refused with a reason."""
    if "kept" in ACCEPTED_CALLS[case]:
        await submitted(raddle, "kept")
    refused_somehow(await raddle(*ACCEPTED_CALLS[case]))


@pytest.mark.parametrize("case", ACCEPTED_FILES)
async def test_more_bad_job_files_are_refused(raddle: Program, case: str) -> None:
    """Files that contradict themselves, or name a model that is no JSON, are refused."""
    raddle.file("bytes.bin", b"\xff\xfe")
    refused_somehow(await raddle("submit", raddle.file("job.yaml", ACCEPTED_FILES[case])))


@pytest.mark.parametrize("text", ["[bold]x[/bold] :smile:", "[/x]"])
async def test_tables_hold_texts_as_they_are(raddle: Program, text: str) -> None:
    """What an operator wrote stands in a table as written."""
    assert text in (await raddle("cordon", "sn0/n03", "-m", text)).plain()


async def test_a_short_deadline_is_short(raddle: Program) -> None:
    """`drain --deadline 0.5` is half a second, not the usual hour."""
    done = await raddle("drain", "sn0/n01", "--dry-run", "--deadline", "0.5", "-o", "json")
    ends = [datetime.fromisoformat(done.json()[name][:26]) for name in ("create_time", "deadline")]
    assert (ends[1] - ends[0]).total_seconds() == pytest.approx(0.5, abs=0.1)


async def test_a_drain_that_cannot_move_a_job_fails(raddle: Program) -> None:
    """`drain --wait` of a job that fits nowhere else gives up at its deadline with exit code 1."""
    await submitted(raddle, "stuck", ranks=32, slots=1)
    done = await raddle("drain", "sn0/n00", "--deadline", "1", "--wait")
    assert done.code == EXIT_FAILED


async def test_explain_takes_a_name(raddle: Program) -> None:
    """`explain job/NAME` tells the same as `explain job/UID`."""
    uid = await submitted(raddle, "named")
    by_uid, by_name = await raddle.all(("explain", f"job/{uid}"), ("explain", "job/named"))
    assert by_name.plain().splitlines()[1:] == by_uid.plain().splitlines()[1:]
