"""
Turns each document that was read into an entry, whatever its content.

Pure: what cannot be published becomes an entry without an event, never an exception, because one
bad document must not stop the stream.
"""

from typing import Any

import bson
from bson.errors import BSONError

from outbox.errors import UnfitEvent
from outbox.event import key_of, read_event
from relay.checkpoint import Position
from relay.window import Entry
from runtime.mongo import ANY_WRITER, Document
from runtime.undecodable import Undecodable

UNDECODABLE = "undecodable: the document holds text that is not UTF-8"
MALFORMED = "undecodable: the document holds BSON that contradicts itself"


def entry_of(document: Document, *, ordinal: int, position: Position | None) -> Entry:
    """position: where the stream stands behind the document; None when it was not read from it."""
    if isinstance(document, Undecodable):
        return _unfit(document, ordinal, position, MALFORMED)
    try:
        event = read_event(document)
    except UnfitEvent as unfit:
        return _unfit(document, ordinal, position, str(unfit))
    except UnicodeEncodeError:
        return _unfit(document, ordinal, position, UNDECODABLE)
    except ValueError as error:
        return _unfit(document, ordinal, position, f"unreadable: {error}")
    return Entry(event.id, event.key, ordinal, event, position)


def is_addressable(document_id: Any) -> bool:
    """Whether a query can name this document: text that is not UTF-8 cannot be encoded again."""
    try:
        bson.encode({"_id": document_id}, codec_options=ANY_WRITER)
    except (ValueError, BSONError):
        return False
    return True


def _unfit(document: Document, ordinal: int, position: Position | None, reason: str) -> Entry:
    key = _readable(key_of(document))
    return Entry(document.get("_id"), key, ordinal, None, position, reason=reason)


def _readable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
