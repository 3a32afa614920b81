"""What the relay reports about itself: lag and readiness."""

from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from relay.report import Leadership, Report


def test_readiness_ends_with_the_reason_in_words() -> None:
    report = Report(CollectorRegistry())
    connection, checkpoint = (
        SimpleNamespace(blocked=False),
        SimpleNamespace(resync_reason=None, silent_seconds=0.0),
    )
    silent = [0.0]
    assert report.why_no_progress == "it is starting"
    report.leads(Leadership(checkpoint, None, connection, lambda: silent[0]))  # type: ignore[arg-type]
    assert report.why_no_progress is None

    with report.waiting_for("a read"):
        assert report.why_no_progress is None
        report._waits["a read"] -= 7
        assert report.why_no_progress == "a read has taken 7 s"
    checkpoint.resync_reason = "first_start"
    assert report.why_no_progress == "a resync is in progress: first_start"
    checkpoint.silent_seconds = 6.4
    assert report.why_no_progress == "no sign of life was written to MongoDB for 6 s"
    checkpoint.silent_seconds = 0.0
    silent[0] = 12.3
    assert report.why_no_progress == "RabbitMQ has not confirmed a message for 12 s"
    connection.blocked = True
    assert (
        report.why_no_progress == "RabbitMQ blocks publishing: it is short of memory or disk space"
    )

    report.interrupted("RabbitMQ: gone")
    assert report.why_no_progress == "RabbitMQ: gone"
    report.stands_by()
    assert report.why_no_progress is None


def test_lag_is_unknown_until_the_stream_was_read_once() -> None:
    report = Report(CollectorRegistry())

    assert report.lag_seconds is None
    report.caught_up()
    assert report.lag_seconds == pytest.approx(0, abs=10)
    report.ended()
    assert report.lag_seconds is None
