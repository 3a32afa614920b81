"""
`Idempotency-Key`: a call that is sent again with the same key makes one request only.

What is remembered of it, its receipt, is written in the transaction that accepts the request: a
crash leaves both or neither, and whoever asks again after an unknown commit finds out which.

Statuses as in draft-ietf-httpapi-idempotency-key-header-07, which expired without becoming an RFC;
that an answer is a repeated one is told as Stripe tells it (https://docs.stripe.com/error-low-level).
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
    _id: a hash of the caller and the key; fingerprint: one of what was asked for.
    expire_at: forgotten by the server some time in the minute after it.
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
            description="Chosen by the caller, best a UUID. The same call with the same key is "
            "answered as it was the first time, and makes no second request. A key is remembered "
            "for each API key apart, for the time that the setting `IDEMPOTENCY_WINDOW_SECONDS` "
            "names (a day by default). What was answered 4xx is not remembered.",
            examples=["8e03978e-40d5-43e8-bc93-6894a57f9324"],
        ),
    ] = None,
) -> str | None:
    """Raises Problem for several keys at once: whichever was taken, the other would be lost."""
    if len(request.headers.getlist(KEY_HEADER)) > 1:
        raise problems.invalid_request(
            [{"path": f"header.{KEY_HEADER}", "code": "repeated", "message": "Should be sent once"}]
        )
    return key
