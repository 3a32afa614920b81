"""The relay's monitoring pages: its own report, and what is polled beside its work."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from relay.backlog import COUNT_LIMIT, measure_backlog, measure_runway
from relay.report import Report
from relay.settings import RelaySettings
from runtime import clock
from runtime.mongo import Client, ping
from runtime.monitoring import monitored
from runtime.shutdown import Stop

PING_SECONDS = 2.0
POLL_SECONDS = 5.0


@asynccontextmanager
async def monitored_relay(
    settings: RelaySettings, client: Client, stop: Stop
) -> AsyncIterator[Report]:
    database = client[settings.mongodb_database]
    async with monitored(settings, "relay") as monitor:
        report = Report(monitor.registry)
        answers = monitor.poll(
            "MongoDB", lambda: ping(client), every_seconds=PING_SECONDS, even_unseen=True
        )
        backlog = monitor.poll(
            "the backlog",
            lambda: measure_backlog(database, settings.outbox_collection),
            every_seconds=POLL_SECONDS,
        )
        runway = monitor.poll(
            "the oplog",
            lambda: measure_runway(database, settings.relay_group),
            every_seconds=POLL_SECONDS,
        )

        def epoch() -> float | None:
            return report.leadership.checkpoint.epoch if report.leadership else None

        def in_flight() -> float:
            return report.leadership.window.in_flight_count if report.leadership else 0.0

        def pending() -> float | None:
            return backlog.value.pending_count if backlog.value else None

        def oldest_age_seconds() -> float | None:
            if backlog.value is None or backlog.value.oldest_at is None:
                return None
            return clock.age_seconds(backlog.value.oldest_at)

        monitor.gauge(
            "relay_leading", "1 for the leader", lambda: float(report.leadership is not None)
        )
        monitor.gauge("relay_epoch", "the leader's epoch", epoch)
        monitor.gauge("relay_in_flight", "messages that are not confirmed yet", in_flight)
        monitor.gauge(
            "relay_lag_seconds",
            "the age of the leader's last settled event or empty read, whichever is newer",
            lambda: report.lag_seconds,
        )
        monitor.gauge(
            "relay_pending",
            f"events not settled, polled every {POLL_SECONDS:g} s; counted up to {COUNT_LIMIT}",
            pending,
        )
        monitor.gauge(
            "relay_pending_oldest_age_seconds",
            "the age of the oldest pending event, by `created_at`",
            oldest_age_seconds,
        )
        monitor.gauge(
            "relay_oplog_runway_seconds",
            "from the oldest oplog entry to the saved position, which is lost at 0",
            lambda: runway.value,
        )
        monitor.ready_when(lambda: "it is stopping" if stop.requested else None)
        monitor.ready_when(lambda: None if answers.value else "MongoDB does not answer")
        monitor.ready_when(lambda: report.why_no_progress)
        yield report
