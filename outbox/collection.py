"""The outbox collection's name and indexes, as plain data: `runtime.mongo` creates them."""

from typing import Any

from outbox.state import State

OUTBOX = "outbox"

#: How long a published event stays for whoever wants to look; only published ones ever expire.
PUBLISHED_RETENTION_DAYS = 7

INDEXES: tuple[dict[str, Any], ...] = (
    {
        # what a resync reads, in the order in which it publishes: seq first, so that neighbours
        # are of different keys and do not wait for each other
        "name": "pending_in_order",
        "key": {"state": 1, "seq": 1, "created_at": 1, "_id": 1},
        "partialFilterExpression": {"state": {"$in": [None, State.PENDING.value]}},
    },
    {
        "name": "held_in_order",
        "key": {"held_key": 1, "ordinal": 1},
        "partialFilterExpression": {"state": {"$in": [State.HELD.value, State.PARKED.value]}},
    },
    {
        # one key's events in its own order: what a timeline shows, and an audit reads in turn
        "name": "of_one_key",
        "key": {"key": 1, "seq": 1},
    },
    {
        # a document without expire_at never expires, so nothing unpublished can
        "name": "expiry",
        "key": {"expire_at": 1},
        "expireAfterSeconds": 0,
    },
)
