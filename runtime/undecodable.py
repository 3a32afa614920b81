"""
Documents that the server stores and no driver decodes. Pure.

The server checks the frame of a document and not all that is inside: binary data of the old kind
may contradict its own length, for instance. A driver decodes a reply as a whole, so one such
document would make a whole batch unreadable, again and again.
"""

from contextlib import suppress
from typing import Any

import bson
from bson import CodecOptions
from bson.errors import InvalidBSON
from bson.raw_bson import RawBSONDocument

Options = CodecOptions[dict[str, Any]]

#: BSON puts its own length in front.
LENGTH_BYTES = 4
LONGEST_ID_BYTES = 2048

BATCHES = ("firstBatch", "nextBatch")


class Undecodable(dict[str, Any]):
    """Stands for such a document: holds nothing but its `_id`, where that can be read."""


def cursor_in(reply: RawBSONDocument, options: Options) -> dict[str, Any]:
    """The cursor in a reply; where that does not decode as a whole, document by document."""
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
    """A change whose document alone does not decode; None for anything else."""
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
    """The server stores `_id` in front: the shortest beginning that decodes ends behind it."""
    raw = document.raw
    for end in range(LENGTH_BYTES, min(len(raw), LONGEST_ID_BYTES)):
        length = (end + 1).to_bytes(LENGTH_BYTES, "little")
        with suppress(InvalidBSON):
            beginning = bson.decode(length + raw[LENGTH_BYTES:end] + b"\0", options)
            if "_id" in beginning:
                return Undecodable(beginning)
    return Undecodable()
