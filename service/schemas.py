"""
The API's answers and their documentation.

An answer never holds what a third party said, the name of a worker, or a secret.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from http import HTTPStatus
from typing import Any
from uuid import UUID

from pydantic import BaseModel, Field

from assistance.delivery import (
    ATTEMPTS_USED_UP,
    PERMANENT,
    Attempt,
    Delivery,
    DeliveryState,
)
from assistance.request import Request, Status
from service import problems
from service.idempotency import REPLAYED_HEADER
from service.timeline import Entry

PATH = "/api/assistances"

EXAMPLE_ID = "0f5e2f6c-8f0c-4a7e-9a1e-5d0c9b1f7a10"
EXAMPLE_PATH = f"{PATH}/{EXAMPLE_ID}"
EXAMPLE_WAIT_SECONDS = 2
EXAMPLE_DESCRIPTION = "A customer asks for a quote for 40 seats"

#: The fields that an answer is made of; the others are not even read.
PUBLIC_FIELDS: Mapping[str, Any] = dict.fromkeys(
    (
        "topic",
        "description",
        "status",
        "created_at",
        "updated_at",
        "deliveries.destination",
        "deliveries.channel",
        "deliveries.state",
        "deliveries.due_at",
        "deliveries.attempts.verdict",
        "deliveries.attempts.code",
    ),
    True,
)

#: The fields that are not read for a timeline in the API.
HIDDEN_FIELDS: Mapping[str, Any] = dict.fromkeys(
    (
        "description",
        "deliveries.idempotency_key",
        "deliveries.attempts.worker",
        "deliveries.attempts.excerpt",
    ),
    False,
)


class Accepted(BaseModel):
    id: UUID = Field(examples=[EXAMPLE_ID])
    status: Status = Field(examples=[Status.ACCEPTED])
    link: str = Field(description="path of the request", examples=[EXAMPLE_PATH])


def create_responses(wrong_topic: str) -> dict[int | str, dict[str, Any]]:
    """wrong_topic: the message for an unknown topic, which names the configured ones."""
    accepted = {
        "description": "The request is stored durably and will be delivered",
        "headers": {
            "Location": {"schema": {"type": "string"}, "example": EXAMPLE_PATH},
            REPLAYED_HEADER: {
                "description": "Present when this is the answer to an earlier call with the "
                "same `Idempotency-Key`",
                "schema": {"type": "string"},
                "example": "true",
            },
        },
    }
    return {
        HTTPStatus.ACCEPTED.value: accepted,
        **problems.documented(
            problems.invalid_request(
                [{"path": "body.topic", "code": "enum", "message": wrong_topic}]
            ),
            problems.unauthorized(),
            problems.body_too_slow(10),
            problems.not_json(),
            problems.too_many_wrong_keys(EXAMPLE_WAIT_SECONDS),
            problems.request_in_progress(),
            problems.body_too_large(16 * 1024),
            problems.idempotency_key_reused(),
            problems.internal_error(),
            problems.unavailable("MongoDB does not answer; nothing was accepted"),
            instance=PATH,
        ),
    }


class Failure(BaseModel):
    destination: str = Field(examples=["slack"])
    reason: str = Field(
        description="`permanent`: it was refused, and no further attempt would help; "
        "`attempts_used_up`: every attempt was made and none succeeded",
        examples=[PERMANENT],
    )
    code: str | None = Field(
        description="the result code of the last attempt, for grouping", examples=["404"]
    )
    message: str = Field(
        description="the reason in words", examples=["slack refused it for good (404)"]
    )


class DeliveryAnswer(BaseModel):
    destination: str = Field(examples=["slack"])
    channel: str = Field(examples=["slack"])
    state: str = Field(
        description="`waiting`, `claimed` (by a worker), `needs_decision` (an operator has to "
        "decide whether it arrived), `succeeded` or `failed`",
        examples=[DeliveryState.SUCCEEDED.value],
    )
    attempts: int = Field(description="number of attempts started", examples=[1])
    next_attempt_at: datetime | None = Field(
        description="earliest time of the next attempt while `waiting`; else null", examples=[None]
    )
    failure: Failure | None = Field(description="why it `failed`; else null", examples=[None])


class Assistance(BaseModel):
    id: UUID = Field(examples=[EXAMPLE_ID])
    topic: str = Field(examples=["sales"])
    description: str = Field(examples=[EXAMPLE_DESCRIPTION])
    status: Status = Field(
        description="`accepted`, then `succeeded` or `failed`", examples=[Status.SUCCEEDED]
    )
    created_at: datetime = Field(examples=["2026-11-23T10:15:30.123Z"])
    updated_at: datetime = Field(
        description="when it was accepted, or when one of its deliveries last closed or reopened",
        examples=["2026-11-23T10:15:31.456Z"],
    )
    channels: list[str] = Field(
        description="kinds of third party that it is delivered to", examples=[["slack"]]
    )
    attempts: int = Field(description="sum over its deliveries", examples=[1])
    failure: Failure | None = Field(
        description="why it `failed`: the first failed delivery's failure; else null",
        examples=[None],
    )
    deliveries: list[DeliveryAnswer] = Field(description="one for each destination of its topic")


class Page(BaseModel):
    items: list[Assistance] = Field(description="newest first")
    next: str | None = Field(
        description="the path of the next page; null on the last one",
        examples=[f"{PATH}?status=failed&cursor=MTc5NTQyODkzMDEyMzowZjVlMmY2Yw"],
    )


class TimelineEntry(BaseModel):
    at: datetime | None = Field(
        description="null if unknown", examples=["2026-11-23T10:15:31.456Z"]
    )
    what: str = Field(
        description="`accepted`, `appended`, `published`, `held`, `parked`, `discarded`, "
        "`removed`, `started`, `ended` or `next`",
        examples=["ended"],
    )
    subject: str = Field(
        description="the destination or the event concerned", examples=["slack, attempt 1"]
    )
    detail: str = Field(description="further information in words", examples=["done, 200"])


class Timeline(BaseModel):
    id: UUID = Field(examples=[EXAMPLE_ID])
    status: Status = Field(examples=[Status.SUCCEEDED])
    entries: list[TimelineEntry] = Field(description="in order of time; the next steps come last")


def assistance(request: Request) -> Assistance:
    """request: as it is read with `PUBLIC_FIELDS`."""
    deliveries = [_delivery(delivery) for delivery in request["deliveries"]]
    failures = [delivery.failure for delivery in deliveries if delivery.failure is not None]
    failed = request["status"] == Status.FAILED
    return Assistance(
        id=UUID(request["_id"]),
        topic=request["topic"],
        description=request["description"],
        status=Status(request["status"]),
        created_at=request["created_at"],
        updated_at=request["updated_at"],
        channels=sorted({delivery.channel for delivery in deliveries}),
        attempts=sum(delivery.attempts for delivery in deliveries),
        failure=failures[0] if failed and failures else None,
        deliveries=deliveries,
    )


def timeline_answer(request: Request, entries: Sequence[Entry]) -> Timeline:
    return Timeline(
        id=UUID(request["_id"]),
        status=Status(request["status"]),
        entries=[
            TimelineEntry(at=entry.at, what=entry.what, subject=entry.subject, detail=entry.detail)
            for entry in entries
        ],
    )


def _delivery(delivery: Delivery) -> DeliveryAnswer:
    waiting = delivery["state"] == DeliveryState.WAITING
    failed = delivery["state"] == DeliveryState.FAILED
    return DeliveryAnswer(
        destination=delivery["destination"],
        channel=delivery["channel"],
        state=delivery["state"],
        attempts=len(delivery["attempts"]),
        next_attempt_at=delivery["due_at"] if waiting else None,
        failure=_failure(delivery["destination"], delivery["attempts"]) if failed else None,
    )


def _failure(destination: str, attempts: Sequence[Attempt]) -> Failure:
    last = attempts[-1] if attempts else None
    code = last.get("code") if last is not None else None
    why = f" ({code})" if code else ""
    if last is not None and last.get("verdict") == "never":
        return Failure(
            destination=destination,
            reason=PERMANENT,
            code=code,
            message=f"{destination} refused it for good{why}",
        )
    return Failure(
        destination=destination,
        reason=ATTEMPTS_USED_UP,
        code=code,
        message=f"{destination} did not take it in {len(attempts)} attempts{why}",
    )
