"""
The list of requests: filters, and pages that stay where they are while new requests come in.

A page starts after the last request of the previous page rather than at an offset: requests that
are accepted meanwhile come first in the list, so no request is shown twice or skipped.
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
    """The last request of a page; the next page starts after it."""

    created_at: datetime
    request_id: str

    def __str__(self) -> str:
        plain = f"{(self.created_at - _EPOCH) // _MILLISECOND}:{self.request_id}"
        return urlsafe_b64encode(plain.encode()).decode().rstrip("=")

    @classmethod
    def read(cls, text: str) -> "Cursor":
        """Raises ValueError for a text that `str` did not produce."""
        padded = text + "=" * (-len(text) % 4)
        plain = urlsafe_b64decode(padded.encode("ascii")).decode()
        milliseconds, _, request_id = plain.partition(":")
        try:
            cursor = cls(_EPOCH + int(milliseconds) * _MILLISECOND, request_id)
        except OverflowError as beyond:
            raise ValueError("the time is out of range") from beyond
        if str(cursor) != text:
            raise ValueError("not in canonical form")
        return cursor


def _is_cursor(text: str) -> str:
    try:
        Cursor.read(text)
    except ValueError:
        raise PydanticCustomError(
            "cursor", "Should be copied unchanged from the `next` of a page"
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
        default=[], description="repeat it to match any of several", examples=[[Status.FAILED]]
    )
    topic: str | None = Field(
        default=None, max_length=255, description="exact match", examples=["sales"]
    )
    created_from: Moment | None = Field(
        default=None,
        description="accepted at or after this time",
        examples=["2026-11-23T00:00:00Z"],
    )
    created_to: Annotated[Moment | None, AfterValidator(_ends_after_it_begins)] = Field(
        default=None, description="accepted before this time", examples=["2026-11-24T00:00:00Z"]
    )
    limit: int = Field(
        default=PAGE_DEFAULT,
        ge=1,
        le=PAGE_LIMIT,
        description="maximum number of requests on a page",
    )
    cursor: Annotated[str, Field(max_length=512), AfterValidator(_is_cursor)] | None = Field(
        default=None, description="taken from the `next` of the previous page"
    )


@dataclass(frozen=True, slots=True)
class Query:
    """criteria: a MongoDB filter; index: the name of the index that serves it in list order."""

    criteria: dict[str, Any]
    index: str


def query_of(filters: Filters) -> Query:
    # Given even when every status matches: it is the index's first field, and MongoDB merges
    # the sorted range of each value.
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
        # exclude requests of the same millisecond that were already shown
        criteria["$nor"] = [{"created_at": last.created_at, "_id": {"$gte": last.request_id}}]
    if created:
        criteria["created_at"] = created
    if filters.topic is None:
        return Query(criteria, NEWEST_OF_STATUS)
    return Query({"topic": filters.topic, **criteria}, NEWEST_OF_TOPIC)


def link_to_next(path: str, asked: Iterable[tuple[str, str]], last: Request) -> str:
    """asked: the query parameters of this page; the next page repeats them."""
    kept = [(name, value) for name, value in asked if name != "cursor"]
    cursor = Cursor(last["created_at"], last["_id"])
    return f"{path}?{urlencode([*kept, ('cursor', str(cursor))])}"
