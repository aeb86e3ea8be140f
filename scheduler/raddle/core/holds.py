"""Who forbids new work on what: holds of several kinds on one subject come and go by themselves.

In go a subject and a kind, out come staged writes. A cordon is an operator's and ends with his
uncordon; a drain is a maintenance's and ends with it.
"""

from __future__ import annotations

import re

from raddle.core.context import Context, note
from raddle.model import keys
from raddle.model.errors import PermanentError, Reason
from raddle.model.health import Hold
from raddle.model.incident import Maintenance, MaintenanceState
from raddle.model.kinds import HoldKind

HOLDS_MAX = 10_000
_CODE = re.compile(r"[A-Z][A-Z0-9_]{0,63}\Z")
#: States in which a maintenance keeps work away from its subject.
_HOLDING = (MaintenanceState.DRAINING, MaintenanceState.DRAINED)


def put_hold(
    context: Context, subject: str, kind: HoldKind, message: str, identity: str, reason: str = ""
) -> Hold:
    """The hold of this kind on the subject, made if there is none.

    One without a reason is a person's: it takes the place of one that a program gave a reason.

    Raises:
        PermanentError: INVALID_ARGUMENT or NOT_FOUND for the subject, LIMIT_EXCEEDED,
            INVALID_ARGUMENT for a reason that is no code.
    """
    if reason and not _CODE.match(reason):
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            "reason must be 1 to 64 capitals, digits and underscores, or left out.",
            field="reason",
        )
    context.cluster.require_subject(subject)
    old = context.holds.get((subject, kind))
    if old is not None and (reason or old.reason == kind):
        return old
    if old is None and len(context.holds) >= HOLDS_MAX:
        raise PermanentError(Reason.LIMIT_EXCEEDED, f"{HOLDS_MAX} holds exist: lift some first.")
    hold = Hold(
        subject=subject,
        kind=kind,
        reason=reason or kind,
        message=message or f"{kind.lower()} by {identity}",
        created_by=identity,
        create_time=context.now,
    )
    context.state.put(keys.hold(subject, kind), hold)
    context.set_hold(hold)
    # Nothing new fits, but those who wait are told other numbers.
    context.queue_dirty = True
    note(context, f"HOLD_{kind}", subject, hold.message, identity=identity)
    return hold


def lift_hold(context: Context, subject: str, kind: HoldKind) -> None:
    """End one hold, wherever it is stored; those of other kinds stay."""
    for key in (keys.hold(subject, kind), keys.only_hold(subject)):
        stored: Hold | None = context.state.records.get(key)
        if stored is not None and stored.kind is kind:
            context.state.delete(key)
    context.lift_hold(subject, kind)
    context.queue_dirty = True


def lift_drain(context: Context, subject: str) -> None:
    """End the hold of a maintenance that does not hold any more, unless another one still does."""
    if holding_maintenance(context, subject) is None:
        lift_hold(context, subject, HoldKind.DRAIN)


def holding_maintenance(context: Context, subject: str) -> Maintenance | None:
    """The maintenance that keeps work away from exactly this subject."""
    for record in context.state.maintenances():
        if record.subject == subject and record.state in _HOLDING:
            return record
    return None


def covering(context: Context, subject: str) -> tuple[Hold, ...]:
    """Holds on the subject and on what it is part of, the nearest first."""
    found = [h for h in context.holds.values() if context.is_under(subject, h.subject)]
    return tuple(sorted(found, key=lambda hold: (-len(hold.subject), hold.kind)))
