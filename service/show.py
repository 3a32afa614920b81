"""`python -m service show`: one request's way, for a person or as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import orjson
from rich.text import Text

from assistance.collection import ASSISTANCES
from assistance.request import Request
from outbox.collection import OUTBOX
from runtime.mongo import Database
from service.timeline import Entry, timeline

STYLES = {
    "accepted": "bold",
    "published": "green",
    "held": "yellow",
    "parked": "bold red",
    "removed": "dim",
    "next": "bold cyan",
}

NO_TIME = " " * len("2026-11-23 10:15:30.123")


@dataclass(frozen=True, slots=True)
class Way:
    request: Request
    entries: Sequence[Entry]


async def look_up(database: Database, request_id: str) -> Way | None:
    request: Request | None = await database[ASSISTANCES].find_one({"_id": request_id})
    if request is None:
        return None
    its_events = await database[OUTBOX].find({"key": request_id}, {"payload": False}).to_list(None)
    return Way(request, timeline(request, its_events, now=datetime.now(UTC)))


def as_json(way: Way) -> str:
    request = way.request
    told = {
        "id": request["_id"],
        "topic": request["topic"],
        "description": request["description"],
        "status": request["status"],
        "created_at": request["created_at"],
        "updated_at": request["updated_at"],
        "timeline": way.entries,
    }
    return orjson.dumps(told, option=orjson.OPT_INDENT_2 | orjson.OPT_UTC_Z).decode()


def as_lines(way: Way) -> Text:
    request = way.request
    widest = max(len(entry.subject) for entry in way.entries)
    lines = [
        Text(f"{printable(request['_id'])}  {printable(request['topic'])}  {request['status']}"),
        Text(printable(request["description"]), style="italic"),
    ]
    for entry in way.entries:
        time = entry.at.isoformat(" ", "milliseconds")[: len(NO_TIME)] if entry.at else NO_TIME
        lines.append(
            Text.assemble(
                (time, "dim"),
                ("  " + entry.what.ljust(10), STYLES.get(entry.what, "")),
                printable(entry.subject).ljust(widest + 2),
                printable(entry.detail),
            )
        )
    return Text("\n").join(lines)


def printable(text: str) -> str:
    """What strangers wrote, unable to move the cursor, change colours or reverse the line."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
