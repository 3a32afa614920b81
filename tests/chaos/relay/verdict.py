"""What must hold after every round. Pure: it compares the outbox with the copies only."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tests.chaos.common.verdict import fault


@dataclass(frozen=True, slots=True)
class Committed:
    key: str
    seq: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """
    committed: this round's events in the outbox, by id, read with majority when all was over.
    copies: ids of all messages that arrived since the last round, in order of arrival.
    earlier: ids that were accounted for in earlier rounds.
    last_seqs: the last seq of each key that arrived in earlier rounds.
    terms: how many times leadership was taken; window: how much each may repeat of its forerunner.
    """

    committed: Mapping[str, Committed]
    copies: Sequence[str]
    earlier: Collection[str]
    last_seqs: Mapping[str, int]
    terms: int
    window: int


@dataclass(frozen=True, slots=True)
class Verdict:
    faults: Sequence[str]
    repeats: int
    last_seqs: Mapping[str, int]


def decide(evidence: Evidence) -> Verdict:
    counted = Counter(evidence.copies)
    lost = sorted(evidence.committed.keys() - counted.keys())
    invented = sorted(counted.keys() - evidence.committed.keys() - set(evidence.earlier))
    first_occurrences = [copy for copy in counted if copy in evidence.committed]
    repeats = len(evidence.copies) - len(first_occurrences) - len(invented)
    last_seqs, disorder = dict(evidence.last_seqs), []
    for event_id in first_occurrences:
        event = evidence.committed[event_id]
        if event.seq <= last_seqs.get(event.key, 0):
            disorder.append(f"{event.key}: {event.seq} after {last_seqs[event.key]}")
        last_seqs[event.key] = event.seq
    faults = [
        *fault("committed and never published", lost),
        *fault("published and never committed", invented),
        *fault("out of order", disorder),
    ]
    if repeats > evidence.terms * evidence.window:
        faults.append(
            f"{repeats} repeats in {evidence.terms} terms of leadership,"
            f" with a window of {evidence.window}"
        )
    return Verdict(faults, repeats, last_seqs)
