"""What must hold after every round. Pure: the books, the third parties and the deaths decide."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assistance.books import Books
from assistance.delivery import DeliveryState
from tests.chaos.common.verdict import MAX_SHOWN, fault

WORKER_LOST = "worker_lost"

#: A request on its way to a destination.
Way = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Call:
    """One that a third party got, whatever it answered. key: the idempotency key that it read."""

    way: Way
    key: str
    accepted: bool


@dataclass(frozen=True, slots=True)
class Death:
    """
    A worker killed itself at a point.

    calling: the requests between the beginning of their call and its recorded outcome.
    in_hand: the event ids of messages that were received and not acknowledged.
    """

    destination: str
    point: str
    calling: Collection[str]
    in_hand: Collection[str]


@dataclass(frozen=True, slots=True)
class Evidence:
    """
    books: of everything there is, in one snapshot.
    deliveries: this round's, as they stand in the ledger; calls: all of this round's.
    arrivals: how often each message was received, ever.
    leases_may_end: MongoDB was away, or a worker frozen: an attempt may lose its living worker.
    broker_forgot: its disk was wiped, so that no message need come again.
    """

    books: Books
    deliveries: Mapping[Way, Mapping[str, Any]]
    calls: Sequence[Call]
    deaths: Sequence[Death]
    arrivals: Mapping[str, int]
    leases_may_end: bool = False
    broker_forgot: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """repeats: calls beyond the first of each delivery."""

    faults: Sequence[str]
    repeats: int


def decide(evidence: Evidence) -> Verdict:
    deliveries = evidence.deliveries
    calls: dict[Way, list[Call]] = {way: [] for way in deliveries}
    for call in evidence.calls:
        calls.setdefault(call.way, []).append(call)
    killed = Counter(
        (request_id, death.destination) for death in evidence.deaths for request_id in death.calling
    )
    failed = [way for way, one in deliveries.items() if one["state"] == DeliveryState.FAILED]
    untrue = [
        way
        for way, one in deliveries.items()
        if one["state"] == DeliveryState.SUCCEEDED and not any(call.accepted for call in calls[way])
    ]
    other_keys = [
        way
        for way, one in deliveries.items()
        if any(call.key != one["idempotency_key"] for call in calls[way])
    ]
    too_many = [
        (*way, f"{len(calls[way])} calls, {bound} explained")
        for way, one in deliveries.items()
        if len(calls[way]) > (bound := explained_calls(one, killed[way], evidence.leases_may_end))
    ]
    faults = [
        *_books_faults(evidence.books),
        *_fault("failed, and nothing was wrong with them", failed),
        *_fault("succeeded, and the third party never got them", untrue),
        *_fault("called under another idempotency key", other_keys),
        *_fault("called more often than is explained", too_many),
        *_fault("called, and not in this round's ledger", calls.keys() - deliveries.keys()),
    ]
    if not evidence.broker_forgot:
        faults += _fault(
            "acknowledged before its outcome was recorded: the message did not come again",
            [(event_id,) for event_id in not_come_again(evidence.deaths, evidence.arrivals)],
        )
    return Verdict(faults, sum(len(made) - 1 for made in calls.values() if made))


def explained_calls(
    delivery: Mapping[str, Any], killed_count: int, leases_may_end: bool = False
) -> int:
    """
    One, and one more for each death in mid-call, and for each attempt that was answered later or
    not at all. A worker is lost by its death only, unless leases may have ended otherwise.
    """
    repeated = [attempt for attempt in delivery["attempts"] if attempt.get("verdict") != "done"]
    lost_count = [attempt.get("code") for attempt in repeated].count(WORKER_LOST)
    answered_count = len(repeated) - lost_count
    explained_count = max(killed_count, lost_count) if leases_may_end else killed_count
    return 1 + answered_count + explained_count


def not_come_again(deaths: Iterable[Death], arrivals: Mapping[str, int]) -> list[str]:
    """The messages that a dead worker had not acknowledged and no worker has received since."""
    died_with = Counter(event_id for death in deaths for event_id in death.in_hand)
    return sorted(
        event_id for event_id, count in died_with.items() if arrivals.get(event_id, 0) <= count
    )


def _books_faults(books: Books) -> list[str]:
    if books == Books(succeeded=books.accepted):
        return []
    listed = "; ".join(
        f"{one.request_id}: {', '.join(one.why)}" for one in books.listed[:MAX_SHOWN]
    )
    waiting = ", ".join(f"{reason} {count}" for reason, count in books.waiting.items())
    return [f"the books: {books} {waiting} {listed}".rstrip()]


def _fault(what: str, items: Iterable[tuple[str, ...]]) -> list[str]:
    return fault(what, ["/".join(item) for item in sorted(items)])
