"""One request and its events, as they are read together for a timeline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from assistance.collection import ASSISTANCES
from assistance.request import Request
from outbox.collection import OUTBOX
from runtime.mongo import Database
from service.timeline import Entry, timeline


@dataclass(frozen=True, slots=True)
class Way:
    request: Request
    entries: Sequence[Entry]


async def look_up(
    database: Database, request_id: str, projection: Mapping[str, Any] | None = None
) -> Way | None:
    """projection: what to leave out of the request; what is not read cannot be told."""
    request: Request | None = await database[ASSISTANCES].find_one({"_id": request_id}, projection)
    if request is None:
        return None
    its_events = await database[OUTBOX].find({"key": request_id}, {"payload": False}).to_list(None)
    return Way(request, timeline(request, its_events, now=datetime.now(UTC)))
