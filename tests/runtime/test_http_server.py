"""The limits of our HTTP server, each with a client that ignores it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest

from runtime import http_server
from runtime.http_server import HttpConfig, HttpServer
from runtime.monitoring import monitored
from runtime.settings import MonitoringSettings
from sandbox.ports import LOOPBACK, free_ports

App = Callable[[Any, Any, Any], Awaitable[None]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Streams]]

DEADLINE_SECONDS = 20.0

#: Longer than any test waits.
NEVER_SECONDS = 600.0

HALF_A_HEAD = b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow: "
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


async def echo_path(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once with path and host, whatever the body."""
    _ = receive
    host = dict(scope["headers"]).get(b"host", b"")
    body = scope["path"].encode() + b" " + host
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(
    app: App, *, max_connections: int = 4, head_seconds: float = NEVER_SECONDS
) -> AsyncIterator[Connect]:
    listener = socket.create_server((LOOPBACK, 0))
    config = HttpConfig(
        app,
        max_connections=max_connections,
        head_seconds=head_seconds,
        timeout_graceful_shutdown=1,
    )
    server = HttpServer(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    async with connecting(listener.getsockname()[1]) as connect:
        yield connect
    server.should_exit = True
    await task


@asynccontextmanager
async def connecting(port: int) -> AsyncIterator[Connect]:
    """Every connection is closed at the end."""
    async with AsyncExitStack() as stack:

        async def connect() -> Streams:
            streams = await asyncio.open_connection(LOOPBACK, port)
            stack.callback(streams[1].close)
            return streams

        yield connect


async def within_deadline(answer: Awaitable[bytes]) -> bytes:
    return await asyncio.wait_for(answer, DEADLINE_SECONDS)


async def head_of(streams: Streams) -> str:
    head = await within_deadline(streams[0].readuntil(b"\r\n\r\n"))
    return head.decode().lower()


async def until_closed(streams: Streams) -> bytes:
    with suppress(ConnectionError):
        return await within_deadline(streams[0].read())
    return b""


async def test_a_head_that_is_not_finished_in_time_is_answered_408() -> None:
    async with serving(echo_path, head_seconds=0.2) as connect:
        slow, silent = await connect(), await connect()
        slow[1].write(HALF_A_HEAD)
        answer = await until_closed(slow)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"x-content-type-options: nosniff" in answer.lower()
        assert await until_closed(silent) == b""


async def test_the_deadline_holds_for_the_second_request_of_a_connection_too() -> None:
    async with serving(echo_path, head_seconds=0.2) as connect:
        streams = await connect()
        streams[1].write(GET)
        assert "200 ok" in await head_of(streams)
        streams[1].write(HALF_A_HEAD)
        assert b"HTTP/1.1 408 " in await until_closed(streams)


async def test_a_connection_that_waits_for_a_request_gives_way_to_a_new_one() -> None:
    async with serving(echo_path, max_connections=4) as connect:
        waiting = [await connect() for _ in range(12)]
        waiting[-1][1].write(HALF_A_HEAD)
        fresh = await connect()
        fresh[1].write(GET)
        assert "200 ok" in await head_of(fresh)
        for replaced in waiting[:9]:
            assert await until_closed(replaced) == b""


async def test_a_burst_of_connections_keeps_to_the_limit() -> None:
    async with serving(echo_path, max_connections=4) as connect:
        burst = await asyncio.gather(*(connect() for _ in range(40)))
        open_ones = {asyncio.create_task(until_closed(streams)) for streams in burst}
        while len(open_ones) > 4:
            done, open_ones = await asyncio.wait(
                open_ones, timeout=DEADLINE_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            assert done, f"{len(open_ones)} connections stay open"
            assert {task.result() for task in done} == {b""}
        for task in open_ones:
            task.cancel()


async def test_a_client_that_does_not_read_gives_way_to_a_new_connection() -> None:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/livez":
            await echo_path(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b" " * 100_000, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async with serving(answer, max_connections=2) as connect:
        for _ in range(2):
            _, writer = await connect()
            writer.write(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")

        async def probe_until_served() -> None:
            # until both answers fill the buffers, both connections are busy
            while True:
                probe = await connect()
                probe[1].write(GET)
                with suppress(ConnectionError, asyncio.IncompleteReadError):
                    if "200 ok" in await head_of(probe):
                        return

        await asyncio.wait_for(probe_until_served(), DEADLINE_SECONDS)


async def test_calls_in_progress_are_kept_and_a_further_connection_is_answered_503() -> None:
    entered, leave = asyncio.Semaphore(0), asyncio.Event()

    async def hang(scope: Any, receive: Any, send: Any) -> None:
        entered.release()
        await leave.wait()
        await echo_path(scope, receive, send)

    async with serving(hang, max_connections=2) as connect:
        busy = [await connect() for _ in range(2)]
        for streams in busy:
            streams[1].write(GET)
            await asyncio.wait_for(entered.acquire(), DEADLINE_SECONDS)
        refused = await until_closed(await connect())
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: " in refused.lower()
        leave.set()
        for streams in busy:
            assert "200 ok" in await head_of(streams)


@pytest.mark.parametrize("length", [b"Content-Length: 1000000", b"Transfer-Encoding: chunked"])
async def test_an_answer_before_the_end_of_the_body_closes_the_connection(length: bytes) -> None:
    async with serving(echo_path) as connect:
        streams = await connect()
        streams[1].write(b"POST /x HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n\r\n")
        assert "connection: close" in await head_of(streams)
        assert await until_closed(streams) == b"/x x"


async def test_a_body_that_was_received_as_a_whole_keeps_the_connection() -> None:
    async with serving(echo_path) as connect:
        streams = await connect()
        for _ in range(2):
            streams[1].write(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            assert "connection: close" not in await head_of(streams)
            assert await within_deadline(streams[0].readexactly(4)) == b"/x x"


async def test_little_is_read_of_a_body_after_its_answer() -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    async with serving(echo_path) as connect:
        streams = await connect()
        streams[1].write(b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        await head_of(streams)

        async def send_200_megabytes() -> None:
            # far more than the buffers of both sockets hold
            for _ in range(3200):
                streams[1].write(chunk)
                await asyncio.wait_for(streams[1].drain(), DEADLINE_SECONDS)

        with pytest.raises(ConnectionError):
            await send_200_megabytes()


async def test_a_length_beside_a_transfer_encoding_is_refused() -> None:
    async with serving(echo_path) as connect:
        streams = await connect()
        streams[1].write(
            b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GET
        )
        answer = await until_closed(streams)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"Transfer-Encoding exclude each other" in answer
        assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"http://host:81/a/b", b"/a/b host:81"),
        (b"HTTPS://host/a%20b?c=http://d", b"/a b host"),
        (b"http://host", b"/ host"),
        (b"/plain/http://x", b"/plain/http://x x"),
    ],
)
async def test_an_absolute_target_means_its_path(target: bytes, expected: bytes) -> None:
    async with serving(echo_path) as connect:
        streams = await connect()
        streams[1].write(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await until_closed(streams)).endswith(b"\r\n\r\n" + expected)


@pytest.mark.parametrize(
    "garbage", [b"GET /x HTTP/1.1\r\nNo colon\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"G" * 100_000]
)
async def test_what_is_not_http_is_a_problem_document(garbage: bytes) -> None:
    async with serving(echo_path) as connect:
        streams = await connect()
        streams[1].write(garbage)
        head = await head_of(streams)
        assert head.startswith("http/1.1 400 ")
        assert "application/problem+json" in head
        assert "cache-control: no-store" in head


async def test_garbage_in_a_body_does_not_reach_the_application_as_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ended = asyncio.Event()

    async def read_all(scope: Any, receive: Any, send: Any) -> None:
        try:
            while (await receive()).get("more_body"):
                pass
            await echo_path(scope, receive, send)
        finally:
            ended.set()

    async with serving(read_all) as connect:
        streams = await connect()
        streams[1].write(
            b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n"
        )
        assert (await until_closed(streams)).startswith(b"HTTP/1.1 400 ")
        await asyncio.wait_for(ended.wait(), DEADLINE_SECONDS)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_client_that_does_not_read_its_answer_is_disconnected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "WRITE_SECONDS", 0.2)
    ended = asyncio.Event()

    async def answer_at_length(scope: Any, receive: Any, send: Any) -> None:
        _ = scope, receive
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b" " * 100_000, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        ended.set()

    async with serving(answer_at_length) as connect:
        _, writer = await connect()
        writer.write(GET)
        await asyncio.wait_for(ended.wait(), DEADLINE_SECONDS)


async def test_idle_connections_do_not_keep_a_probe_from_the_monitoring_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = free_ports(1)[0]
    monkeypatch.setenv("MONITORING_PORT", str(port))
    async with monitored(MonitoringSettings(), "test") as monitor, connecting(port) as connect:
        monitor.ready_when(lambda: None)
        for _ in range(300):
            (await connect())[1].write(HALF_A_HEAD)
        for path in (b"/livez", b"/readyz", b"/metrics"):
            for method in (b"GET", b"HEAD"):
                probe = await connect()
                probe[1].write(method + b" " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
                head = await head_of(probe)
                assert "200 ok" in head
                assert "x-content-type-options: nosniff" in head
                assert "cache-control: no-store" in head


async def test_the_monitoring_pages_do_not_wait_for_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_ports(1)[0]
    monkeypatch.setenv("MONITORING_PORT", str(port))
    async with monitored(MonitoringSettings(), "test"), connecting(port) as connect:
        for method, status in ((b"GET", "200"), (b"POST", "405")):
            streams = await connect()
            streams[1].write(method + b" /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
            head = await head_of(streams)
            assert head.startswith(f"http/1.1 {status} ")
            assert "connection: close" in head
