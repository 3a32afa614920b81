"""A port that can be closed to callers and opened again, and connections that can be cut."""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakSet

from fastapi import FastAPI
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

LOOPBACK = "127.0.0.1"
# Longer than any client keeps an idle connection: a server that closes first, at the moment
# the client sends, would cause a lost answer that no test asked for.
KEEP_ALIVE_SECONDS = 75


class Conversation(Protocol):
    """A protocol of asyncio that exposes its transport; None once the connection is gone."""

    @property
    def transport(self) -> Any: ...


class Listener:
    """
    Serve `converse()` on a port; 0 chooses a free one. Raises OSError if it is taken.

    host: the address to listen on: loopback, except in a container of its own.

    The port stays ours while closed: a socket that is bound but does not listen holds it, so
    callers are refused and no other process can take it.
    """

    def __init__(self, port: int, converse: Callable[[], Any], *, host: str = LOOPBACK) -> None:
        self._converse = converse
        self._host = host
        self._conversations: WeakSet[Conversation] = WeakSet()
        self._server: asyncio.Server | None = None
        self._reservation = _bind(self._host, port)
        self.port: int = self._reservation.getsockname()[1]

    async def open(self) -> None:
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(self._begin, sock=_bind(self._host, self.port))

    def close(self) -> None:
        """Refuse new connections and cut the open ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for conversation in list(self._conversations):
            if conversation.transport is not None:
                conversation.transport.abort()

    def give_up_port(self) -> None:
        self.close()
        self._reservation.close()

    def _begin(self) -> Any:
        conversation = self._converse()
        self._conversations.add(conversation)
        return conversation


class _Connection(H11Protocol):
    """Lets a handler reach its connection as `request.state.transport`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn: asyncio types the transport too widely
        super().connection_made(transport)
        self.app_state = {"transport": transport}


def http_listener(port: int, app: FastAPI, *, host: str = LOOPBACK) -> Listener:
    config = Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    state = ServerState()
    return Listener(port, lambda: _Connection(config, state, app_state={}), host=host)


def reset(transport: asyncio.Transport) -> None:
    """Cut the connection with a TCP reset instead of an orderly end, unless it is gone already."""
    if transport.is_closing():
        return
    linger_not = struct.pack("ii", 1, 0)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)
    transport.abort()


def _bind(host: str, port: int) -> socket.socket:
    # The protocol is named because asyncio turns Nagle's delay off only where it reads TCP here:
    # without it every answer in two writes waits 40 ms for the caller's acknowledgement.
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"{host}:{port}: {error.strerror}") from error
    return bound
