"""What Slack is sent, and what its answers mean."""

import asyncio
import html
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from pydantic import SecretStr

from assistance.verdict import Done, Later, Unknown, Verdict
from consumers.channels import OutboundMessage
from consumers.channels.http import ANSWER_LIMIT_BYTES
from consumers.channels.slack import Slack, SlackSettings
from tests.support.listeners import Converse, server_that
from tests.support.outbound import outbound_message
from tests.support.third_parties import ThirdParties

SECRET = "services/T000/B000/hush"
TIMEOUT_SECONDS = 0.5


async def send(url: str, sent: OutboundMessage | None = None) -> Verdict:
    slack = Slack(SlackSettings(webhook_url=SecretStr(url)), call_timeout_seconds=TIMEOUT_SECONDS)
    try:
        return await slack.send(sent or outbound_message())
    finally:
        await slack.close()


@asynccontextmanager
async def web_server_that(answer: Converse) -> AsyncIterator[str]:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await answer(reader, writer)

    async with server_that(converse) as port:
        yield f"http://127.0.0.1:{port}/{SECRET}"


async def test_a_message_arrives_with_its_ids(third_parties: ThirdParties) -> None:
    verdict = await send(third_parties.slack_url, outbound_message("<b> & co"))
    assert verdict == Done("200", "ok")
    [received] = third_parties.received("slack")
    assert html.unescape(received["text"]).startswith("New request: sales\n> <b> & co\n")
    assert received["request_id"] == outbound_message().request_id
    assert received["idempotency_key"] == outbound_message().idempotency_key


async def test_an_endless_slow_answer_ends_at_the_deadline() -> None:
    async def drip(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while True:
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with web_server_that(drip) as url:
        verdict = await send(url)
    assert isinstance(verdict, Unknown)
    assert verdict.code == "unexpected_answer"


async def test_an_endless_answer_is_not_read_to_its_end() -> None:
    written = 0

    async def flood(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            written += 65536
            writer.write(b"x" * 65536)
            await writer.drain()

    async with web_server_that(flood) as url:
        verdict = await send(url)
    assert verdict.code == "404"
    # the sockets' own buffers hold a few megabytes; the other 990 are never read
    assert written < 4000 * ANSWER_LIMIT_BYTES


async def test_a_proxy_in_the_environment_is_ignored(
    third_parties: ThirdParties, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert await send(third_parties.slack_url) == Done("200", "ok")


async def test_a_host_that_does_not_exist_is_tried_later() -> None:
    assert isinstance(await send("https://nowhere.invalid/services/x"), Later)
