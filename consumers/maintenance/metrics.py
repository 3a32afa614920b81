"""What the reconciler and the dead-letter consumer count. Labels never name a request."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter

from assistance.breaker import BreakerState, breaker_state
from consumers.delivery.destinations import Destinations
from runtime.monitoring import Monitor

#: Exactly one of them is 1 for each destination.
GAUGE_OF_STATE = {
    BreakerState.CLOSED: "destination_breaker_closed",
    BreakerState.HALF_OPEN: "destination_breaker_half_open",
    BreakerState.OPEN: "destination_breaker_open",
    BreakerState.SUSPENDED: "destination_suspended",
}


def letters_stored(registry: CollectorRegistry) -> Counter:
    return Counter(
        "dead_letters_stored",
        "messages stored from the broker's dead-letter queue, by decision",
        ["decision"],
        registry=registry,
    )


def deliveries_reconciled(registry: CollectorRegistry) -> Counter:
    return Counter(
        "reconciler_deliveries",
        "deliveries that were due, whose claim had expired or whose hint was lost",
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
        "open deliveries",
        lambda: {name: found.count for name, found in (waiting.value or {}).items()},
        label="destination",
    )
    monitor.gauges(
        "deliveries_oldest_age_seconds",
        "age of the request whose delivery has been open for longest",
        lambda: {name: found.oldest_age_seconds for name, found in (waiting.value or {}).items()},
        label="destination",
    )
