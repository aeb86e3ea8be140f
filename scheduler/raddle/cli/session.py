"""One command's way to the server and back: channel, output, errors, exit codes.

Data goes to stdout in the form that was asked for; progress and messages go to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import yaml
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from raddle.cli.contexts import CliContext
from raddle.model.errors import RaddleError, Reason
from raddle.telemetry.channels import make_channel
from raddle.v1 import scheduler_pb2_grpc
from raddle.wire.status import error_from, is_answered

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_FOUND = 3
EXIT_REFUSED = 4
EXIT_UNAVAILABLE = 5
EXIT_DEADLINE = 6
EXIT_CODES = {
    EXIT_OK: "done",
    EXIT_FAILED: "something failed; the message says what",
    EXIT_USAGE: "the command line or a file is wrong",
    EXIT_NOT_FOUND: "what was named does not exist",
    EXIT_REFUSED: "refused: a conflict, a missing permission, or it does not fit",
    EXIT_UNAVAILABLE: "no server answers, or it has no leader or no store",
    EXIT_DEADLINE: "the deadline passed",
}
_BY_REASON = {
    Reason.NOT_FOUND: EXIT_NOT_FOUND,
    Reason.INVALID_ARGUMENT: EXIT_USAGE,
    Reason.UNKNOWN_FIELD: EXIT_USAGE,
    Reason.INVALID_NAME: EXIT_USAGE,
    Reason.NO_LEADER: EXIT_UNAVAILABLE,
    Reason.NOT_LEADER: EXIT_UNAVAILABLE,
    Reason.STORE_UNAVAILABLE: EXIT_UNAVAILABLE,
    Reason.STORE_FULL: EXIT_UNAVAILABLE,
    Reason.DEADLINE_EXCEEDED: EXIT_DEADLINE,
}


@dataclass(slots=True)
class Session:
    """What the global flags say."""

    context: CliContext
    output: str = "table"
    timeout_s: float = 10.0

    def run(
        self, work: Callable[[Any], Awaitable[int | None]], *, leader_only: bool = False
    ) -> NoReturn:
        """Run a command against the `Scheduler` service and leave with its exit code.

        One that is `leader_only` is a single call that standbys do not pass on: it is made again
        where they say that the leader is.
        """
        try:
            code = asyncio.run(self._run(work, leader_only=leader_only))
        except RaddleError as error:
            fail(error)
        except KeyboardInterrupt:
            sys.exit(130)
        sys.exit(code or EXIT_OK)

    async def _run(
        self, work: Callable[[Any], Awaitable[int | None]], *, leader_only: bool
    ) -> int | None:
        try:
            return await self._ask(self.context.server, work)
        except RaddleError as error:
            leader = error.details.get("leader_address")
            if not leader_only or not leader:
                raise
        return await self._ask(leader, work)

    async def _ask(self, server: str, work: Callable[[Any], Awaitable[int | None]]) -> int | None:
        channel = make_channel(server, identity="client/admin", tls=self.context.tls())
        try:
            return await work(scheduler_pb2_grpc.SchedulerStub(channel))
        except grpc.aio.AioRpcError as error:
            raise self._explained(error, server) from error
        finally:
            await channel.close()

    def _explained(self, error: grpc.aio.AioRpcError, server: str) -> RaddleError:
        failure = error_from(error)
        if failure.reason is Reason.NO_LEADER and not is_answered(error):
            failure.message = _unreachable(server, failure.message)
        if failure.reason is Reason.DEADLINE_EXCEEDED and failure.message == "Deadline Exceeded":
            failure.message = (
                f"{server} did not answer within {self.timeout_s:g} s: repeat with the"
                " same idempotency key, or wait longer with --timeout."
            )
        return failure

    def show(
        self, message: Message, columns: Sequence[str] = (), rows: Sequence[Sequence[Any]] = ()
    ) -> None:
        """Print a message as JSON or YAML, or the rows as a table."""
        if self.output == "table":
            print_table(columns, rows)
        else:
            print_data(to_data(message), self.output)

    def show_values(self, values: dict[str, Any]) -> None:
        """Print named values as JSON or YAML, or one a line."""
        if self.output == "table":
            print_table(["NAME", "VALUE"], list(values.items()))
        else:
            print_data(values, self.output)

    def tell(self, message: Message, sentence: str) -> None:
        """What a command without rows did: a sentence for people, or the message as data."""
        if self.output == "table":
            say(sentence)
        else:
            print_data(to_data(message), self.output)


def to_data(message: Message) -> dict[str, Any]:
    """A message as plain data, with the field names of the API and all fields."""
    found: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return found


def _unreachable(server: str, message: str) -> str:
    text = message.lower()
    if "dns" in text or "resol" in text:
        return f"the host of {server} has no known address: name another one with --server."
    if "connect" in text:
        return (
            f"no scheduler answers at {server}: start one with `raddle up`, or name another with"
            " --server."
        )
    return f"{server} ended the call, for it stops or is gone: repeat, or name another --server."


def print_data(data: Any, output: str) -> None:
    """One document on stdout: YAML if that was asked for, else JSON."""
    if output == "yaml":
        sys.stdout.write(yaml.safe_dump(data, sort_keys=False))
    else:
        sys.stdout.write(json.dumps(data, indent=2) + "\n")


def printable(text: str) -> str:
    """The text with control characters escaped: what others wrote must not steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # As text: a cell is nobody's markup.
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    # Without a terminal nothing is cut to a width: scripts read it.
    console = Console() if sys.stdout.isatty() else Console(width=400)
    console.print(table)


def say(text: str) -> None:
    """A line for people, on stderr; if nobody reads there any more, the line is lost."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(printable(text) + "\n")


def fail(error: RaddleError) -> NoReturn:
    """One sentence and the reason, then the exit code."""
    say(f"raddle: {error.message} [{error.reason}]")
    sys.exit(_BY_REASON.get(error.reason, EXIT_REFUSED))
