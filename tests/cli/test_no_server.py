"""The command line on its own: its configuration, and servers that do not answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from raddle.cli.session import EXIT_DEADLINE, EXIT_UNAVAILABLE, EXIT_USAGE
from raddle.store.ports import free_port
from tests.cli.nonsense import ACCEPTED_CONFIGS, BAD_CONFIGS
from tests.cli.program import Program, refused_somehow
from tests.support import eventually

_WAITING: list[str] = []


@asynccontextmanager
async def never_answering() -> AsyncIterator[str]:
    """The address of a server that takes every call and answers none."""

    class Silent(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
            if details.method.endswith("/WatchJobs"):
                return grpc.unary_stream_rpc_method_handler(self.stream)
            return grpc.unary_unary_rpc_method_handler(self.wait)

        async def wait(self, _request: bytes, _context: object) -> bytes:
            await asyncio.Event().wait()
            return b""

        async def stream(self, _request: bytes, _context: object) -> AsyncIterator[bytes]:
            _WAITING.append("a stream")
            yield await self.wait(b"", None)

    server = grpc.aio.server(handlers=[Silent()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)


async def test_the_usual_place_of_the_configuration(alone: Program) -> None:
    """Without RADDLE_CONFIG the file is .config/raddle/config.yaml in the home folder."""
    usual = alone.having(RADDLE_CONFIG="")
    assert (await usual("config", "set-context", "lab", "--server", "10.0.0.5:7400")).code == 0
    assert "10.0.0.5:7400" in (alone.home / ".config" / "raddle" / "config.yaml").read_text()
    assert not alone.config.exists()


async def test_contexts_as_data(alone: Program) -> None:
    """`config contexts -o json` is the file's content; paths in it are whole."""
    alone.file("config.yaml", "contexts: {a: {server: 'h:1'}}\ncurrent: a\n")
    before, after = await alone.all(
        ("config", "contexts", "-o", "json"), ("-o", "yaml", "config", "contexts")
    )
    assert before.json() == after.yaml()
    assert before.json()["current"] == "a"
    assert before.json()["contexts"]["a"]["server"] == "h:1"


async def test_a_context_that_cannot_work_is_not_kept(alone: Program) -> None:
    """`config set-context` and `config check` refuse what the next command would stumble over."""
    whole = ("config", "set-context", "lab", "--server", "127.0.0.1:7400")
    alone.file("noise.pem", "no PEM")
    noise = [part for n in ("ca", "certificate", "key") for part in (f"--{n}", "noise.pem")]
    for words, word in (
        ((*whole, "--ca", "ca.pem"), "three files: ca, certificate, key"),
        ((*whole, *noise), "PEM"),
        ((*whole, "--namespace", "A/../b"), "namespace"),
        (("config", "set-context", "lab", "--server", "foo"), "host:port"),
        (("config", "set-context", "lab", "--server", "foo:70000"), "host:port"),
    ):
        (await alone(*words)).refused(EXIT_USAGE, word)
    assert not alone.config.exists()
    for text, word in (("server: foo", "host:port"), ("namespace: A/b", "namespace")):
        alone.file("config.yaml", f"contexts: {{a: {{{text}}}}}")
        (await alone("config", "check")).refused(EXIT_USAGE, word)


@pytest.mark.parametrize("case", BAD_CONFIGS)
async def test_a_bad_configuration_is_refused(alone: Program, case: str) -> None:
    """`config check` and every other command name the place of the error; the file stays."""
    text, word = BAD_CONFIGS[case]
    alone.file("config.yaml", text)
    before = alone.config.read_bytes()
    checked = await alone("config", "check")
    checked.refused(EXIT_USAGE, word)
    assert alone.config.read_bytes() == before


async def test_a_bad_configuration_is_never_overwritten(alone: Program) -> None:
    """Commands that would change a file that cannot be read refuse, and keep it."""
    alone.file("config.yaml", "contexts: 5")
    for done in await alone.all(
        ("config", "set-context", "a", "--server", "b:1"),
        ("config", "use-context", "a"),
        ("status",),
    ):
        done.refused(EXIT_USAGE, str(alone.config), "$.contexts")
    assert alone.config.read_text() == "contexts: 5"


@pytest.mark.parametrize("case", ACCEPTED_CONFIGS)
async def test_config_check_finds_it(alone: Program, case: str) -> None:
    """`config check` finds what would make the next command fail or be ignored."""
    alone.file("config.yaml", ACCEPTED_CONFIGS[case])
    refused_somehow(await alone("config", "check"))


async def test_a_configuration_that_cannot_be_written(alone: Program) -> None:
    """`config set-context` into a file that cannot be written says so in one sentence."""
    odd = alone.having(RADDLE_CONFIG="/proc/none/config.yaml")
    done = await odd("config", "set-context", "a", "--server", "b:1")
    assert "/proc/none" in done.err
    assert "Traceback" not in done.err, done


async def test_no_server_and_no_answer(alone: Program) -> None:
    """A missing server and a passed deadline have exit codes of their own and say what to do."""
    nowhere = f"127.0.0.1:{free_port()}"
    for done in await alone.all(
        ("--server", nowhere, "status"),
        ("--server", nowhere, "cancel", "x"),
        ("--server", nowhere, "version", "-o", "json"),
    ):
        done.refused(EXIT_UNAVAILABLE, nowhere, "raddle up", "--server")
    async with never_answering() as address:
        late = await alone("--server", address, "--timeout", "0.5", "status")
    late.refused(EXIT_DEADLINE, address, "--timeout")
    odd, unknown = await alone.all(
        ("--server", "foo", "status"), ("--server", "nosuch.invalid:7400", "status")
    )
    odd.refused(EXIT_USAGE, "'foo' is no address", "host:port")
    unknown.refused(EXIT_UNAVAILABLE, "nosuch.invalid:7400 has no known address", "--server")


async def test_a_server_that_stops_ends_a_watch(alone: Program) -> None:
    """`watch` says that the server ended the call when it stops, not what gRPC calls that."""
    async with never_answering() as address:
        watching = asyncio.create_task(alone("--server", address, "watch"))
        await eventually(lambda: bool(_WAITING), "the call has come")
    done = await watching
    done.refused(EXIT_UNAVAILABLE, address, "ended the call")
    assert "Cancelling" not in done.err
