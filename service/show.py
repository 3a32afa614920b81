"""`python -m service show`: one request's way, for a person or as JSON."""

import orjson
from rich.text import Text

from assistance.verdict import escape_unprintable
from service.way import Way

STYLES = {
    "accepted": "bold",
    "published": "green",
    "held": "yellow",
    "parked": "bold red",
    "removed": "dim",
    "next": "bold cyan",
}

NO_TIME = " " * len("2026-11-23 10:15:30.123")


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
        Text(escape_unprintable(f"{request['_id']}  {request['topic']}  {request['status']}")),
        Text(escape_unprintable(request["description"]), style="italic"),
    ]
    for entry in way.entries:
        time = entry.at.isoformat(" ", "milliseconds")[: len(NO_TIME)] if entry.at else NO_TIME
        lines.append(
            Text.assemble(
                (time, "dim"),
                ("  " + entry.what.ljust(10), STYLES.get(entry.what, "")),
                escape_unprintable(entry.subject).ljust(widest + 2),
                escape_unprintable(entry.detail),
            )
        )
    return Text("\n").join(lines)
