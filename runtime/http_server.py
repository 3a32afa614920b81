"""
uvicorn with limits, for the API and for the pages of `runtime.monitoring`.

uvicorn alone waits without end for the head of a request, reads on after it has refused a body, and
counts idle connections against its `limit_concurrency`, so that a few dozen of them keep every
probe out. Here:

- the head of a request must arrive within `head_seconds`; 408 otherwise;
- when all `max_connections` are taken, a new connection replaces the one that has been waiting
  longest for its client: for a request, or for an answer to be read. It is answered 503 only when
  none is waiting;
- an answer that leaves a part of the body unread has `Connection: close`, and little more is read;
- a request with both Content-Length and Transfer-Encoding is refused (RFC 9112, section 6.3);
- a client that does not read its answer is disconnected.

Every answer has `X-Content-Type-Options: nosniff` and, by default, `Cache-Control: no-store`.
"""

import asyncio
import json
from collections.abc import Callable, Generator, MutableMapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

#: An answer is sent within milliseconds; a client that takes this long does not read it.
WRITE_SECONDS = 30.0

#: After a refusal, this much of the body is still read and dropped, for at most this long: closing
#: at once would reset the connection, and the client could lose the answer.
DISCARD_LIMIT_BYTES = 64 * 1024
DISCARD_SECONDS = 1.0

Message = MutableMapping[str, Any]


class HttpConfig(uvicorn.Config):
    def __init__(
        self, app: Any, *, max_connections: int, head_seconds: float, **options: Any
    ) -> None:
        """options: those of `uvicorn.Config`."""
        super().__init__(
            app,
            http=LimitedProtocol,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            headers=[("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")],
            **options,
        )
        self.max_connections = max_connections
        self.head_seconds = head_seconds


class HttpServer(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None]:
        # the process handles signals itself; uvicorn would raise them again after draining
        yield


class LimitedProtocol(H11Protocol):
    """
    One connection.

    waiting_since: when it began to wait for its client, by the loop's clock; None while the
    application has a call of it, and after it was replaced.
    """

    config: HttpConfig

    def __init__(
        self,
        config: HttpConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._served_app = self.app
        self.app = self._serve
        self._replaced = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        full = len(self.connections) >= self.config.max_connections
        super().connection_made(transport)
        if full and not self._replace_waiting():
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", "Too many calls; try again")
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_head()
        if self.transport.is_closing():
            self._watch_write()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_write()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_write_timer()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_write()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head_timer()
        self._end_write_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, "malformed_request", msg)

    @property
    def waiting_since(self) -> float | None:
        if self._replaced:
            return None
        if self._write_timer is not None:
            return self._write_timer.when() - WRITE_SECONDS
        if self._head_timer is not None:
            return self._head_timer.when() - self.config.head_seconds
        return None

    def _replace_waiting(self) -> bool:
        """Close the connection that has waited longest; False if none is waiting."""
        waiting = [
            (since, id(other), other)
            for other in self.connections
            if isinstance(other, LimitedProtocol) and (since := other.waiting_since) is not None
        ]
        if not waiting:
            return False
        _, _, longest = min(waiting)
        longest.give_way()
        return True

    def give_way(self) -> None:
        self._replaced = True
        self.transport.abort()

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._end_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.config.head_seconds, self._end_head)

    def _end_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _end_head(self) -> None:
        begun, _ = self.conn.trailing_data
        if begun:
            self._refuse(
                HTTPStatus.REQUEST_TIMEOUT,
                "request_timeout",
                f"The request's head took longer than {self.config.head_seconds:g} seconds",
            )
        else:
            self.timeout_keep_alive_handler()

    def _watch_write(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def _refuse(self, status: HTTPStatus, code: str, message: str) -> None:
        """Answer outside a call of the application, and close the connection."""
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            headers, body = _problem(status, code, message)
            answer = (
                h11.Response(
                    status_code=status,
                    reason=status.phrase.encode(),
                    headers=[*self.server_state.default_headers, *headers],
                ),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            for event in answer:
                self.transport.write(self.conn.send(event) or b"")
        if self._in_call():
            # the application must not answer any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
        self._watch_write()

    def _in_call(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    async def _serve(
        self, scope: Any, receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        """The application, called with what a request means rather than how it is written."""
        cycle, held_back = self.cycle, False

        async def send_and_close(message: Message) -> None:
            nonlocal held_back
            if message["type"] == "http.response.start" and (cycle.more_body or ambiguous):
                given = message.get("headers", [])
                headers = [each for each in given if each[0].lower() != b"connection"]
                message = {**message, "headers": [*headers, (b"connection", b"close")]}
            elif message["type"] == "http.response.body" and cycle.more_body:
                held_back = not message.get("more_body", False)
                message = {**message, "more_body": True}
            await send(message)

        names = {name for name, _ in scope["headers"]}
        ambiguous = {b"content-length", b"transfer-encoding"} <= names
        if ambiguous:
            headers, body = _problem(
                HTTPStatus.BAD_REQUEST,
                "malformed_request",
                "The headers Content-Length and Transfer-Encoding exclude each other",
            )
            start = {"type": "http.response.start", "status": HTTPStatus.BAD_REQUEST.value}
            await send_and_close({**start, "headers": headers})
            await send_and_close({"type": "http.response.body", "body": body})
        else:
            _use_origin_form(scope)
            await self._served_app(scope, receive, send_and_close)
        if held_back:
            await _discard_body(receive)
            await send({"type": "http.response.body"})


def _use_origin_form(scope: Any) -> None:
    """`GET http://host/path` means `GET /path` with that host (RFC 9112, section 3.2.2)."""
    scheme, separator, rest = scope["raw_path"].partition(b"://")
    if not separator or scheme.lower() not in {b"http", b"https"}:
        return
    host, slash, path = rest.partition(b"/")
    scope["raw_path"] = slash + path or b"/"
    scope["path"] = unquote(scope["raw_path"].decode("ascii"))
    others = [header for header in scope["headers"] if header[0] != b"host"]
    scope["headers"] = [(b"host", host), *others]


async def _discard_body(receive: Callable[..., Any]) -> None:
    discarded_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while discarded_bytes < DISCARD_LIMIT_BYTES:
                message = await receive()
                if not message.get("more_body", False):
                    return
                discarded_bytes += len(message["body"])


def _problem(
    status: HTTPStatus, code: str, message: str
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of a problem document (RFC 9457), in the form that the API's have."""
    document = {
        "type": f"urn:assistance:problem:{code}",
        "title": status.phrase,
        "status": status.value,
        "detail": message,
        "code": code,
        "message": message,
    }
    body = json.dumps(document).encode()
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", b"1"))
    return headers, body
