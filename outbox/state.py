"""
The states of an event and their transitions.

                 writer inserts (no state counts as pending)
                                  │
                                  v
            ┌────────────────  pending  ───────────────┐
            │ confirmed           │ returned, nacked,   │ does not fit
            │ and routed          │ or behind one       │ the contract
            v                     v                     v
        published  <──retried── held                  parked
                                  │                     │
                                  └─> discarded <───────┘   by an operator only

The relay's leader makes every transition except insertion and discarding. `published` and
`discarded` are final. A document in any state but `pending` is *settled*: the position may pass it.
"""

from enum import StrEnum


class State(StrEnum):
    PENDING = "pending"
    PUBLISHED = "published"
    HELD = "held"
    PARKED = "parked"
    DISCARDED = "discarded"


#: Matches events that are still to be published: a missing state counts as pending.
PENDING_STATES: tuple[str | None, ...] = (None, State.PENDING.value)

PENDING = {"state": {"$in": list(PENDING_STATES)}}
