"""
A TCP proxy for one link, which a test can spoil while both ends go on.

    with Link("127.0.0.1", 27017) as link:
        client = MongoClient(f"mongodb://127.0.0.1:{link.port}/?directConnection=true")
        link.switch(Mode.SILENT)                               # every connection, and new ones
        link.switch(Mode.SILENT, carrying=b"$changeStream")    # only those that have carried this
        link.switch(Mode.PASS)

The proxy runs on an event loop and a thread of its own. A replica set is reached through it with
`directConnection=true`: otherwise the driver goes on to the addresses that the members report.
"""

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from sandbox.ports import LOOPBACK

CHUNK_BYTES = 64 * 1024
TRICKLE_SECONDS = 0.5
TRICKLE_BYTES = 1

#: A marker may be split between two reads.
OVERLAP_BYTES = 64


class Mode(StrEnum):
    """What the link does with traffic."""

    PASS = "pass"
    #: connections are accepted and kept; nothing is forwarded, and it flows on when this ends
    SILENT = "silent"
    #: established connections are reset, and new ones are refused
    REFUSING = "refusing"
    #: every connection is accepted and reset as soon as it carries something
    CLOSING = "closing"
    #: two bytes a second in each direction
    TRICKLING = "trickling"
    #: what the server sends is dropped on the floor; what the client sends arrives
    LOSING = "losing"


FAULTS = tuple(mode for mode in Mode if mode is not Mode.PASS)


@dataclass(eq=False)
class _Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    mode: Mode
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    carried: set[bytes] = field(default_factory=set)

    def set_mode(self, mode: Mode) -> None:
        self.mode = mode
        self.changed.set()
        self.changed = asyncio.Event()
        if mode in {Mode.REFUSING, Mode.CLOSING}:
            self.reset()

    def reset(self) -> None:
        for writer in (self.client, self.server):
            # SO_LINGER of zero makes the close a reset
            end: socket.socket = writer.get_extra_info("socket")
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            writer.transport.abort()


class Link:
    """
    markers: byte strings by which `switch(carrying=...)` may choose connections; a connection
    carries one as soon as its client has sent it.
    """

    def __init__(
        self, host: str, port: int, *, markers: tuple[bytes, ...] = (b"$changeStream",)
    ) -> None:
        self._target = (host, port)
        self._markers = markers
        self._mode = Mode.PASS
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server | None = None
        self.port = 0
        #: how many connections were accepted since the start
        self.accepted = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def url(self, url: str, **query: str) -> str:
        """The same URL, leading through this link."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        options = "&".join(f"{name}={value}" for name, value in query.items()) or parts.query
        netloc = f"{user}{at}{LOOPBACK}:{self.port}"
        return urlunsplit((parts.scheme, netloc, parts.path or "/", options, ""))

    def switch(self, mode: Mode, *, carrying: bytes | None = None) -> None:
        """
        Change what the link does from now on.

        carrying: only for those of the present connections that have carried this marker.
        """

        async def change() -> None:
            self._mode = mode if carrying is None else Mode.PASS
            if self._mode is Mode.REFUSING:
                await self._stop_listening()
            elif self._server is None:
                await self._listen()
            for connection in list(self._connections):
                if carrying is None or carrying in connection.carried:
                    connection.set_mode(mode)

        self._call(change)

    def _call(self, coroutine: Callable[[], object]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine(), self._loop).result(10)  # type: ignore[arg-type]

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, LOOPBACK, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _end(self) -> None:
        await self._stop_listening()
        for connection in self._connections:
            connection.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(writer, to_server, self._mode)
        self._connections.add(connection)
        try:
            await asyncio.gather(
                self._pump(reader, to_server, connection, from_client=True),
                self._pump(from_server, writer, connection, from_client=False),
            )
        except OSError:
            pass
        finally:
            self._connections.discard(connection)
            writer.transport.abort()
            to_server.transport.abort()

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        connection: _Connection,
        *,
        from_client: bool,
    ) -> None:
        overlap = b""
        while data := await source.read(CHUNK_BYTES):
            if from_client:
                seen = overlap + data
                connection.carried |= {marker for marker in self._markers if marker in seen}
                overlap = seen[-OVERLAP_BYTES:]
            await self._forward(data, sink, connection, from_client=from_client)
        if connection.mode is Mode.SILENT:
            # neither end hears that the other has closed
            while connection.mode is Mode.SILENT:
                await connection.changed.wait()
        sink.close()

    async def _forward(
        self, data: bytes, sink: asyncio.StreamWriter, connection: _Connection, *, from_client: bool
    ) -> None:
        while data:
            match connection.mode:
                case Mode.SILENT:
                    await connection.changed.wait()
                case Mode.CLOSING | Mode.REFUSING:
                    connection.reset()
                    raise ConnectionResetError
                case Mode.LOSING if not from_client:
                    return
                case Mode.TRICKLING:
                    sink.write(data[:TRICKLE_BYTES])
                    data = data[TRICKLE_BYTES:]
                    with suppress(TimeoutError):
                        await asyncio.wait_for(connection.changed.wait(), TRICKLE_SECONDS)
                case _:
                    sink.write(data)
                    await sink.drain()
                    return
