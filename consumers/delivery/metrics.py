"""What a worker counts. Labels name destinations and verdicts, never a request."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from assistance.verdict import Verdict
from consumers.delivery.ledger import verdict_word

#: From a chat's quick answer to the timeout of a slow mail server.
CALL_BUCKETS_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class AttemptMetrics:
    """One destination's recorded attempts, and the calls made in them."""

    def __init__(self, registry: CollectorRegistry, destination: str) -> None:
        self._destination = destination
        self._attempts = Counter(
            "delivery_attempts",
            "attempts that ended, by verdict",
            ["destination", "verdict"],
            registry=registry,
        )
        self._calls = Counter(
            "delivery_calls",
            "calls to the third party; an attempt may make several",
            ["destination"],
            registry=registry,
        ).labels(destination)
        self._seconds = Histogram(
            "delivery_call_seconds",
            "how long an attempt's calls took, pauses between them included",
            ["destination"],
            buckets=CALL_BUCKETS_SECONDS,
            registry=registry,
        ).labels(destination)

    def note(self, verdict: Verdict, calls: int, duration_seconds: float) -> None:
        self._attempts.labels(self._destination, verdict_word(verdict)).inc()
        if calls:
            self._calls.inc(calls)
            self._seconds.observe(duration_seconds)
