"""HTTP as bytes on a connection, for what no well-behaved client would send."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """headers: by their names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class RawConnection:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""

    def send(self, data: bytes) -> None:
        self._connection.sendall(data)

    def answer(self) -> RawAnswer:
        """Wait for the next answer; its body ends where its Content-Length says."""
        while b"\r\n\r\n" not in self._received:
            self._receive()
        head, _, rest = self._received.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        length = int(headers["content-length"])
        self._received = rest
        while len(self._received) < length:
            self._receive()
        body, self._received = self._received[:length], self._received[length:]
        return RawAnswer(int(status_line.split()[1]), headers, body)

    def wait_closed(self) -> None:
        """Wait until the other side has closed; fails if it sends more, or does not close."""
        with suppress(ConnectionError):
            assert self._connection.recv(65536) == b""

    def until_closed(self) -> bytes:
        """Everything that is sent before the other side closes."""
        with suppress(ConnectionError):
            while received := self._connection.recv(65536):
                self._received += received
        return self._received

    def _receive(self) -> None:
        received = self._connection.recv(65536)
        assert received, f"closed after {self._received!r}"
        self._received += received


@contextmanager
def raw_connection(url: str) -> Iterator[RawConnection]:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_SECONDS) as connection:
        yield RawConnection(connection)
