"""What Slack is sent, and what its answers mean."""

import asyncio
import html
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger
from pydantic import SecretStr, ValidationError

from assistance.verdict import Done, Later, Never, Unknown, Verdict
from consumers.channels import OutboundMessage
from consumers.channels.http import ANSWER_LIMIT_BYTES, read_answer, retry_after_seconds
from consumers.channels.slack import Slack, SlackSettings, escape, judge, payload
from tests.support.listeners import Converse, server_that
from tests.support.third_parties import ThirdParties

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
SECRET = "services/T000/B000/hush"
TIMEOUT_SECONDS = 0.5


def message(
    description: str = "Is it in stock?", *, may_be_repeat: bool = False
) -> OutboundMessage:
    return OutboundMessage(
        request_id="6b1f1a0e-7e0d-4c59-8a55-5a4cbf1e4b60",
        topic="sales",
        description=description,
        idempotency_key="0d8d6d2c-5bb9-4a0e-8b2f-6c1f3e0f9a11",
        created_at=NOW,
        may_be_repeat=may_be_repeat,
    )


def ask(status: int, body: bytes | str, **headers: str) -> Verdict:
    raw = body.encode() if isinstance(body, str) else body
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return judge(read_answer(status, httpx.Headers(named), raw, secrets=[SECRET], now=NOW))


async def send(url: str, sent: OutboundMessage | None = None) -> Verdict:
    slack = Slack(SlackSettings(webhook_url=SecretStr(url)), call_timeout_seconds=TIMEOUT_SECONDS)
    try:
        return await slack.send(sent or message())
    finally:
        await slack.close()


@asynccontextmanager
async def web_server_that(answer: Converse) -> AsyncIterator[str]:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await answer(reader, writer)

    async with server_that(converse) as port:
        yield f"http://127.0.0.1:{port}/{SECRET}"


@given(st.text(max_size=500))
def test_no_text_holds_anything_that_slack_would_act_on(text: str) -> None:
    escaped = escape(text)
    assert not re.search(r"[<>]", escaped)
    assert not re.search(r"&(?!(amp|lt|gt);)", escaped)
    assert not re.search(r"(?<!\w)@(channel|here|everyone|group)\b", escaped, re.IGNORECASE)


@given(st.text(max_size=500))
def test_people_read_in_slack_what_was_written(text: str) -> None:
    shown = escape(text).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert shown.replace("@\u2060", "@") == text.replace("@\u2060", "@")


@pytest.mark.parametrize(
    "shout", ["<!here>", "<!channel|all>", "<@U012AB3CD>", "<!subteam^S1>", "@channel", "@Everyone"]
)
def test_a_mention_in_a_description_calls_nobody(shout: str) -> None:
    sent = payload(message(f"please {shout} look"))
    assert shout not in sent["text"]
    assert (sent["link_names"], sent["parse"], sent["mrkdwn"]) == (False, "none", False)


def test_an_address_stays_as_it_was_written() -> None:
    assert escape("write to bob@here.example or eve@channel.example") == (
        "write to bob@here.example or eve@channel.example"
    )


def test_a_text_beyond_all_reason_is_cut() -> None:
    assert len(escape("x" * 100_000)) == 3000


def test_a_repeat_says_that_it_may_be_one() -> None:
    assert "may be a repeat" in payload(message(may_be_repeat=True))["text"]
    assert "may be a repeat" not in payload(message())["text"]


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, "ok", Done),
        (200, '{"ok":true}', Done),
        (200, '{"ok":false,"error":"ratelimited"}', Later),
        (200, '{"ok":false,"error":"internal_error"}', Later),
        (200, '{"ok":false,"error":"a_word_of_next_year"}', Later),
        (200, '{"ok":false}', Later),
        (200, '{"ok":false,"error":"invalid_auth"}', Later),
        (200, '{"ok":false,"error":"token_revoked"}', Later),
        (200, '{"ok":false,"error":"channel_not_found"}', Later),
        (200, '{"ok":false,"error":"no_service"}', Later),
        (200, '{"ok":false,"error":"msg_too_long"}', Never),
        (200, '{"ok":false,"error":"no_text"}', Never),
        (200, "<html>log in to the hotel's network</html>", Unknown),
        (200, "", Unknown),
        (204, "", Unknown),
        (302, "", Later),
        (400, "invalid_payload", Never),
        (400, "", Never),
        (400, "invalid_token", Later),
        (401, "", Later),
        (403, "action_prohibited", Later),
        (403, "invalid_token", Later),
        (404, "no_service", Later),
        (404, "", Later),
        (410, "channel_is_archived", Later),
        (410, "", Later),
        (413, "", Never),
        (408, "", Later),
        (425, "", Later),
        (429, "", Later),
        (500, "rollup_error", Later),
        (503, "", Later),
    ],
)
def test_every_answer_has_one_meaning(status: int, body: str, expected: type) -> None:
    assert type(ask(status, body)) is expected


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (404, "no_service", "no_service"),
        (404, "<html>her name</html>", "404"),
        (410, "", "410"),
        (200, '{"ok":false,"error":"token_revoked"}', "token_revoked"),
    ],
)
def test_a_webhook_that_is_no_good_is_named_in_the_log(status: int, body: str, code: str) -> None:
    logged: list[str] = []
    sink = logger.add(
        lambda line: logged.append(str(line)), level="ERROR", format="{message} {extra}"
    )
    try:
        verdict = ask(status, body)
    finally:
        logger.remove(sink)
    assert verdict.code == code
    [line] = logged
    assert line == f"slack.misconfigured {{'code': '{code}'}}\n"


def test_a_code_is_a_word_of_slack_and_nobody_elses() -> None:
    verdict = ask(200, '{"ok":false,"error":"What she wrote to us"}')
    assert verdict.code == "ok_false"


def test_the_wait_that_slack_asks_for_is_kept() -> None:
    assert ask(429, "", Retry_After="30") == Later("429", "", 30.0)
    assert ask(503, "", Retry_After="Mon, 23 Nov 2026 12:01:30 GMT") == Later("503", "", 90.0)
    assert ask(200, '{"ok":false,"error":"ratelimited"}', Retry_After="7") == Later(
        "ratelimited", '{"ok":false,"error":"ratelimited"}', 7.0
    )


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("soon", None),
        ("-1", None),
        ("1.5", None),
        ("", None),
        ("0", 0.0),
        ("120", 120.0),
        ("Mon, 23 Nov 2026 11:00:00 GMT", 0.0),
        ("Mon, 99 Nov 2026 11:00:00 GMT", None),
        ("Mon, 23 Nov 2026 12:00:00 +99999999999", None),
    ],
)
def test_a_senseless_wait_counts_as_none(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(value, NOW) == seconds


@given(st.integers(100, 999), st.binary(max_size=200), st.text(max_size=40))
def test_no_answer_whatsoever_is_without_a_meaning(status: int, body: bytes, wait: str) -> None:
    answer = read_answer(status, {"Retry-After": wait}, body, secrets=[SECRET], now=NOW)
    verdict = judge(answer)
    assert isinstance(verdict, Done | Later | Never | Unknown)


@given(st.recursive(st.none() | st.booleans() | st.text(max_size=20), st.lists, max_leaves=5))
def test_no_json_whatsoever_is_without_a_meaning(said: Any) -> None:
    ask(200, orjson.dumps({"ok": said, "error": said}, option=orjson.OPT_PASSTHROUGH_DATETIME))


def test_the_secret_is_not_in_what_is_kept_of_an_answer() -> None:
    verdict = ask(404, f"nothing at /{SECRET} here")
    assert SECRET not in verdict.excerpt
    assert verdict.excerpt == "nothing at /… here"


def test_an_answer_is_kept_short_and_on_one_line() -> None:
    verdict = ask(500, "oh\nno " * 500)
    assert len(verdict.excerpt) == 200
    assert "\n" not in verdict.excerpt


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.slack.com/services/hush",
        "ftp://x/hush",
        "https://",
        "::",
        "http://hooks.slack.com/services/hush",
    ],
)
def test_a_webhook_that_is_no_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValidationError) as refused:
        SlackSettings(webhook_url=SecretStr(url))
    assert "https://" in str(refused.value)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "WEBHOOK_URL is missing, or TOKEN and CHANNEL"),
        ({"token": "xoxb-hush"}, "TOKEN and CHANNEL go together"),
        ({"channel": "C012"}, "TOKEN and CHANNEL go together"),
        (
            {"token": "xoxb-hush", "channel": "C012", "webhook_url": "https://x.example/hush"},
            "give one of them",
        ),
        ({"token": "xoxb hush\n", "channel": "C012"}, "no token"),
        ({"token": "xoxb-hush", "channel": "C012", "api_url": "http://x.example/"}, "https://"),
    ],
)
def test_slack_is_reached_in_exactly_one_way(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named) as refused:
        SlackSettings(**given)
    assert "hush" not in str(refused.value)


async def test_a_message_arrives_with_its_ids(third_parties: ThirdParties) -> None:
    verdict = await send(third_parties.slack_url, message("<b> & co"))
    assert verdict == Done("200", "ok")
    [received] = third_parties.received("slack")
    assert html.unescape(received["text"]).startswith("New request: sales\n<b> & co\n")
    assert received["request_id"] == message().request_id
    assert received["idempotency_key"] == message().idempotency_key


async def test_an_answer_that_drips_for_ever_ends_at_the_deadline() -> None:
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
    # the sockets' own buffers hold a few megabytes; nobody asks for the other 990
    assert written < 4000 * ANSWER_LIMIT_BYTES


async def test_a_proxy_in_the_environment_is_ignored(
    third_parties: ThirdParties, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert await send(third_parties.slack_url) == Done("200", "ok")


async def test_a_host_that_does_not_exist_is_tried_later() -> None:
    assert isinstance(await send("https://nowhere.invalid/services/x"), Later)
