"""What the consumers count. Labels name destinations, verdicts and decisions, never a request."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram

from assistance.breaker import BreakerState, breaker_state
from assistance.verdict import Verdict
from consumers.delivery.destinations import Destinations
from consumers.delivery.ledger import verdict_word
from runtime.monitoring import Monitor

#: From a chat's quick answer to the deadline of the slowest mail server.
CALL_BUCKETS_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

#: Exactly one of them is 1 for each destination.
GAUGE_OF_STATE = {
    BreakerState.CLOSED: "destination_breaker_closed",
    BreakerState.HALF_OPEN: "destination_breaker_half_open",
    BreakerState.OPEN: "destination_breaker_open",
    BreakerState.SUSPENDED: "destination_suspended",
}


class AttemptMetrics:
    """One destination's attempts: each claim that was recorded, and the calls made under it."""

    def __init__(self, registry: CollectorRegistry, destination: str) -> None:
        self._destination = destination
        self._attempts = Counter(
            "delivery_attempts",
            "attempts that ended, by what the third party's answers came to",
            ["destination", "verdict"],
            registry=registry,
        )
        self._calls = Counter(
            "delivery_calls",
            "calls of the third party; an attempt may make several",
            ["destination"],
            registry=registry,
        ).labels(destination)
        self._seconds = Histogram(
            "delivery_call_seconds",
            "how long an attempt's calls took, with the waits between them",
            ["destination"],
            buckets=CALL_BUCKETS_SECONDS,
            registry=registry,
        ).labels(destination)

    def note(self, verdict: Verdict, calls: int, duration_seconds: float) -> None:
        self._attempts.labels(self._destination, verdict_word(verdict)).inc()
        if calls:
            self._calls.inc(calls)
            self._seconds.observe(duration_seconds)


def letters_stored(registry: CollectorRegistry) -> Counter:
    return Counter(
        "dead_letters_stored",
        "letters taken out of the broker's dead-letter queue, by what was decided",
        ["decision"],
        registry=registry,
    )


def deliveries_seen_to(registry: CollectorRegistry) -> Counter:
    return Counter(
        "reconciler_seen_to",
        "deliveries that were due, whose claim had expired, or whose hint was lost",
        registry=registry,
    )


def watch_destinations(monitor: Monitor, destinations: Destinations) -> None:
    """The state of each destination and what waits for it, polled in the background."""
    states = monitor.poll("destinations", destinations.all, every_seconds=5.0)
    waiting = monitor.poll("waiting deliveries", destinations.waiting, every_seconds=5.0)

    def is_in(wanted: BreakerState) -> Callable[[], Mapping[str, float]]:
        return lambda: {
            name: float(breaker_state(seen.state, seen.now) is wanted)
            for name, seen in (states.value or {}).items()
        }

    for state, gauge in GAUGE_OF_STATE.items():
        monitor.gauges(
            gauge,
            f"1 while the destination is {state.value}, else 0",
            is_in(state),
            label="destination",
        )
    monitor.gauges(
        "deliveries_waiting_count",
        "deliveries that are open",
        lambda: {name: found.count for name, found in (waiting.value or {}).items()},
        label="destination",
    )
    monitor.gauges(
        "deliveries_oldest_age_seconds",
        "how long ago the request was accepted whose delivery has been open for longest",
        lambda: {name: found.oldest_age_seconds for name, found in (waiting.value or {}).items()},
        label="destination",
    )
