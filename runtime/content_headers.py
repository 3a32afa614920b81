"""
What can be read of a message's properties when the AMQP library cannot decode them. Pure.

A broker passes on whatever a publisher wrote: a timestamp beyond the year 9999, a float that is not
a number, a field type that the library does not know. The library would give up the connection, and
meet the same message on the next one.

https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf, section 4.2, and
https://www.rabbitmq.com/amqp-0-9-1-errata for the field types.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

#: The properties in order, and how each is encoded; their flags count down from bit 15.
_ORDER = "short short table octet octet short short short short time short short short short"
_HEADERS, _MESSAGE_ID = 2, 8

_FIXED_BYTES = {
    **dict.fromkeys("tbB", 1),
    **dict.fromkeys("sUu", 2),
    **dict.fromkeys("Iif", 4),
    **dict.fromkeys("LldT", 8),
    "D": 5,
    "V": 0,
}
_WITH_LENGTH = "SxAF"
_TEXT = "S"


@dataclass(slots=True)
class ReadableProperties:
    """headers: those that are text; the others are left out. message_id: None if unreadable."""

    headers: dict[str, str] = field(default_factory=dict)
    message_id: str | None = None


def read_properties(encoded: bytes) -> ReadableProperties:
    """Never raises: what follows an unreadable part is left out."""
    found = ReadableProperties()
    with suppress(EOFError):
        _read(_Bytes(encoded), found)
    return found


def _read(source: "_Bytes", found: ReadableProperties) -> None:
    flags = source.number(2)
    more = flags
    while more & 1:  # further flags, of properties that AMQP 0-9-1 does not have
        more = source.number(2)
    readers: dict[str, Callable[[], bytes]] = {
        "short": lambda: source.take(source.number(1)),
        "table": lambda: source.take(source.number(4)),
        "octet": lambda: source.take(1),
        "time": lambda: source.take(8),
    }
    for index, kind in enumerate(_ORDER.split()):
        if not flags & (1 << (15 - index)):
            continue
        value = readers[kind]()
        if index == _HEADERS:
            found.headers.update(_texts(_Bytes(value)))
        elif index == _MESSAGE_ID:
            found.message_id = _text(value)


def _texts(table: "_Bytes") -> Iterator[tuple[str, str]]:
    """The entries that are text, up to one whose length is not known."""
    try:
        while not table.is_read:
            name = _text(table.take(table.number(1)))
            kind = chr(table.number(1))
            if kind in _WITH_LENGTH:
                value = table.take(table.number(4))
                if kind == _TEXT:
                    yield name, _text(value)
            elif kind in _FIXED_BYTES:
                table.take(_FIXED_BYTES[kind])
            else:
                return
    except EOFError:
        return


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")


class _Bytes:
    """Read from the front; raises EOFError where too few are left."""

    def __init__(self, encoded: bytes) -> None:
        self._encoded = encoded
        self._at = 0

    @property
    def is_read(self) -> bool:
        return self._at >= len(self._encoded)

    def take(self, count: int) -> bytes:
        taken = self._encoded[self._at : self._at + count]
        if len(taken) < count:
            raise EOFError
        self._at += count
        return taken

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "big")
