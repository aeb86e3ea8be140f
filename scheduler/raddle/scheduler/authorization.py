"""The one hook that every call passes: who (identity), where (namespace), what (verb).

Verbs: `read`, `write` (jobs), `admin` (machine, holds, maintenance, fault injection), `report`
(agents and front doors). Without a policy file, callers on a plain loopback may do everything;
with TLS, clients read and write, operators and `client/admin` administer, agents report.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec
import structlog

from raddle.model.errors import PermanentError, Reason

log = structlog.get_logger()

VERBS: dict[str, str] = {
    "SubmitJob": "write",
    "UpdateJob": "write",
    "ScaleJob": "write",
    "CancelJob": "write",
    "DeleteJob": "write",
    "ApplySuperNode": "admin",
    "Cordon": "admin",
    "Uncordon": "admin",
    "DeclareNodeLost": "admin",
    "CreateMaintenance": "admin",
    "CancelMaintenance": "admin",
    "InjectFault": "admin",
    "ReportStats": "report",
    "ReportSequences": "report",
    "AckRoutes": "report",
}


@dataclass(frozen=True, slots=True)
class Rule:
    """Identities (with `*`) that may use these verbs in these namespaces (with `*`)."""

    identities: list[str]
    verbs: list[str]
    namespaces: list[str] = field(default_factory=lambda: ["*"])


@dataclass(frozen=True, slots=True)
class Policy:
    rules: list[Rule]

    def allows(self, identity: str, namespace: str, verb: str) -> bool:
        return any(
            verb in rule.verbs
            and any(fnmatchcase(identity, pattern) for pattern in rule.identities)
            and (
                not namespace or any(fnmatchcase(namespace, pattern) for pattern in rule.namespaces)
            )
            for rule in self.rules
        )

    def authorize(self, identity: str, namespace: str, verb: str) -> None:
        """Raise PERMISSION_DENIED, and log who was refused what."""
        if self.allows(identity, namespace, verb):
            return
        log.warning("refused", identity=identity, namespace=namespace, verb=verb)
        raise PermanentError(
            Reason.PERMISSION_DENIED,
            f"{identity or 'an unnamed caller'} may not {verb} in {namespace or 'the cluster'}; ask"
            " an administrator to add a rule to the policy file.",
        )


_EVERYTHING = ["read", "write", "admin", "report"]
LOOPBACK = Policy([Rule(["*"], _EVERYTHING)])
DEFAULT = Policy(
    [
        Rule(["scheduler", "operator", "client/admin"], _EVERYTHING),
        Rule(["client/*"], ["read", "write", "report"]),
        Rule(["agent/*"], ["read", "report"]),
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
