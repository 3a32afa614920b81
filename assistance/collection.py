"""The domain's collections: names, indexes and validators, as plain data."""

from typing import Any

from assistance.delivery import DeliveryState
from assistance.request import Status

ASSISTANCES = "assistances"
DEAD_LETTERS = "dead_letters"
DESTINATIONS = "destinations"
IDEMPOTENCY_KEYS = "idempotency_keys"
CLOSED_BALANCE = "closed_balance"

NEWEST_OF_STATUS = "newest_of_status"
NEWEST_OF_TOPIC = "newest_of_topic"

ASSISTANCES_INDEXES: tuple[dict[str, Any], ...] = (
    {
        # only open requests have a date here, so the reconciler never reads a closed one
        "name": "next_due",
        "key": {"next_due_at": 1},
        "partialFilterExpression": {"next_due_at": {"$type": "date"}},
    },
    {
        # for the audit; a new request is open, so accepting one does not write to this index
        "name": "closed_in_order",
        "key": {"updated_at": 1},
        "partialFilterExpression": {
            "status": {"$in": [Status.SUCCEEDED.value, Status.FAILED.value]}
        },
    },
    {"name": NEWEST_OF_STATUS, "key": {"status": 1, "created_at": -1, "_id": -1}},
    {"name": NEWEST_OF_TOPIC, "key": {"topic": 1, "status": 1, "created_at": -1, "_id": -1}},
)

ASSISTANCES_VALIDATOR: dict[str, Any] = {
    "$jsonSchema": {
        "bsonType": "object",
        "required": [
            "topic",
            "description",
            "status",
            "version",
            "created_at",
            "updated_at",
            "deliveries",
        ],
        "properties": {
            "_id": {"bsonType": "string"},
            "topic": {"bsonType": "string"},
            "description": {"bsonType": "string"},
            "status": {"enum": [status.value for status in Status]},
            "version": {"bsonType": ["int", "long"]},
            "created_at": {"bsonType": "date"},
            "updated_at": {"bsonType": "date"},
            "next_due_at": {"bsonType": ["date", "null"]},
            "deliveries": {
                "bsonType": "array",
                "minItems": 1,
                "items": {
                    "bsonType": "object",
                    "required": ["destination", "channel", "state", "attempts", "fence", "due_at"],
                    "properties": {
                        "state": {"enum": [state.value for state in DeliveryState]},
                        "fence": {"bsonType": ["int", "long"]},
                        "attempts": {"bsonType": "array"},
                    },
                },
            },
        },
    }
}

IDEMPOTENCY_KEYS_INDEXES: tuple[dict[str, Any], ...] = (
    {"name": "expiry", "key": {"expire_at": 1}, "expireAfterSeconds": 0},
)

DEAD_LETTERS_INDEXES: tuple[dict[str, Any], ...] = (
    {"name": "newest", "key": {"last_seen_at": -1}},
    {"name": "request", "key": {"request_id": 1}},
)
