"""When the circuit breaker of a destination opens, and when it closes."""

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from assistance.breaker import (
    BreakerPolicy,
    Close,
    Open,
    failures_after,
    react,
)
from assistance.verdict import Done, Later, Never, Unknown, Verdict

verdicts = st.one_of(
    st.sampled_from([Done("200"), Never("400"), Unknown("reset"), Later("503")]),
    st.just(Later("lease_spent", counts=False)),
)


@given(st.lists(st.tuples(verdicts, st.sampled_from("abcdef")), max_size=30))
def test_only_different_requests_that_fail_in_a_row_open_the_breaker(
    outcomes: list[tuple[Verdict, str]],
) -> None:
    failures: frozenset[str] = frozenset()
    since_answer: set[str] = set()
    for verdict, request_id in outcomes:
        failures = failures_after(failures, verdict, request_id)
        if isinstance(verdict, Done | Never):
            since_answer = set()
        elif verdict.code != "lease_spent":
            since_answer.add(request_id)
        reaction = reacted(verdict, failures_count=len(failures), is_probe=False)
        fails = isinstance(verdict, Unknown) or verdict.code == "503"
        assert isinstance(reaction, Open) == (fails and len(since_answer) >= 3)


@given(verdicts, st.integers(0, 1000), st.none() | st.floats(0.001, 1e6))
def test_a_failed_probe_waits_longer_within_bounds_and_an_answered_one_closes(
    verdict: Verdict, openings: int, asked_seconds: float | None
) -> None:
    reaction = reacted(verdict, openings=openings, is_probe=True)
    assert isinstance(reaction, Close) == isinstance(verdict, Done | Never)
    if isinstance(reaction, Open):
        doubled = min(2.0 * 2 ** min(openings, 32), 60.0)
        assert 0.8 * doubled <= reaction.wait_seconds <= doubled
    asked = reacted(Later("429", retry_after_seconds=asked_seconds), is_probe=False)
    if asked_seconds is not None:
        own = reacted(Later("429"), is_probe=False, failures_count=3)
        assert asked == Open("429", max(own.wait_seconds, min(asked_seconds, 3600.0)))


@given(st.integers(0, 10), st.integers(0, 10), st.booleans())
def test_one_answer_about_us_opens_the_breaker(
    failures_count: int, openings: int, is_probe: bool
) -> None:
    reaction = reacted(
        Later("535", about_us=True),
        failures_count=failures_count,
        openings=openings,
        is_probe=is_probe,
    )
    assert isinstance(reaction, Open)


def reacted(verdict: Verdict, *, is_probe: bool, failures_count: int = 1, openings: int = 0) -> Any:
    return react(
        verdict,
        failures_count=failures_count,
        openings=openings,
        is_probe=is_probe,
        policy=BreakerPolicy(3, 2.0, 60.0, 3600.0),
        randomness=random.Random(0),
    )
