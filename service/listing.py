"""
The list of requests: filters, and pages that stay where they are while new requests come in.

A page begins behind the last request of the one before it, not after so many of them: whatever is
accepted meanwhile stands in front, and nothing is shown twice or left out.
"""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from urllib.parse import urlencode

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from assistance.collection import NEWEST_OF_STATUS, NEWEST_OF_TOPIC
from assistance.request import Request, Status

PAGE_DEFAULT = 20
PAGE_LIMIT = 100

NEWEST_FIRST = [("created_at", -1), ("_id", -1)]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last request that was shown: the next page begins behind it."""

    created_at: datetime
    request_id: str

    def __str__(self) -> str:
        plain = f"{(self.created_at - _EPOCH) // _MILLISECOND}:{self.request_id}"
        return urlsafe_b64encode(plain.encode()).decode().rstrip("=")

    @classmethod
    def read(cls, text: str) -> "Cursor":
        """Raises ValueError for whatever was not made by `str`."""
        padded = text + "=" * (-len(text) % 4)
        plain = urlsafe_b64decode(padded.encode("ascii")).decode()
        milliseconds, _, request_id = plain.partition(":")
        try:
            cursor = cls(_EPOCH + int(milliseconds) * _MILLISECOND, request_id)
        except OverflowError as beyond:
            raise ValueError("a moment beyond all years") from beyond
        if str(cursor) != text:
            raise ValueError("not written as we write it")
        return cursor


def _is_cursor(text: str) -> str:
    try:
        Cursor.read(text)
    except ValueError:
        raise PydanticCustomError(
            "cursor", "Should be taken from the `next` of a page, as it stands there"
        ) from None
    return text


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise PydanticCustomError("moment", "Should be within the years 1 to 9999, UTC") from None


Moment = Annotated[AwareDatetime, AfterValidator(_in_utc)]


def _ends_after_it_begins(created_to: datetime | None, info: ValidationInfo) -> datetime | None:
    created_from = info.data.get("created_from")
    if created_to is not None and created_from is not None and created_to <= created_from:
        raise PydanticCustomError("range", "Should be later than created_from")
    return created_to


class Filters(BaseModel):
    # a misspelt filter would list everything
    model_config = ConfigDict(extra="forbid")

    status: list[Status] = Field(
        default=[], description="may be repeated: any of these", examples=[[Status.FAILED]]
    )
    topic: str | None = Field(
        default=None, max_length=255, description="exactly this one", examples=["sales"]
    )
    created_from: Moment | None = Field(
        default=None, description="accepted then or later", examples=["2026-11-23T00:00:00Z"]
    )
    created_to: Annotated[Moment | None, AfterValidator(_ends_after_it_begins)] = Field(
        default=None, description="accepted before then", examples=["2026-11-24T00:00:00Z"]
    )
    limit: int = Field(
        default=PAGE_DEFAULT, ge=1, le=PAGE_LIMIT, description="most requests on one page"
    )
    cursor: Annotated[str, Field(max_length=512), AfterValidator(_is_cursor)] | None = Field(
        default=None, description="from the `next` of the page before"
    )


@dataclass(frozen=True, slots=True)
class Query:
    """criteria: for MongoDB; index: the name of the one that has them in the order of the list."""

    criteria: dict[str, Any]
    index: str


def query_of(filters: Filters) -> Query:
    # Named even when all are wanted: the index begins with it, and MongoDB merges its parts.
    criteria: dict[str, Any] = {
        "status": {"$in": [status.value for status in filters.status or Status]}
    }
    created: dict[str, datetime] = {}
    if filters.created_from is not None:
        created["$gte"] = filters.created_from
    if filters.created_to is not None:
        created["$lt"] = filters.created_to
    if filters.cursor is not None:
        last = Cursor.read(filters.cursor)
        created["$lte"] = last.created_at
        # those of the same millisecond that have been shown
        criteria["$nor"] = [{"created_at": last.created_at, "_id": {"$gte": last.request_id}}]
    if created:
        criteria["created_at"] = created
    if filters.topic is None:
        return Query(criteria, NEWEST_OF_STATUS)
    return Query({"topic": filters.topic, **criteria}, NEWEST_OF_TOPIC)


def link_to_next(path: str, asked: Iterable[tuple[str, str]], last: Request) -> str:
    """asked: the parameters of this page, repeated in the next one's."""
    kept = [(name, value) for name, value in asked if name != "cursor"]
    cursor = Cursor(last["created_at"], last["_id"])
    return f"{path}?{urlencode([*kept, ('cursor', str(cursor))])}"
