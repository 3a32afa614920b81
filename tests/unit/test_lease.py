"""Who may lead: a relay that lives is never overruled, and one that does not always is."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.lease import (
    LEADER_TIMEOUT_SECONDS,
    LOCKLESS_TIMEOUT_SECONDS,
    PUBLISH_LIMIT_SECONDS,
    RENEW_SECONDS,
    SECOND_LOOK_SECONDS,
    Verdict,
    lock_to_hold,
    may_lead,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OWN, FORMER = "relay.lock.g.1234", "relay.lock.g"


def led(
    *, age_seconds: float = 0.0, lock: str | None = OWN, released: bool = False, epoch: int = 5
) -> dict[str, Any]:
    """The document of a leader that gave a sign of life this long ago."""
    renewed_at = NOW - timedelta(seconds=age_seconds)
    lease = {"epoch": epoch, "renewed_at": renewed_at, "lock": lock, "released": released}
    return {"_id": "g", "epoch": 5, "owner": "leader", "lease": lease}


def verdict(
    document: dict[str, Any] | None, *, unchanged: float = 0.0, locks: tuple[str, ...] = ()
) -> Verdict:
    return may_lead(
        document,
        now=NOW,
        unchanged_seconds=unchanged,
        owner="candidate",
        locks=locks,
        former=FORMER,
    )


def test_the_times_leave_room_for_each_other() -> None:
    """A leader stops publishing before another may lead, and misses signs of life before that."""
    assert 3 * RENEW_SECONDS < PUBLISH_LIMIT_SECONDS < LEADER_TIMEOUT_SECONDS
    assert RENEW_SECONDS < LOCKLESS_TIMEOUT_SECONDS < SECOND_LOOK_SECONDS


@pytest.mark.parametrize(
    ("document", "unchanged", "locks", "expected"),
    [
        pytest.param(None, 0, (), Verdict.LEAD, id="no document"),
        pytest.param(led(released=True), 0, (), Verdict.LEAD, id="released"),
        pytest.param(led() | {"owner": "candidate"}, 0, (), Verdict.LEAD, id="own former term"),
        pytest.param(led(), 0, (), Verdict.STAND_BY, id="a leader with the lock"),
        pytest.param(led(lock=None), 9, (), Verdict.STAND_BY, id="a leader without the lock"),
        pytest.param(led(), 0, (OWN,), Verdict.STAND_BY, id="it may live without its lock"),
        pytest.param(led(), 1.6, (OWN,), Verdict.OVERRULE, id="its lock is free and it is silent"),
        pytest.param(led(lock=None), 3, (OWN,), Verdict.STAND_BY, id="our lock is not its lock"),
        pytest.param(led(age_seconds=99), 0, (), Verdict.STAND_BY, id="old, seen once"),
        pytest.param(led(age_seconds=99), 2, (), Verdict.OVERRULE, id="old, seen twice"),
        pytest.param(led(age_seconds=-3600), 9, (), Verdict.STAND_BY, id="dated in the future"),
        pytest.param(led(age_seconds=-3600), 10, (), Verdict.OVERRULE, id="future, and silent"),
        pytest.param(
            led(epoch=4, age_seconds=99), 99, (OWN,), Verdict.STAND_BY, id="older version"
        ),
        pytest.param(led(epoch=4), 0, (FORMER,), Verdict.LEAD, id="older version without its lock"),
        pytest.param({"epoch": 5}, 99, (OWN,), Verdict.STAND_BY, id="no lease"),
        pytest.param({"epoch": 5}, 0, (FORMER,), Verdict.LEAD, id="no lease, and its lock"),
        pytest.param({"epoch": 5, "lease": "x"}, 0, (FORMER,), Verdict.LEAD, id="garbage"),
    ],
)
def test_who_may_lead(
    document: dict[str, Any] | None, unchanged: float, locks: tuple[str, ...], expected: Verdict
) -> None:
    assert verdict(document, unchanged=unchanged, locks=locks) is expected


@pytest.mark.parametrize(
    ("document", "lock"),
    [
        (None, OWN),
        (led(), OWN),
        (led(lock="relay.lock.g.other"), "relay.lock.g.other"),
        (led(lock=None), None),
        (led(lock=None, released=True), OWN),
        (led(epoch=4), FORMER),
    ],
)
def test_which_lock_a_candidate_tries_to_hold(
    document: dict[str, Any] | None, lock: str | None
) -> None:
    assert lock_to_hold(document, own=OWN, former=FORMER) == lock


ages = st.floats(min_value=-7200, max_value=7200)
held = st.sampled_from([(), (OWN,), (OWN, FORMER)])


@given(unchanged=st.floats(0, LOCKLESS_TIMEOUT_SECONDS, exclude_max=True), age=ages, locks=held)
def test_a_leader_seen_to_give_signs_of_life_is_not_overruled(
    unchanged: float, age: float, locks: tuple[str, ...]
) -> None:
    """Whatever the clocks say and whichever locks are free."""
    document = led(age_seconds=age)
    assert verdict(document, unchanged=unchanged, locks=locks) is Verdict.STAND_BY


@given(
    unchanged=st.floats(LEADER_TIMEOUT_SECONDS, 1e6),
    age=ages,
    lock=st.sampled_from([None, OWN]),
    locks=held,
)
def test_a_leader_seen_to_be_silent_is_overruled(
    unchanged: float, age: float, lock: str | None, locks: tuple[str, ...]
) -> None:
    """Whatever the clocks say, and whatever became of its lock."""
    document = led(age_seconds=age, lock=lock)
    assert verdict(document, unchanged=unchanged, locks=locks) is Verdict.OVERRULE
