"""
Documents that the server stores but drivers cannot decode. Pure.

The server validates the outer structure of a document, not all of its content: binary data of
subtype 2 may contradict its own length, for instance. A driver decodes a reply as a whole, so one
such document would make its whole batch unreadable every time.
"""

from contextlib import suppress
from typing import Any

import bson
from bson import CodecOptions
from bson.errors import InvalidBSON
from bson.raw_bson import RawBSONDocument

Options = CodecOptions[dict[str, Any]]

#: BSON begins with its own length.
LENGTH_BYTES = 4
MAX_ID_BYTES = 2048

BATCHES = ("firstBatch", "nextBatch")


class Undecodable(dict[str, Any]):
    """Replaces such a document: holds its `_id` only, if that can be read."""


def cursor_in(reply: RawBSONDocument, options: Options) -> dict[str, Any]:
    """The cursor in a reply, decoded document by document if it does not decode as a whole."""
    try:
        cursor: dict[str, Any] = bson.decode(reply.raw, options)["cursor"]
    except InvalidBSON:
        return {
            name: [_decoded(document, options) for document in value]
            if name in BATCHES
            else _decoded(value, options)
            for name, value in reply["cursor"].items()
        }
    return cursor


def _decoded(value: Any, options: Options) -> Any:
    if not isinstance(value, RawBSONDocument):
        return value
    try:
        return bson.decode(value.raw, options)
    except InvalidBSON:
        return _change(value, options) or _undecodable(value, options)


def _change(value: RawBSONDocument, options: Options) -> dict[str, Any] | None:
    """A change event of which only the document does not decode; None for anything else."""
    try:
        change = dict(value)
    except InvalidBSON:
        return None
    document = change.pop("fullDocument", None)
    if not isinstance(document, RawBSONDocument):
        return None
    fields = {name: _decoded(field, options) for name, field in change.items()}
    return {**fields, "fullDocument": _undecodable(document, options)}


def _undecodable(document: RawBSONDocument, options: Options) -> Undecodable:
    """The server stores `_id` first: the shortest prefix that decodes ends right after it."""
    raw = document.raw
    for end in range(LENGTH_BYTES, min(len(raw), MAX_ID_BYTES)):
        length = (end + 1).to_bytes(LENGTH_BYTES, "little")
        with suppress(InvalidBSON):
            beginning = bson.decode(length + raw[LENGTH_BYTES:end] + b"\0", options)
            if "_id" in beginning:
                return Undecodable(beginning)
    return Undecodable()
