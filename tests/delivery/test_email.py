"""What the mail server is sent, and what its replies mean."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
from bson import BSON
from loguru import logger
from pydantic import SecretStr

from assistance.verdict import Done, Later, Never, Unknown, Verdict
from consumers.channels import OutboundMessage
from consumers.channels.email import Email, EmailSettings, Tls
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


@pytest.mark.parametrize("stage", ["connect", "MAIL", "RCPT", "DATA"])
async def test_a_5xx_reply_is_final(third_parties: ThirdParties, stage: str) -> None:
    third_parties.misbehave("email", "status", code=550, body="no such user", stage=stage)
    assert await send(sandbox(third_parties)) == Never("550", "no such user")


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
    assert await send(sandbox(third_parties)) == Later("connect_connection_lost")


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
    assert verdict == Later("530", "5.7.0 log in first")


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

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._say("greeting", writer)
        while line := (await reader.readline()).decode().split():
            self.heard.append(line[0])
            await self._say(line[0], writer)
            if line[0] == "STARTTLS" and self._replies["STARTTLS"].startswith("220"):
                await writer.start_tls(tls_of(self._certificate))
            if line[0] == "DATA" and self._replies["DATA"].startswith("354"):
                if self._replies["message"] == DROPPED:
                    await reader.readuntil(b"Subject:")
                    return
                await reader.readuntil(b"\r\n.\r\n")
                await self._say("message", writer)

    async def _say(self, moment: str, writer: asyncio.StreamWriter) -> None:
        if self._replies[moment] == DROPPED:
            raise ConnectionResetError
        writer.write(self._replies[moment].encode() + b"\r\n")
        await writer.drain()


DROPPED = "(dropped)"

#: What the server says differently from a good one, what it means, and the last command it heard.
REFUSALS = [
    ({}, "done 250", "DATA"),
    ({"greeting": "421 too busy"}, "later 421", None),
    ({"greeting": DROPPED}, "later connect_connection_lost", None),
    ({"EHLO": "250 here"}, "later login_impossible", "EHLO"),
    ({"STARTTLS": "454 TLS is not available"}, "later 454", "STARTTLS"),
    ({"STARTTLS": "502 what is that?"}, "later 502", "STARTTLS"),
    ({"STARTTLS": DROPPED}, "later login_connection_lost", "STARTTLS"),
    ({"AUTH": "535 AG1lAGh1c2gtaHVzaA== is wrong, and hush-hush too"}, "later 535", "AUTH"),
    ({"AUTH": "454 not now"}, "later 454", "AUTH"),
    ({"MAIL": "530 log in first"}, "later 530", "MAIL"),
    ({"MAIL": "421 closing"}, "later 421", "MAIL"),
    ({"RCPT": "421 closing"}, "later 421", "RCPT"),
    ({"RCPT": "450 try again"}, "later 450", "RCPT"),
    ({"RCPT": "451 try again"}, "later 451", "RCPT"),
    ({"RCPT": "550 no such user"}, "never 550", "RCPT"),
    ({"RCPT": DROPPED}, "later envelope_connection_lost", "RCPT"),
    ({"DATA": "451 no room"}, "later 451", "DATA"),
    ({"DATA": DROPPED}, "unknown connection_lost", "DATA"),
    ({"DATA": "554 no"}, "never 554", "DATA"),
    ({"message": "421 closing"}, "later 421", "DATA"),
    ({"message": "450 greylisted"}, "later 450", "DATA"),
    ({"message": "552 too large"}, "never 552", "DATA"),
    ({"message": DROPPED}, "unknown connection_lost", "DATA"),
    ({"message": "250 " + "x" * 100_000}, "unknown unexpected_reply", "DATA"),
]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("certificate"), "IP:127.0.0.1")


async def test_every_reply_has_one_meaning_under_starttls_and_a_login(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    logged: list[str] = []
    sink = logger.add(lambda line: logged.append(str(line)), format="{message} {extra}")
    met = []
    for replies, *_ in REFUSALS:
        server = Scripted(certificate, replies)
        async with server_that(server.converse) as port:
            verdict = await send(logging_in(port))
        code = f"{type(verdict).__name__.lower()} {verdict.code}"
        met.append((replies, code, server.heard[-1] if server.heard else None))
        assert "hush-hush" not in verdict.excerpt
        assert "AG1lAGh1c2gtaHVzaA" not in verdict.excerpt
        assert len(verdict.excerpt) <= 200
    logger.remove(sink)
    assert met == REFUSALS
    assert [line for line in logged if "email.misconfigured" in line and "535" in line]
    assert not [line for line in logged if "hush-hush" in line or "AG1lA" in line]


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


def logging_in(port: int, tls: Tls = Tls.STARTTLS) -> EmailSettings:
    login = {"smtp_username": "me", "smtp_password": SecretStr("hush-hush")}
    return email_settings("127.0.0.1", port, smtp_tls=tls, **login)
