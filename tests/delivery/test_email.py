"""What the mail server is sent, and what its replies mean."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from bson import BSON
from loguru import logger
from pydantic import SecretStr

from assistance.verdict import Done, Later, Never, Unknown, Verdict
from consumers.channels import OutboundMessage
from consumers.channels.answers import Meaning, Row, meaning_of
from consumers.channels.email import ANSWERS, Email, EmailSettings, Tls
from sandbox.ports import free_ports
from tests.support.listeners import make_certificate, server_that, tls_of
from tests.support.outbound import email_settings, outbound_message
from tests.support.third_parties import ThirdParties

TIMEOUT_SECONDS = 1.0

mail_message = partial(outbound_message, topic="pricing")


async def send(table: EmailSettings, sent: OutboundMessage | None = None) -> Verdict:
    return await Email(table, call_timeout_seconds=TIMEOUT_SECONDS).send(sent or mail_message())


def sandbox(third_parties: ThirdParties) -> EmailSettings:
    return email_settings(third_parties.smtp_host, third_parties.smtp_port)


@asynccontextmanager
async def mail_server_that(replies: Callable[[str], str]) -> AsyncIterator[int]:
    """A mail server that gives these replies to the lines that it is sent."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 here\r\n")
        while line := await reader.readline():
            writer.write(f"{replies(line.decode().strip())}\r\n".encode())

    async with server_that(converse) as port:
        yield port


async def test_a_mail_arrives_at_every_recipient(third_parties: ThirdParties) -> None:
    assert isinstance(await send(sandbox(third_parties)), Done)
    [received] = third_parties.received("email")
    assert received["envelope_to"] == ["pricing@example.org", "boss@example.org"]
    assert received["subject"] == "[pricing] Is it in stock?"
    assert received["request_id"] == mail_message().request_id
    assert received["message_id"] == f"<{mail_message().idempotency_key}@example.org>"


async def test_a_reply_that_is_not_utf8_can_be_stored() -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 here\r\n")
        while line := (await reader.readline()).strip():
            writer.write(b"354 go on\r\n" if line == b"DATA" else b"250 ok\r\n")
            if line == b"DATA":
                await reader.readuntil(b"\r\n.\r\n")
                writer.write("250 angenommen für später\r\n".encode("latin-1"))

    async with server_that(converse) as port:
        verdict = await send(email_settings("127.0.0.1", port))
    assert isinstance(verdict, Done)
    assert BSON.encode({"excerpt": verdict.excerpt})
    assert verdict.excerpt == "angenommen f?r sp?ter"


@pytest.mark.parametrize("stage", ["connect", "MAIL", "RCPT", "DATA"])
async def test_a_4xx_reply_is_tried_later(third_parties: ThirdParties, stage: str) -> None:
    third_parties.misbehave("email", "status", code=451, stage=stage)
    verdict = await send(sandbox(third_parties))
    assert isinstance(verdict, Later)
    assert verdict.code == "451"


@pytest.mark.parametrize("stage", ["connect", "MAIL", "RCPT"])
async def test_a_5xx_reply_before_the_message_is_about_us(
    third_parties: ThirdParties, stage: str
) -> None:
    third_parties.misbehave("email", "status", code=554, body="no such user", stage=stage)
    verdict = await send(sandbox(third_parties))
    assert meaning_of(verdict) is Meaning.US
    assert verdict.code == "554"
    assert verdict.excerpt.endswith("no such user")


async def test_a_5xx_reply_to_the_message_is_final(third_parties: ThirdParties) -> None:
    third_parties.misbehave("email", "status", code=554, body="looks like spam")
    assert await send(sandbox(third_parties)) == Never("554", "looks like spam")


async def test_a_server_that_shuts_down_is_tried_later(third_parties: ThirdParties) -> None:
    third_parties.misbehave("email", "status", code=421)
    assert await send(sandbox(third_parties)) == Later("421", "on request")


@pytest.mark.parametrize("stage", ["connect", "MAIL", "RCPT"])
@pytest.mark.parametrize("mode", ["reset", "hang"])
async def test_a_server_that_is_lost_before_the_message_is_tried_later(
    third_parties: ThirdParties, mode: str, stage: str
) -> None:
    third_parties.misbehave("email", mode, stage=stage)
    assert isinstance(await send(sandbox(third_parties)), Later)


@pytest.mark.parametrize("mode", ["reset", "hang", "accept_then_fail"])
async def test_a_server_that_is_lost_after_the_message_is_unknown(
    third_parties: ThirdParties, mode: str
) -> None:
    third_parties.misbehave("email", mode)
    assert isinstance(await send(sandbox(third_parties)), Unknown)


async def test_a_server_that_refuses_the_connection_is_tried_later(
    third_parties: ThirdParties,
) -> None:
    third_parties.misbehave("email", "refuse")
    verdict = await send(sandbox(third_parties))
    assert (verdict.code, meaning_of(verdict)) == ("connect_connection_lost", Meaning.MOMENT)
    assert "refused" in verdict.excerpt.lower()


async def test_a_server_without_starttls_is_about_us(
    third_parties: ThirdParties,
) -> None:
    table = email_settings(third_parties.smtp_host, third_parties.smtp_port, smtp_tls="starttls")
    verdict = await send(table)
    assert isinstance(verdict, Later)
    assert verdict.code == "login_impossible"


async def test_a_server_that_requires_a_login_is_about_us() -> None:
    def wants_login(line: str) -> str:
        return "250 hello" if line.startswith("EHLO") else "530 5.7.0 log in first"

    async with mail_server_that(wants_login) as port:
        verdict = await send(email_settings("127.0.0.1", port))
    assert verdict == Later("530", "5.7.0 log in first", about_us=True)


async def test_a_reply_that_is_not_smtp_is_tried_later_before_the_message_was_sent() -> None:
    async with mail_server_that(lambda _line: "what?") as port:
        assert isinstance(await send(email_settings("127.0.0.1", port)), Later)


class Scripted:
    """A mail server with a script: TLS where it has a certificate, and any reply to any command."""

    REPLIES: ClassVar = {
        "greeting": "220 here",
        "EHLO": "250-here\r\n250-STARTTLS\r\n250 AUTH PLAIN",
        "STARTTLS": "220 go ahead",
        "AUTH": "235 welcome",
        "MAIL": "250 ok",
        "RCPT": "250 ok",
        "DATA": "354 go on",
        "message": "250 taken",
    }

    def __init__(self, certificate: Path, replies: Mapping[str, str]) -> None:
        self._certificate = certificate
        self._replies = {**self.REPLIES, **replies}
        self.heard: list[str] = []
        self.lines: list[str] = []

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._say("greeting", writer)
        while line := (await reader.readline()).decode().split():
            self.heard.append(line[0])
            self.lines.append(" ".join(line))
            is_second = line[0] == "RCPT" and self.heard.count("RCPT") > 1
            await self._say("second RCPT" if is_second else line[0], writer)
            if line[0] == "STARTTLS" and self._replies["STARTTLS"].startswith("220"):
                await writer.start_tls(tls_of(self._certificate))
            if line[0] == "DATA" and self._replies["DATA"].startswith("354"):
                if self._replies["message"] == DROPPED:
                    await reader.readuntil(b"Subject:")
                    return
                await reader.readuntil(b"\r\n.\r\n")
                await self._say("message", writer)

    async def _say(self, moment: str, writer: asyncio.StreamWriter) -> None:
        reply = self._replies.get(moment) or self._replies["RCPT"]
        if reply == DROPPED:
            raise ConnectionResetError
        if reply == SILENT:
            await asyncio.Event().wait()
        writer.write(reply.encode() + b"\r\n")
        await writer.drain()


SILENT = "(silent)"
DROPPED = "(dropped)"

#: For each row of the table: what the server does differently from a good one, the verdict's code,
#: and the last command that the server heard.
EXAMPLES: dict[tuple[str, str], list[tuple[dict[str, str], str, str | None]]] = {
    ("connecting", "no connection, or no greeting in time"): [
        ({"greeting": DROPPED}, "connect_connection_lost", None),
        ({"greeting": SILENT}, "connect_timeout", None),
        ({"port": "closed"}, "connect_connection_lost", None),
    ],
    ("connecting", "the host name cannot be resolved"): [
        ({"host": "nowhere.invalid"}, "connect_connection_lost", None),
    ],
    ("greeting", "4xx, or not SMTP"): [
        ({"greeting": "421 too busy"}, "421", None),
        ({"greeting": "451 try again"}, "451", None),
        ({"greeting": "HTTP/1.1 400 Bad Request"}, "unexpected_reply", None),
    ],
    ("greeting", "5xx"): [
        ({"greeting": "554 your address is blocked"}, "554", None),
        ({"greeting": "521 no mail here"}, "521", None),
    ],
    ("EHLO", "4xx"): [({"EHLO": "421 busy", "HELO": "421 busy"}, "421", "EHLO")],
    ("EHLO", "5xx, such as 504 for our name"): [
        ({"EHLO": "504 need a fully-qualified host name", "HELO": "504 no"}, "504", "HELO"),
        ({"EHLO": "550 who are you", "HELO": "550 who are you"}, "550", "HELO"),
    ],
    ("TLS", "STARTTLS is not offered, or refused with 5xx"): [
        ({"EHLO": "250 here"}, "login_impossible", "EHLO"),
        ({"STARTTLS": "502 what is that?"}, "502", "STARTTLS"),
    ],
    ("TLS", "STARTTLS is refused with 4xx"): [
        ({"STARTTLS": "454 TLS is not available"}, "454", "STARTTLS"),
    ],
    ("TLS", "the certificate is not trusted, or TLS fails"): [
        ({"host": "localhost"}, "tls_failed", "STARTTLS"),
    ],
    ("login", "no way to log in is offered"): [
        ({"EHLO": "250-here\r\n250 STARTTLS"}, "login_impossible", "EHLO"),
    ],
    ("login", "4xx"): [({"AUTH": "454 not now"}, "454", "AUTH")],
    ("login", "5xx, such as 535"): [
        ({"AUTH": "535 AG1lAGh1c2gtaHVzaA== is wrong, and hush-hush too"}, "535", "AUTH"),
        ({"AUTH": "534 too weak"}, "534", "AUTH"),
    ],
    ("sender (MAIL)", "4xx"): [
        ({"MAIL": "421 closing"}, "421", "MAIL"),
        ({"MAIL": "451 try again"}, "451", "MAIL"),
    ],
    ("sender (MAIL)", "5xx"): [
        ({"MAIL": "530 log in first"}, "530", "MAIL"),
        ({"MAIL": "550 sender refused"}, "550", "MAIL"),
        ({"MAIL": "553 not your address"}, "553", "MAIL"),
    ],
    ("recipients (RCPT)", "4xx to any"): [
        ({"RCPT": "450 greylisted"}, "450", "RCPT"),
        ({"second RCPT": "451 try again"}, "451", "RCPT"),
        ({"RCPT": "550 no such user", "second RCPT": "452 full"}, "452", "RCPT"),
    ],
    ("recipients (RCPT)", "5xx to all"): [
        ({"RCPT": "550 no such user"}, "550", "RCPT"),
        ({"RCPT": "554 relay access denied"}, "554", "RCPT"),
        ({"RCPT": "530 log in first"}, "530", "RCPT"),
    ],
    ("recipients (RCPT)", "5xx to some, 250 to the message"): [
        ({"second RCPT": "550 no such user"}, "some_recipients_refused", "DATA"),
    ],
    ("before the content", "421, silence or a lost connection"): [
        ({"STARTTLS": DROPPED}, "login_connection_lost", "STARTTLS"),
        ({"AUTH": SILENT}, "login_timeout", "AUTH"),
        ({"RCPT": "421 closing"}, "421", "RCPT"),
        ({"second RCPT": "421 closing"}, "421", "RCPT"),
        ({"RCPT": DROPPED}, "envelope_connection_lost", "RCPT"),
        ({"DATA": DROPPED}, "envelope_connection_lost", "DATA"),
        ({"DATA": SILENT}, "envelope_timeout", "DATA"),
    ],
    ("DATA", "4xx"): [({"DATA": "451 no room"}, "451", "DATA")],
    ("DATA", "5xx"): [({"DATA": "554 no"}, "554", "DATA")],
    ("content sent", "250"): [({}, "250", "DATA")],
    ("content sent", "4xx"): [
        ({"message": "421 closing"}, "421", "DATA"),
        ({"message": "450 greylisted"}, "450", "DATA"),
    ],
    ("content sent", "5xx"): [
        ({"message": "552 too large"}, "552", "DATA"),
        ({"message": "550 5.7.1 looks like spam"}, "550", "DATA"),
    ],
    ("content sent", "530, 535, 538, or 5.7.8, 5.7.9, 5.7.20 to 5.7.30"): [
        ({"message": "530 log in first"}, "530", "DATA"),
        ({"message": "550 5.7.26 SPF and DKIM fail"}, "550", "DATA"),
        ({"message": "550 5.7.25 no reverse DNS"}, "550", "DATA"),
    ],
    ("content sent", "silence or a lost connection"): [
        ({"message": DROPPED}, "connection_lost", "DATA"),
        ({"message": SILENT}, "timeout", "DATA"),
    ],
    ("content sent", "any other reply"): [
        ({"message": "250 " + "x" * 100_000}, "unexpected_reply", "DATA"),
        ({"message": "what?"}, "unexpected_reply", "DATA"),
    ],
}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("certificate"), "IP:127.0.0.1")


@pytest.mark.parametrize("row", ANSWERS, ids=lambda row: f"{row.moment}: {row.answer}")
async def test_every_reply_means_what_the_table_says(
    certificate: Path, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under STARTTLS and with a login, of a request that was accepted just now."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    logged: list[str] = []
    sink = logger.add(lambda line: logged.append(str(line)), format="{message} {extra}")
    examples = EXAMPLES[row.moment, row.answer]
    met = []
    for replies, *_ in examples:
        server = Scripted(certificate, replies)
        async with server_that(server.converse) as port:
            table = logging_in(
                free_ports(1)[0] if "port" in replies else port, host=replies.get("host")
            )
            fresh = replace(mail_message(), created_at=datetime.now(UTC))
            verdict = await send(table, fresh)
        met.append((replies, verdict.code, server.heard[-1] if server.heard else None))
        assert meaning_of(verdict) is row.meaning, (replies, verdict)
        assert "hush-hush" not in verdict.excerpt
        assert "AG1lAGh1c2gtaHVzaA" not in verdict.excerpt
        assert len(verdict.excerpt) <= 200
    logger.remove(sink)
    assert met == examples
    is_logged = any("email.misconfigured" in line for line in logged)
    assert is_logged == (row.meaning is Meaning.US)
    assert not [line for line in logged if "hush-hush" in line or "AG1lA" in line]


def test_every_row_of_the_table_has_an_example() -> None:
    assert set(EXAMPLES) == {(row.moment, row.answer) for row in ANSWERS}


async def test_accepted_recipients_get_the_message_and_refused_ones_are_recorded(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is refused for now is waited for, while the request is young."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    logged: list[str] = []
    sink = logger.add(lambda line: logged.append(str(line)), format="{message} {extra}")
    for refusal in ("550 no such user", "452 mailbox full"):
        server = Scripted(certificate, {"second RCPT": refusal})
        async with server_that(server.converse) as port:
            verdict = await send(logging_in(port))
        assert verdict == Done(
            "some_recipients_refused", f"boss@example.org was refused: {refusal}"
        )
        assert server.heard[-1] == "DATA"
    logger.remove(sink)
    assert [line for line in logged if "email.recipient_refused" in line and "550" in line]
    assert not [line for line in logged if "boss@" in line]


async def test_the_server_is_greeted_by_the_configured_name(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    for configured, name in ((None, "example.org"), ("mx.example.com", "mx.example.com")):
        server = Scripted(certificate, {})
        async with server_that(server.converse) as port:
            await send(logging_in(port, smtp_ehlo_name=configured))
        greetings = [line for line in server.lines if line.startswith("EHLO")]
        assert set(greetings) == {f"EHLO {name}"}


@pytest.mark.parametrize("tls", [Tls.STARTTLS, Tls.TLS])
async def test_a_password_is_not_sent_to_a_server_with_a_self_signed_certificate(
    certificate: Path, tls: Tls
) -> None:
    server = Scripted(certificate, {})
    from_the_first_byte = tls_of(certificate) if tls is Tls.TLS else None
    async with server_that(server.converse, from_the_first_byte) as port:
        verdict = await send(logging_in(port, tls))
    assert isinstance(verdict, Later)
    assert verdict.code == "tls_failed"
    assert "AUTH" not in server.heard


async def test_a_mail_goes_through_tls_from_the_first_byte(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    server = Scripted(certificate, {})
    async with server_that(server.converse, tls_of(certificate)) as port:
        assert await send(logging_in(port, Tls.TLS)) == Done("250", "taken")
    assert server.heard == ["EHLO", "AUTH", "MAIL", "RCPT", "RCPT", "DATA"]


def logging_in(
    port: int, tls: Tls = Tls.STARTTLS, *, host: str | None = None, **others: Any
) -> EmailSettings:
    login = {"smtp_username": "me", "smtp_password": SecretStr("hush-hush")}
    return email_settings(host or "127.0.0.1", port, smtp_tls=tls, **login, **others)
