"""
A flood of ready-made frames: what RabbitMQ takes when its client costs nothing.

One message is encoded once; the rest is `send` and the reading of confirms, with a bounded window
as the relay has it. Speaks just enough of AMQP 0-9-1 to get that far.
"""

import os
import socket
import sys
from collections.abc import Iterator
from math import inf
from typing import Any
from urllib.parse import unquote, urlsplit

from pika import BasicProperties, frame, spec

from benchmarks.field import EXCHANGE, QUEUE, new_event

WINDOW_MESSAGES = 1000
CHUNK_MESSAGES = 100
CHANNEL = 1


class Broker:
    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname, parts.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(frame.ProtocolHeader().marshal())
        self._frames = self._received()
        self._await(spec.Connection.Start)
        login = f"\0{unquote(parts.username or '')}\0{unquote(parts.password or '')}"
        self._call(0, spec.Connection.StartOk({}, "PLAIN", login, "en_US"))
        tune = self._await(spec.Connection.Tune)
        self._call(0, spec.Connection.TuneOk(tune.channel_max, tune.frame_max, 0))
        self._call(0, spec.Connection.Open(unquote(parts.path[1:]) or "/"))
        self._await(spec.Connection.OpenOk)
        self._call(CHANNEL, spec.Channel.Open())
        self._await(spec.Channel.OpenOk)
        self._call(CHANNEL, spec.Confirm.Select())
        self._await(spec.Confirm.SelectOk)

    def send(self, wire: bytes) -> None:
        self._socket.sendall(wire)

    def confirmed_up_to(self) -> int:
        """The next confirm's delivery tag; the broker acks one tag, or all up to it."""
        tag = self._await(spec.Basic.Ack).delivery_tag
        return int(tag)

    def _call(self, channel: int, method: Any) -> None:
        self._socket.sendall(frame.Method(channel, method).marshal())

    def _await(self, kind: type) -> Any:
        for received in self._frames:
            if isinstance(getattr(received, "method", None), kind):
                return received.method
        raise ConnectionError("the broker closed the connection")

    def _received(self) -> Iterator[Any]:
        pending = b""
        while more := self._socket.recv(65536):
            pending += more
            while True:
                length, decoded = frame.decode_frame(pending)
                if decoded is None:
                    break
                pending = pending[length:]
                yield decoded


def ready_made_message() -> bytes:
    event = new_event("flood", 1)
    body = event["payload"].encode()
    properties = BasicProperties(
        content_type="application/cloudevents+json",
        delivery_mode=2,
        message_id=event["_id"],
        type=event["type"],
    )
    publish = spec.Basic.Publish(exchange=EXCHANGE, routing_key=QUEUE, mandatory=True)
    return b"".join(
        part.marshal()
        for part in (
            frame.Method(CHANNEL, publish),
            frame.Header(CHANNEL, len(body), properties),
            frame.Body(CHANNEL, body),
        )
    )


def main(count: float) -> None:
    """Publish `count` messages, and return when all are confirmed; infinity means until killed."""
    broker = Broker(os.environ["RABBITMQ_URL"])
    chunk = ready_made_message() * CHUNK_MESSAGES
    sent = confirmed = 0
    while confirmed < count:
        while sent < count and sent - confirmed <= WINDOW_MESSAGES - CHUNK_MESSAGES:
            broker.send(chunk)
            sent += CHUNK_MESSAGES
        # confirms may come out of order by a few; the window is a bound, not an account
        confirmed = max(confirmed, broker.confirmed_up_to())


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else inf)
