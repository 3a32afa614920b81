"""The verdict on each behaviour of a third party, for every channel over HTTP."""

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from assistance.verdict import Later, Verdict
from consumers.channels import slack, webhook
from consumers.channels.answers import Meaning, Row, meaning_of
from consumers.channels.slack import Slack, SlackSettings
from consumers.channels.webhook import Webhook, WebhookSettings
from sandbox.ports import free_ports
from tests.support.listeners import make_certificate, server_that, tls_of
from tests.support.outbound import SIGNING_SECRET, outbound_message
from tests.support.processes import bare_environment
from tests.support.third_parties import ThirdParties

TIMEOUT_SECONDS = 1.0
TOKEN = "xoxb-Hush1234Hush"

MESSAGE = outbound_message("Is it in stock, asks Ms Private?")


def slack_by_webhook(url: str) -> Slack | Webhook:
    table: dict[str, Any] = {"webhook_url": url}
    return Slack(SlackSettings(**table), call_timeout_seconds=TIMEOUT_SECONDS)


def slack_by_token(url: str) -> Slack | Webhook:
    table: dict[str, Any] = {"token": TOKEN, "channel": "C012", "api_url": url}
    return Slack(SlackSettings(**table), call_timeout_seconds=TIMEOUT_SECONDS)


def signed_webhook(url: str) -> Slack | Webhook:
    table: dict[str, Any] = {
        "url": url,
        "signing_secrets": SIGNING_SECRET,
        "allowed_networks": "127.0.0.0/8",
    }
    return Webhook(WebhookSettings(**table), call_timeout_seconds=TIMEOUT_SECONDS)


Way = Callable[[str], Slack | Webhook]

WAYS: dict[Way, str] = {
    slack_by_webhook: "slack",
    slack_by_token: "slack",
    signed_webhook: "webhook",
}

every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)

#: What the third party does, and what Slack's channel and the webhook's make of it.
CONDUCTS: list[tuple[dict[str, Any], str, str]] = [
    ({"mode": "refuse"}, "later connect_error", "later connect_error"),
    ({"mode": "reset"}, "unknown read_error", "unknown read_error"),
    ({"mode": "accept_then_fail"}, "unknown read_error", "unknown read_error"),
    ({"mode": "hang"}, "unknown no_answer_in_time", "unknown no_answer_in_time"),
    ({"mode": "slow", "delay_seconds": 0.1}, "done 200", "done 204"),
    ({"code": 301}, "later 301, about us", "later 301, about us"),
    ({"code": 307}, "later 307, about us", "later 307, about us"),
    ({"code": 400}, "never 400", "never 400"),
    ({"code": 401}, "later 401, about us", "later 401, about us"),
    ({"code": 403}, "later 403, about us", "later 403, about us"),
    ({"code": 404}, "later 404, about us", "later 404, about us"),
    ({"code": 410}, "later 410, about us", "later 410, about us, disables"),
    ({"code": 413}, "never 413", "never 413"),
    ({"code": 429}, "later 429", "later 429"),
    ({"code": 429, "retry_after": 7}, "later 429 after 7 s", "later 429 after 7 s"),
    ({"code": 429, "retry_after": "soon"}, "later 429", "later 429"),
    ({"code": 500}, "later 500", "later 500"),
    ({"code": 502}, "later 502", "later 502"),
    ({"code": 503, "retry_after": 120}, "later 503 after 120 s", "later 503 after 120 s"),
    ({"code": 504}, "later 504", "later 504"),
]

FAILURE = b'{"ok":false,"error":"account_inactive"}'

#: The whole answer, as it goes over the wire, and what the two make of it.
ANSWERS: list[tuple[bytes, str, str]] = [
    (
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(FAILURE), FAILURE),
        "later account_inactive, about us",
        "done 200",
    ),
    (
        b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + b"ok " * 1_000_000,
        "unknown unexpected_answer",
        "done 200",
    ),
    (
        b"HTTP/1.1 503 Wait\r\nContent-Length: 100\r\n\r\ncut off in its body",
        "later 503",
        "later 503",
    ),
    (
        b"HTTP/1.1 200 OK\r\nCut-off-in-its-head: 1",
        "unknown remote_protocol_error",
        "unknown remote_protocol_error",
    ),
    (
        b"220 no.http.example.org ESMTP\r\n",
        "unknown remote_protocol_error",
        "unknown remote_protocol_error",
    ),
]


def said(status: int, text: bytes = b"", *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 %d Said" % status, b"Content-Length: %d" % len(text), *headers]
    return b"\r\n".join([*lines, b"", text])


#: What takes the place of an answer.
CLOSED, UNTRUSTED, LOST, SILENT, NO_NAME, PRIVATE = (
    "closed",
    "untrusted",
    "lost",
    "silent",
    "-",
    "p",
)

#: For each row of a table: the way to the third party (None: all), and what it answers.
Example = tuple[Way | None, bytes | str]
SLACK_EXAMPLES: dict[tuple[str, str], list[Example]] = {
    ("connecting", "no connection, or nothing sent in time"): [(None, CLOSED), (None, NO_NAME)],
    ("connecting", "the certificate is not trusted, or TLS fails"): [(None, UNTRUSTED)],
    ("sent", "2xx `ok`, or JSON with `ok` or `success` true"): [
        (None, said(200, b"ok")),
        (None, said(200, b'{"ok": true}')),
        (None, said(200, b'{"success": true}')),
    ],
    ("sent", "2xx without a text, from a webhook"): [
        (slack_by_webhook, said(200)),
        (slack_by_webhook, said(204)),
        (slack_by_webhook, said(200, b" \n")),
    ],
    ("sent", "2xx without a text, from chat.postMessage"): [
        (slack_by_token, said(200)),
        (slack_by_token, said(204)),
    ],
    ("sent", "2xx with any other text"): [
        (None, said(200, b"<html>Log in to the network of the hotel</html>")),
        (None, said(200, b"[]")),
        (None, said(200, b"ok?")),
    ],
    ("sent", "2xx `ok: false`, a word about the message"): [
        (None, said(200, b'{"ok": false, "error": "msg_too_long"}')),
    ],
    ("sent", "2xx `ok: false`, a word about the token or the channel"): [
        (None, said(200, b'{"ok": false, "error": "token_revoked"}')),
        (None, said(200, b'{"ok": false, "error": "channel_not_found"}')),
    ],
    ("sent", "2xx `ok: false`, any other word, such as `ratelimited`"): [
        (None, said(200, b'{"ok": false, "error": "ratelimited"}', b"Retry-After: 30")),
        (None, said(200, b'{"ok": false, "error": "a_word_of_next_year"}')),
        (None, said(200, b'{"ok": false}')),
    ],
    ("sent", "400, 413, 422"): [
        (None, said(400, b"invalid_payload")),
        (None, said(413)),
        (None, said(422)),
    ],
    ("sent", "400, 413, 422 with a word about the token or the channel"): [
        (None, said(400, b"invalid_token")),
        (None, said(422, b"no_service")),
    ],
    ("sent", "408, 425, 429, 5xx"): [
        (None, said(status)) for status in (408, 425, 429, 500, 502, 503, 504, 599)
    ],
    ("sent", "any other status: 401, 403, 404, 410, a redirect"): [
        (None, said(status)) for status in (301, 307, 401, 402, 403, 404, 405, 410, 415, 451)
    ],
    ("sent", "no answer"): [(None, LOST), (None, SILENT), (None, b"220 mail.example ESMTP\r\n")],
}
WEBHOOK_EXAMPLES: dict[tuple[str, str], list[Example]] = {
    ("connecting", "no connection, or nothing sent in time"): [(None, CLOSED)],
    ("connecting", "the host name cannot be resolved"): [(None, NO_NAME)],
    ("connecting", "the certificate is not trusted, or TLS fails"): [(None, UNTRUSTED)],
    ("connecting", "an address that is not public"): [(None, PRIVATE)],
    ("sent", "2xx, whatever its text"): [
        (None, said(200, b"no")),
        (None, said(204)),
        (None, said(200, b'{"ok": false}')),
    ],
    ("sent", "400, 413, 422"): [(None, said(status)) for status in (400, 413, 422)],
    ("sent", "408, 425, 429, 5xx"): [
        (None, said(status)) for status in (408, 425, 429, 500, 502, 503, 504, 599)
    ],
    ("sent", "410"): [(None, said(410))],
    ("sent", "any other status: 401, 404, a redirect"): [
        (None, said(status)) for status in (301, 307, 401, 402, 403, 404, 405, 415, 451)
    ],
    ("sent", "no answer"): [(None, LOST), (None, SILENT), (None, b"220 mail.example ESMTP\r\n")],
}
TABLES = [
    *((row, SLACK_EXAMPLES, way) for row in slack.ANSWERS for way in WAYS if WAYS[way] == "slack"),
    *((row, WEBHOOK_EXAMPLES, signed_webhook) for row in webhook.ANSWERS),
]


@pytest.mark.parametrize(
    ("row", "examples", "way"),
    TABLES,
    ids=[f"{way.__name__}: {row.moment}: {row.answer}" for row, _, way in TABLES],
)
async def test_every_answer_means_what_the_table_says(
    row: Row, examples: Any, way: Way, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    sink = logger.add(lambda line: logged.append(str(line)), format="{message}")
    for only_way, answer in examples[row.moment, row.answer]:
        if only_way in (None, way):
            async with third_party_that_answers(answer, certificate, monkeypatch) as url:
                verdict = await send(way(url))
            assert meaning_of(verdict) is row.meaning, (answer, verdict)
            is_logged = any("misconfigured" in line for line in logged)
            assert is_logged == (row.meaning is Meaning.US)
    logger.remove(sink)


def test_every_row_of_the_tables_has_an_example() -> None:
    assert set(SLACK_EXAMPLES) == {(row.moment, row.answer) for row in slack.ANSWERS}
    assert set(WEBHOOK_EXAMPLES) == {(row.moment, row.answer) for row in webhook.ANSWERS}


@asynccontextmanager
async def third_party_that_answers(
    answer: bytes | str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[str]:
    """The URL of one."""
    if answer == CLOSED:
        yield f"http://127.0.0.1:{free_ports(1)[0]}/in"
    elif answer == NO_NAME:
        yield "https://nowhere.invalid/in"
    elif answer == PRIVATE:

        async def lead_inside(_host: str, port: int, **_: Any) -> list[Any]:
            return [(0, 0, 0, "", ("10.0.0.1", port))]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lead_inside)
        yield "https://hooks.example.test/in"
    elif answer == UNTRUSTED:
        async with web_server_that_says(said(200, b"ok"), tls_of(certificate)) as port:
            yield f"https://127.0.0.1:{port}/in"
    else:
        async with web_server_that_says(answer) as port:
            yield f"http://127.0.0.1:{port}/in"


def url_of(way: Way, third_parties: ThirdParties) -> str:
    urls: dict[Way, str] = {
        slack_by_webhook: third_parties.slack_url,
        slack_by_token: third_parties.slack_api_url,
        signed_webhook: third_parties.webhooks_url + "desk",
    }
    return urls[way]


def described(verdict: Verdict) -> str:
    words = [type(verdict).__name__.lower(), verdict.code]
    if isinstance(verdict, Later) and verdict.retry_after_seconds is not None:
        words.append(f"after {verdict.retry_after_seconds:g} s")
    disables = isinstance(verdict, Later) and verdict.disables
    about_us = isinstance(verdict, Later) and verdict.about_us
    return " ".join(words) + (", about us" if about_us else "") + (", disables" if disables else "")


async def send(channel: Slack | Webhook) -> Verdict:
    try:
        return await channel.send(MESSAGE)
    finally:
        await channel.close()


@every_way
async def test_every_conduct_has_one_meaning(third_parties: ThirdParties, way: Way) -> None:
    channel, kind = way(url_of(way, third_parties)), WAYS[way]
    meanings = []
    for conduct, *_ in CONDUCTS:
        third_parties.misbehave(kind, **{"mode": "status", **conduct})
        meanings.append((conduct, described(await channel.send(MESSAGE))))
    await channel.close()

    assert meanings == [
        (conduct, by_slack if kind == "slack" else by_webhook)
        for conduct, by_slack, by_webhook in CONDUCTS
    ]
    # none was called twice, and the one that refused not at all
    assert len(third_parties.calls(kind)) == len(CONDUCTS) - 1


@every_way
async def test_every_odd_answer_has_one_meaning(way: Way) -> None:
    for answer, by_slack, by_webhook in ANSWERS:
        async with web_server_that_says(answer) as port:
            verdict = await send(way(f"http://127.0.0.1:{port}/in"))
        assert described(verdict) == (by_slack if WAYS[way] == "slack" else by_webhook)
        assert len(verdict.excerpt) <= 200


@every_way
async def test_a_wait_until_a_date_is_kept(third_parties: ThirdParties, way: Way) -> None:
    moment = format_datetime(datetime.now(UTC) + timedelta(minutes=10), usegmt=True)
    third_parties.misbehave(WAYS[way], "status", code=429, retry_after=moment)
    verdict = await send(way(url_of(way, third_parties)))
    assert isinstance(verdict, Later)
    assert verdict.retry_after_seconds is not None
    assert 500 < verdict.retry_after_seconds <= 600


@every_way
async def test_a_server_that_cannot_be_trusted_is_sent_nothing(way: Way, certificate: Path) -> None:
    """Its certificate is self-signed, or it has none."""

    async def greet(_reader: Any, writer: Any) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nok")
        await writer.drain()

    for tls in (tls_of(certificate), None):
        async with server_that(greet, tls) as port:
            verdict = await send(way(f"https://127.0.0.1:{port}/in"))
        assert described(verdict) == "later tls_failed, about us"


@every_way
async def test_a_redirect_is_not_followed(way: Way) -> None:
    visits = 0

    async def redirect(reader: Any, writer: Any) -> None:
        nonlocal visits
        visits += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 307 Moved\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async with server_that(redirect) as port:
        assert described(await send(way(f"http://127.0.0.1:{port}/in"))) == "later 307, about us"
    assert visits == 1


async def test_a_cookie_of_one_answer_is_not_sent_with_another_call() -> None:
    heads: list[bytes] = []

    async def set_a_cookie(reader: Any, writer: Any) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b; Path=/\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()

    async with server_that(set_a_cookie) as port:
        channel = signed_webhook(f"http://127.0.0.1:{port}/in")
        assert [described(await channel.send(MESSAGE)) for _ in range(2)] == ["done 200"] * 2
        await channel.close()
    assert [b"cookie" in head.lower() for head in heads] == [False, False]


async def test_slack_receives_the_token_and_the_channel(third_parties: ThirdParties) -> None:
    verdict = await send(slack_by_token(third_parties.slack_api_url))
    assert described(verdict) == "done 200"
    [received] = third_parties.received("slack")
    assert received["payload"]["channel"] == "C012"
    assert received["text"].startswith("New request: sales\n")
    assert received["idempotency_key"] == MESSAGE.idempotency_key

    third_parties.misbehave("slack", "ok_false", error="invalid_auth")
    assert (
        described(await send(slack_by_token(third_parties.slack_api_url)))
        == "later invalid_auth, about us"
    )
    third_parties.misbehave("slack", "ok_false", error="msg_too_long")
    assert (
        described(await send(slack_by_token(third_parties.slack_api_url))) == "never msg_too_long"
    )


LOG_ALL_THAT_THERE_IS = """
import asyncio, logging, sys
from runtime.logs import set_up_logs
from tests.delivery.test_http_channels import send, signed_webhook, slack_by_token, slack_by_webhook

slack_url, api_url, webhook_url, closed_url = sys.argv[1:]

async def send_in_every_way():
    for channel in (
        slack_by_webhook(slack_url),
        slack_by_token(api_url),
        signed_webhook(webhook_url),
        slack_by_webhook(closed_url),
    ):
        print(await send(channel), file=sys.stderr)

set_up_logs("worker-slack", level="DEBUG", format="json")
asyncio.run(send_in_every_way())
print("=== PLANTED ===", file=sys.stderr)
logging.getLogger("httpx").setLevel("INFO")
asyncio.run(send_in_every_way())
"""


def test_no_secret_and_no_personal_text_is_logged_at_any_level(third_parties: ThirdParties) -> None:
    """httpx would log a Slack webhook's whole URL at INFO, which the end of the run plants."""
    # an answer may repeat what was sent
    third_parties.misbehave("slack", "status", code=404, body="nothing for xoxb-Hush1234Hush")
    third_parties.misbehave("webhook", "status", code=404, body="no HushHush1234?key=Hush4321Hush")
    ended = subprocess.run(
        [
            *(sys.executable, "-c", LOG_ALL_THAT_THERE_IS),
            third_parties.slack_url.replace("sandbox", "Hush1234Hush"),
            third_parties.slack_api_url,
            third_parties.webhooks_url + "HushHush1234?key=Hush4321Hush",
            "http://127.0.0.1:1/services/T0/B0/Hush1234Hush",
        ],
        env=bare_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    logged, _, planted = ended.stderr.partition("=== PLANTED ===")
    assert "slack.misconfigured" in logged
    assert "webhook.misconfigured" in logged
    for secret in ("Hush", SIGNING_SECRET, "Ms Private"):
        assert secret not in logged
    assert "Hush1234Hush" in planted


@asynccontextmanager
async def web_server_that_says(answer: bytes | str, tls: Any = None) -> AsyncIterator[int]:
    async def converse(reader: Any, writer: Any) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        await reader.readexactly(int(length[1]) if length else 0)
        if answer == SILENT:
            await asyncio.Event().wait()
        if isinstance(answer, bytes):
            writer.write(answer)
            await writer.drain()

    async with server_that(converse, tls) as port:
        yield port


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("certificate"), "IP:127.0.0.1")
