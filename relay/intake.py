"""
An entry for each document that was read, whatever stands in it.

Pure: what cannot be published becomes an entry without an event, never an exception, because one
bad document must not stop the stream.
"""

import bson
from bson.errors import InvalidBSON
from bson.raw_bson import RawBSONDocument

from outbox.errors import UnfitEvent
from outbox.event import key_of, read_event
from relay.checkpoint import Position
from relay.settling import Entry
from runtime.mongo import LENIENT


def entry_of(document: RawBSONDocument, *, ordinal: int, position: Position | None) -> Entry:
    """position: where the stream stands behind the document; None when it did not come from it."""
    try:
        event = read_event(document)
    except UnfitEvent as unfit:
        return Entry(
            document.get("_id"), key_of(document), ordinal, None, position, reason=str(unfit)
        )
    except InvalidBSON as broken:
        readable = bson.decode(document.raw, LENIENT)
        reason = f"undecodable: {broken}"
        return Entry(readable.get("_id"), key_of(readable), ordinal, None, position, reason=reason)
    return Entry(event.id, event.key, ordinal, event, position)
