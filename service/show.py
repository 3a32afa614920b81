"""`python -m service show`: one request's history, for a person or as JSON."""

from typing import Any

from rich.text import Text

from runtime.printable import escape_unprintable
from service.timeline import RequestHistory

STYLES = {
    "accepted": "bold",
    "published": "green",
    "held": "yellow",
    "parked": "bold red",
    "removed": "dim",
    "next": "bold cyan",
}

NO_TIME = " " * len("2026-11-23 10:15:30.123")


def as_document(history: RequestHistory) -> dict[str, Any]:
    request = history.request
    return {
        "id": request["_id"],
        "topic": request["topic"],
        "description": request["description"],
        "status": request["status"],
        "created_at": request["created_at"],
        "updated_at": request["updated_at"],
        "timeline": history.entries,
    }


def as_lines(history: RequestHistory) -> Text:
    request = history.request
    widest = max(len(entry.subject) for entry in history.entries)
    lines = [
        Text(escape_unprintable(f"{request['_id']}  {request['topic']}  {request['status']}")),
        Text(escape_unprintable(request["description"]), style="italic"),
    ]
    for entry in history.entries:
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
