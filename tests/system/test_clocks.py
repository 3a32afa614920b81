"""Processes whose machines' clocks are an hour off: nothing waits for it, and it is reported."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from sandbox.waiting import wait_until
from tests.support.subjects import (
    RelaySubject,
    ServiceSubject,
    SlackWorker,
    Subject,
    Surroundings,
)

HOUR_SECONDS = 3600
CLOSE = timedelta(seconds=30)


def check_reported_once(subject: Subject, ahead_seconds: int) -> None:
    lines = [json.loads(line) for line in subject.process.output().splitlines()]
    [warning] = [line for line in lines if line.get("message") == "clock.differs"]
    assert warning["seconds"] == pytest.approx(ahead_seconds, abs=5)
    note = subject.monitoring.note()
    assert note is not None
    assert f"{'ahead of' if ahead_seconds > 0 else 'behind'} that of MongoDB" in note


@pytest.mark.parametrize("ahead_seconds", [HOUR_SECONDS, -HOUR_SECONDS])
def test_a_services_clock(
    surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch, ahead_seconds: int
) -> None:
    monkeypatch.setattr(Subject, "extra", {"TEST_CLOCK_AHEAD_SECONDS": str(ahead_seconds)})
    subject = ServiceSubject(surroundings)
    try:
        request_id = subject.service.accept()
        request = subject.deliveries.request(request_id)
        assert abs(request["created_at"] - datetime.now(UTC)) < CLOSE
        # due by the clock that decides, at once
        due = {"_id": request_id, "$expr": {"$lte": ["$created_at", "$$NOW"]}}
        assert subject.deliveries.database["assistances"].count_documents(due) == 1
        assert {one["due_at"] for one in request["deliveries"]} == {request["created_at"]}
        check_reported_once(subject, ahead_seconds)
    finally:
        subject.close()


def test_a_relays_clock(surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "extra", {"TEST_CLOCK_AHEAD_SECONDS": str(-HOUR_SECONDS)})
    subject = RelaySubject(surroundings)
    try:
        subject.ask()
        wait_until(lambda: not subject.open_count(), "it is published")
        event = subject.world.outbox.find_one()
        assert event is not None
        published_at = event["published_at"].replace(tzinfo=UTC)
        assert abs(published_at - datetime.now(UTC)) < CLOSE
        samples = subject.monitoring.samples()
        assert samples["clock_difference_seconds"] == pytest.approx(-HOUR_SECONDS, abs=5)
        assert samples["relay_lag_seconds"] < CLOSE.total_seconds()
        check_reported_once(subject, -HOUR_SECONDS)
    finally:
        subject.close()


def test_a_workers_clock(surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "extra", {"TEST_CLOCK_AHEAD_SECONDS": str(HOUR_SECONDS)})
    subject = SlackWorker(surroundings)
    try:
        subject.ask()
        wait_until(lambda: not subject.open_count(), "it is delivered")
        [attempt] = subject.deliveries.attempts(subject.requests[0])
        assert abs(attempt["ended_at"] - datetime.now(UTC)) < CLOSE
        check_reported_once(subject, HOUR_SECONDS)
    finally:
        subject.close()
