"""Medians and spreads: no figure stands alone."""

import statistics as stdlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, with their minimum and maximum."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(stdlib.median(values), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours to theirs, round by round: what disturbed a round disturbed both."""
    return Spread.of([mine / other for mine, other in zip(ours, theirs, strict=True)])


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The smallest value that at least this percentage of the values does not exceed."""
    return ascending[max(0, -(-len(ascending) * int(percent) // 100) - 1)]
