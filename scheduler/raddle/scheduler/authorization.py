"""The one hook that every call passes: who (identity), where (namespace), what (verb).

Verbs: `read`, `write` (jobs), `admin` (machine, holds, maintenance, fault injection), `report`
(agents), `route` (front doors: follow a job's routes and report its sequences). Without a policy
file, callers on a plain loopback may do everything; with TLS, clients read and write, operators and
`client/admin` administer, agents report, front doors route, and ranks have no business here.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import structlog

from raddle.model.errors import PermanentError, Reason
from raddle.telemetry.tls import FRONT_DOOR

log = structlog.get_logger()

Verb = Literal["read", "write", "admin", "report", "route"]

VERBS: dict[str, Verb] = {
    "SubmitJob": "write",
    "UpdateJob": "write",
    "ScaleJob": "write",
    "CancelJob": "write",
    "DeleteJob": "write",
    "ApplySuperNode": "admin",
    "Cordon": "admin",
    "Uncordon": "admin",
    "DeclareNodeLost": "admin",
    "ReportPods": "admin",
    "CreateMaintenance": "admin",
    "CancelMaintenance": "admin",
    "InjectFault": "admin",
    "ReportStats": "report",
    "WatchRoutes": "route",
    "AckRoutes": "route",
    "ReportSequences": "route",
}


Patterns = Annotated[list[str], msgspec.Meta(min_length=1)]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Identities (with `*`) that may use these verbs in these namespaces (with `*`)."""

    identities: Patterns
    verbs: Annotated[list[Verb], msgspec.Meta(min_length=1)]
    namespaces: Patterns = msgspec.field(default_factory=lambda: ["*"])

    def covers(self, identity: str, verb: str) -> bool:
        """Does it speak of this caller and verb, in whatever namespace?"""
        return verb in self.verbs and any(fnmatchcase(identity, p) for p in self.identities)

    def allows(self, identity: str, namespace: str, verb: str) -> bool:
        """The empty namespace stands for the whole cluster: only `*` matches it."""
        return self.covers(identity, verb) and any(
            fnmatchcase(namespace, pattern) for pattern in self.namespaces
        )


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who may do what where: what no rule allows is refused."""

    rules: list[Rule]

    def allows(self, identity: str, namespace: str, verb: str) -> bool:
        return any(rule.allows(identity, namespace, verb) for rule in self.rules)

    def authorize(self, identity: str, namespace: str, verb: str) -> None:
        """Raise PERMISSION_DENIED, and log who was refused what.

        Without a namespace, what is read is the machine, which every reader may see, or a list
        that shows each reader its own part (`raddle.scheduler.view`).
        """
        is_anywhere = verb == "read" and not namespace
        if self.allows(identity, namespace, verb) or (
            is_anywhere and any(rule.covers(identity, verb) for rule in self.rules)
        ):
            return
        log.warning("refused", identity=identity, namespace=namespace, verb=verb)
        raise PermanentError(
            Reason.PERMISSION_DENIED,
            f"{identity or 'an unnamed caller'} may not {verb} in {namespace or 'the cluster'}; ask"
            " an administrator to add a rule to the policy file.",
        )


_EVERYTHING: list[Verb] = ["read", "write", "admin", "report", "route"]
LOOPBACK = Policy([Rule(["*"], _EVERYTHING)])
DEFAULT = Policy(
    [
        Rule(["scheduler", "operator", "client/admin"], _EVERYTHING),
        Rule(["client/*"], ["read", "write"]),
        Rule(["agent/*"], ["read", "report"]),
        Rule([FRONT_DOOR], ["route"]),
    ]
)


def load_policy(path: str) -> Policy:
    """Read a policy file (YAML).

    Raises:
        PermanentError: INVALID_ARGUMENT naming the path in the file.
    """
    try:
        return msgspec.yaml.decode(Path(path).read_bytes(), type=Policy)
    except (OSError, msgspec.DecodeError) as error:
        raise PermanentError(Reason.INVALID_ARGUMENT, f"policy {path}: {error}.") from error
