"""Draws rounds from a seed. Pure: the same seed gives the same rounds."""

import random
from collections.abc import Sequence
from typing import TypeVar

Event = TypeVar("Event")


def event_of_round(seed: str, number: int, events: Sequence[Event]) -> Event:
    """Return what happens in round `number`: each event once per cycle, shuffled by the seed."""
    cycle, place = divmod(number - 1, len(events))
    order = list(events)
    random.Random(f"{seed}/cycle/{cycle}").shuffle(order)
    return order[place]


def generator_of_round(seed: str, number: int) -> random.Random:
    """It depends on the seed and the number only, so a round can be repeated alone."""
    return random.Random(f"{seed}/round/{number}")
