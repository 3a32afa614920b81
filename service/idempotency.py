"""
`Idempotency-Key`: a call that is repeated with the same key creates one request only.

A receipt of the call is written in the transaction that accepts the request. A crash leaves both
or neither, and repeating the call after an unknown commit reveals which.

Statuses as in draft-ietf-httpapi-idempotency-key-header-07, which expired without becoming an RFC;
a repeated answer is marked with Stripe's header (https://docs.stripe.com/error-low-level).
"""

from datetime import datetime, timedelta
from hashlib import sha256
from typing import Annotated, TypedDict

import orjson
from fastapi import Header, Request

from service import problems

KEY_HEADER = "Idempotency-Key"
REPLAYED_HEADER = "Idempotent-Replayed"

KEY_LIMIT_CHARACTERS = 255
VISIBLE_ASCII = r"^[!-~](?:[ -~]*[!-~])?$"


class Receipt(TypedDict):
    """
    _id: a hash of caller and key; fingerprint: a hash of caller, topic and description.
    expire_at: MongoDB deletes the receipt within a minute after this time.
    """

    _id: str
    fingerprint: str
    request_id: str
    created_at: datetime
    expire_at: datetime


def receipt(
    *,
    caller: bytes,
    key: str,
    topic: str,
    description: str,
    request_id: str,
    now: datetime,
    window_seconds: float,
) -> Receipt:
    """caller: the digest of the API key, so that two callers may choose the same key."""
    return {
        "_id": _digest(caller, key.encode()),
        "fingerprint": _digest(caller, orjson.dumps([topic, description])),
        "request_id": request_id,
        "created_at": now,
        "expire_at": now + timedelta(seconds=window_seconds),
    }


def _digest(caller: bytes, text: bytes) -> str:
    return sha256(caller + text).hexdigest()


def idempotency_key(
    request: Request,
    key: Annotated[
        str | None,
        Header(
            alias=KEY_HEADER,
            min_length=1,
            max_length=KEY_LIMIT_CHARACTERS,
            pattern=VISIBLE_ASCII,
            description="Chosen by the caller, preferably a UUID. Repeating a call with its key "
            "returns the first answer and creates no second request. Keys are kept per API key, "
            "for the time set by `IDEMPOTENCY_WINDOW_SECONDS` (a day by default). A call that was "
            "answered 4xx is not remembered.",
            examples=["8e03978e-40d5-43e8-bc93-6894a57f9324"],
        ),
    ] = None,
) -> str | None:
    """Raises Problem when the header is repeated: one of the keys would be ignored."""
    if len(request.headers.getlist(KEY_HEADER)) > 1:
        raise problems.invalid_request(
            [{"path": f"header.{KEY_HEADER}", "code": "repeated", "message": "Should be sent once"}]
        )
    return key
