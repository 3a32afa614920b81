"""
The one clock of the system: MongoDB's, which decides what is due, leased and expired.

A process estimates it from the server's answers and its own monotonic clock. So times that several
machines write can be compared with each other and with `$$NOW`, and a machine whose clock is wrong
or jumps changes nothing. Before the first answer, and in tools without one, it is the machine's.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic

from loguru import logger

#: A difference beyond this is reported.
TOLERANCE_SECONDS = 3.0


@dataclass(slots=True)
class _Clock:
    """server_time: as of `answered_at`, by `time.monotonic`; None before the first answer."""

    server_time: datetime | None = None
    answered_at: float = 0.0
    difference_seconds: float | None = None
    is_reported: bool = False


_clock = _Clock()


def machine_time() -> datetime:
    """The clock of this machine; for everything that is stored or compared, `now` is right."""
    return datetime.now(UTC)


def now() -> datetime:
    """The time by MongoDB's clock, in UTC: never ahead of it by more than the clocks' drift."""
    if _clock.server_time is None:
        return machine_time()
    return _clock.server_time + timedelta(seconds=monotonic() - _clock.answered_at)


def age_seconds(moment: datetime) -> float:
    """
    For metrics: how long ago that was, never negative. `now` is late by the way of an answer, which
    would hide short latencies, so clocks that agree are compared as they are.
    """
    reference = machine_time() if describe_difference() is None else now()
    return max(0.0, (reference - moment).total_seconds())


def note_server_time(server_time: datetime) -> None:
    """
    server_time: from an answer that has just arrived, in UTC.

    It was read a moment before the answer arrived, so the estimate is late by that moment: a
    delivery that is due now must not look due later to the server.
    """
    _clock.server_time, _clock.answered_at = server_time, monotonic()
    _clock.difference_seconds = (machine_time() - server_time).total_seconds()
    differs = abs(_clock.difference_seconds) > TOLERANCE_SECONDS
    if differs and not _clock.is_reported:
        logger.warning("clock.differs", seconds=round(_clock.difference_seconds, 1))
    _clock.is_reported = differs


def difference_seconds() -> float | None:
    """How far this machine's clock is ahead of MongoDB's; None before the first answer."""
    return _clock.difference_seconds


def describe_difference() -> str | None:
    """In words; None while the clocks agree."""
    difference = _clock.difference_seconds
    if difference is None or abs(difference) <= TOLERANCE_SECONDS:
        return None
    direction = "ahead of" if difference > 0 else "behind"
    return (
        f"the clock of this machine is {abs(difference):.0f} s {direction} that of MongoDB, which "
        "decides: check the time synchronisation of both"
    )
