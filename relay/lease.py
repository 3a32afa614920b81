"""
Who may lead, decided from the checkpoint document.

    lease: {epoch,        the epoch that wrote it
            renewed_at,   the leader's last sign of life, by the server's clock
            lock,         the lock queue that the leader holds; None while it leads without one
            released}     the leader has ended its term

Pure: no I/O and no clock.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any

#: How often a leader gives a sign of life.
RENEW_SECONDS = 1.0

#: A leader without a sign of life for this long may be overruled.
LEADER_TIMEOUT_SECONDS = 10.0

#: The same for a leader whose lock is free: its connection to RabbitMQ has ended.
LOCKLESS_TIMEOUT_SECONDS = 1.5

#: The age of a sign of life counts only once a candidate has seen it unchanged for this long: after
#: an election of MongoDB the leader that lives gives its next one first.
SECOND_LOOK_SECONDS = 2.0

#: A leader whose last sign of life is older publishes nothing: it may have been overruled.
PUBLISH_LIMIT_SECONDS = LEADER_TIMEOUT_SECONDS - 2.0


class Verdict(Enum):
    """LEAD: nobody leads. OVERRULE: the leader shows no sign of life. STAND_BY: it lives."""

    LEAD = "lead"
    OVERRULE = "overrule"
    STAND_BY = "stand_by"


@dataclass(frozen=True, slots=True)
class Lease:
    renewed_at: datetime
    lock: str | None
    released: bool


def lease_of(document: Mapping[str, Any]) -> Lease | None:
    """None when the epoch was taken by an older version of the relay, which writes no lease."""
    lease = document.get("lease")
    if not isinstance(lease, Mapping) or lease.get("epoch") != document.get("epoch"):
        return None
    renewed_at = lease.get("renewed_at")
    if not isinstance(renewed_at, datetime):
        return None
    return Lease(renewed_at, lease.get("lock"), lease.get("released") is True)


def lock_to_hold(document: Mapping[str, Any] | None, *, own: str, former: str) -> str | None:
    """
    The lock queue whose possession lets a candidate lead sooner; None when there is none.

    own: this relay's lock; former: the one that older versions hold.
    """
    if document is None:
        return own
    lease = lease_of(document)
    if lease is None:
        return former
    return own if lease.released else lease.lock


def may_lead(
    document: Mapping[str, Any] | None,
    *,
    now: datetime,
    unchanged_seconds: float,
    owner: str,
    locks: Collection[str],
    former: str,
) -> Verdict:
    """
    document: the group's checkpoint; None when there is none. now: the server's time of the read.
    unchanged_seconds: for how long this candidate has seen the same lease, by its own clock.
    owner: this candidate. locks: the lock queues it holds. former: the lock of older versions.
    """
    if document is None:
        return Verdict.LEAD
    lease = lease_of(document)
    if lease is None:
        # an older version gives no sign of life; its lock alone shows whether it lives
        return Verdict.LEAD if former in locks else Verdict.STAND_BY
    if lease.released or document.get("owner") == owner:
        return Verdict.LEAD
    silent_seconds = unchanged_seconds
    if unchanged_seconds >= SECOND_LOOK_SECONDS:
        silent_seconds = max(silent_seconds, (now - lease.renewed_at).total_seconds())
    lost_lock = lease.lock is not None and lease.lock in locks
    patience = LOCKLESS_TIMEOUT_SECONDS if lost_lock else LEADER_TIMEOUT_SECONDS
    return Verdict.OVERRULE if silent_seconds >= patience else Verdict.STAND_BY
