"""A connection is made to whichever node answers, also when others are frozen, dead or refusing."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import pytest

from runtime.rabbit import ATTEMPT_SECONDS, CLOSE_SECONDS, BrokerGone, BrokerRefused, connect
from sandbox.ports import free_ports
from tests.support.links import Link, Mode


@contextmanager
def silent_listener(host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A frozen node: its kernel accepts connections, and nothing ever answers."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(64)
        yield listener.getsockname()[1]


async def connected_to(urls: str) -> float:
    """How long it took to connect and to have a channel."""
    began_at = monotonic()
    connection = await connect(urls, name="test", heartbeat_seconds=5)
    try:
        await (await connection.open_channel()).close()
        return monotonic() - began_at
    finally:
        await connection.close()


async def test_nodes_that_do_not_answer_are_left_for_the_next(rabbitmq_url: str) -> None:
    def at(port: int) -> str:
        parts = urlsplit(rabbitmq_url)
        netloc = f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{port}"
        return parts._replace(netloc=netloc).geturl()

    with silent_listener() as frozen, silent_listener() as frozen_too:
        [dead] = free_ports(1)
        urls = ",".join([at(frozen), at(dead), rabbitmq_url, at(frozen_too)])
        # in random order, hence side by side: one of them is nearly always behind a frozen node
        seconds = await asyncio.gather(*(connected_to(urls) for _ in range(8)))
    assert max(seconds) < 2 * ATTEMPT_SECONDS + 2


async def test_a_name_with_several_addresses(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = urlsplit(rabbitmq_url)
    assert parts.port is not None
    hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
    looked_up = socket.getaddrinfo

    def look_up(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        if host != "broker.test":
            return looked_up(host, port, *rest, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    netloc = f"{parts.netloc.rpartition('@')[0]}@broker.test:{parts.port}"
    with ExitStack() as frozen:
        for host in hosts[:2]:
            frozen.enter_context(silent_listener(host, parts.port))
        url = parts._replace(netloc=netloc).geturl()
        seconds = await asyncio.gather(*(connected_to(url) for _ in range(6)))
    assert max(seconds) < 2 * ATTEMPT_SECONDS + 2


async def test_no_node_that_answers() -> None:
    with silent_listener() as frozen:
        began_at = monotonic()
        with pytest.raises(BrokerGone):
            await connect(f"amqp://u:p@127.0.0.1:{frozen}/", name="test", heartbeat_seconds=5)
        assert monotonic() - began_at < ATTEMPT_SECONDS + 2


async def test_a_wrong_password_is_reported_although_another_node_is_away(
    rabbitmq_url: str,
) -> None:
    address = urlsplit(rabbitmq_url).netloc.rpartition("@")[2]
    [dead] = free_ports(1)
    urls = f"amqp://nobody:wrong@{address}/,amqp://nobody:wrong@127.0.0.1:{dead}/"
    with pytest.raises(BrokerRefused):
        await connect(urls, name="test", heartbeat_seconds=5)


async def test_a_connection_that_cannot_be_closed_in_order_is_aborted(rabbitmq_url: str) -> None:
    """Otherwise it would go on with its heartbeats, and the broker with its exclusive queues."""
    address = urlsplit(rabbitmq_url)
    with Link("127.0.0.1", address.port or 0) as link:
        connection = await connect(link.url(rabbitmq_url), name="test", heartbeat_seconds=60)
        link.switch(Mode.SILENT)
        began_at = monotonic()
        await connection.close()
        await asyncio.wait_for(connection.closed, 1)
        assert monotonic() - began_at < CLOSE_SECONDS + 2
