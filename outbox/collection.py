"""The outbox collection's name and indexes, as plain data: `runtime.mongo` creates them."""

from typing import Any

from outbox.state import State

OUTBOX = "outbox"

#: How long a published event is kept for inspection; only published events expire.
PUBLISHED_RETENTION_DAYS = 7

INDEXES: tuple[dict[str, Any], ...] = (
    {
        # read by a resync in the order in which it publishes: seq first, so that neighbours have
        # different keys and do not wait for each other
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
        # one key's events in its order: for timelines and the audit
        "name": "of_one_key",
        "key": {"key": 1, "seq": 1},
    },
    {
        # a document without expire_at never expires, so an unpublished event cannot
        "name": "expiry",
        "key": {"expire_at": 1},
        "expireAfterSeconds": 0,
    },
)
