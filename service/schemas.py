"""What the API tells of a request: never what a third party said, a worker's name or a secret."""

from collections.abc import Mapping, Sequence
from datetime import datetime
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
from service.timeline import Entry

PATH = "/api/assistances"

EXAMPLE_ID = "0f5e2f6c-8f0c-4a7e-9a1e-5d0c9b1f7a10"
EXAMPLE_PATH = f"{PATH}/{EXAMPLE_ID}"
EXAMPLE_DESCRIPTION = "A customer asks for a quote for 40 seats"

#: What an answer is made of; the rest of the document is not even read.
TOLD: Mapping[str, Any] = dict.fromkeys(
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

#: What a timeline for the API is made without.
UNTOLD: Mapping[str, Any] = dict.fromkeys(
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
    link: str = Field(description="where its state can be asked for", examples=[EXAMPLE_PATH])


class Failure(BaseModel):
    destination: str = Field(examples=["slack"])
    reason: str = Field(
        description="`permanent`: it was refused, and no further attempt would help; "
        "`attempts_used_up`: every attempt was made, and none succeeded",
        examples=[PERMANENT],
    )
    code: str | None = Field(
        description="what the last attempt ended with, for grouping", examples=["404"]
    )
    message: str = Field(
        description="the same in words", examples=["slack refused it for good (404)"]
    )


class DeliveryAnswer(BaseModel):
    destination: str = Field(examples=["slack"])
    channel: str = Field(examples=["slack"])
    state: str = Field(
        description="`waiting`, `claimed` (in a worker's hand), `needs_decision` (a person has to "
        "say whether it arrived), `succeeded` or `failed`",
        examples=[DeliveryState.SUCCEEDED.value],
    )
    attempts: int = Field(description="how many were begun", examples=[1])
    next_attempt_at: datetime | None = Field(
        description="not before then, while it is `waiting`; else null", examples=[None]
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
        description="when it was accepted, or one of its deliveries last closed or opened again",
        examples=["2026-11-23T10:15:31.456Z"],
    )
    channels: list[str] = Field(
        description="the kinds of third party that it goes to", examples=[["slack"]]
    )
    attempts: int = Field(description="of all its deliveries together", examples=[1])
    failure: Failure | None = Field(
        description="why it `failed`; where several deliveries did, the first one's. Else null",
        examples=[None],
    )
    deliveries: list[DeliveryAnswer] = Field(description="one for each destination of its topic")


class Page(BaseModel):
    items: list[Assistance] = Field(description="the newest first")
    next: str | None = Field(
        description="the path of the next page; null on the last one",
        examples=[f"{PATH}?status=failed&cursor=MTc5NTQyODkzMDEyMzowZjVlMmY2Yw"],
    )


class TimelineEntry(BaseModel):
    at: datetime | None = Field(
        description="null where no time is known", examples=["2026-11-23T10:15:31.456Z"]
    )
    what: str = Field(
        description="`accepted`, `appended`, `published`, `held`, `parked`, `discarded`, "
        "`removed`, `started`, `ended` or `next`",
        examples=["ended"],
    )
    subject: str = Field(
        description="the destination or the event that it is about", examples=["slack, attempt 1"]
    )
    detail: str = Field(description="the rest, in words", examples=["done, 200"])


class Timeline(BaseModel):
    id: UUID = Field(examples=[EXAMPLE_ID])
    status: Status = Field(examples=[Status.SUCCEEDED])
    entries: list[TimelineEntry] = Field(
        description="in the order of time; what comes next stands at the end"
    )


def assistance(request: Request) -> Assistance:
    """request: as it is read with `TOLD`."""
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
