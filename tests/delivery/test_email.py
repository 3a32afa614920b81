"""What the mail server is sent, and what its replies mean."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any, ClassVar

import pytest
from bson import BSON
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger
from pydantic import SecretStr, ValidationError

from assistance.verdict import Done, Later, Never, Unknown, Verdict
from consumers.channels import OutboundMessage
from consumers.channels.email import Email, EmailSettings, Tls, compose, one_line, subject
from tests.support.listeners import make_certificate, server_that, tls_of
from tests.support.third_parties import ThirdParties

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
TIMEOUT_SECONDS = 1.0
HEADERS = ["Subject", "From", "To", "Date", "Message-ID", "X-Request-ID"]


def message(
    description: str = "How much?",
    *,
    topic: str = "pricing",
    request_id: str = "6b1f1a0e-7e0d-4c59-8a55-5a4cbf1e4b60",
    may_be_repeat: bool = False,
) -> OutboundMessage:
    return OutboundMessage(
        request_id=request_id,
        topic=topic,
        description=description,
        idempotency_key="0d8d6d2c-5bb9-4a0e-8b2f-6c1f3e0f9a11",
        created_at=NOW,
        may_be_repeat=may_be_repeat,
    )


def as_read(sent: OutboundMessage) -> EmailMessage:
    mail = compose(sent, sender="from@example.org", recipients=["to@example.org"])
    return message_from_bytes(mail.as_bytes(), policy=policy.default)


def settings(host: str, port: int, **others: Any) -> EmailSettings:
    values: dict[str, Any] = {
        "smtp_host": host,
        "smtp_port": port,
        "smtp_tls": "none",
        "sender": "assistant@example.org",
        "recipients": "pricing@example.org, boss@example.org",
        **others,
    }
    return EmailSettings(**values)


async def send(table: EmailSettings, sent: OutboundMessage | None = None) -> Verdict:
    return await Email(table, call_timeout_seconds=TIMEOUT_SECONDS).send(sent or message())


def sandbox(third_parties: ThirdParties) -> EmailSettings:
    return settings(third_parties.smtp_host, third_parties.smtp_port)


@asynccontextmanager
async def mail_server_that(replies: Callable[[str], str]) -> AsyncIterator[int]:
    """A mail server that gives these replies to the lines that it is sent."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 here\r\n")
        while line := await reader.readline():
            writer.write(f"{replies(line.decode().strip())}\r\n".encode())

    async with server_that(converse) as port:
        yield port


def test_a_mail_has_every_header_that_a_mail_should_have() -> None:
    mail = as_read(message("Was kostet das Große? 🙂"))
    assert mail["Subject"] == "[pricing] Was kostet das Große? 🙂"
    assert mail["From"] == "from@example.org"
    assert mail["To"] == "to@example.org"
    assert mail["Date"].datetime == NOW
    assert mail["Message-ID"] == f"<{message().idempotency_key}@example.org>"
    assert mail["X-Request-ID"] == message().request_id
    assert "Was kostet das Große? 🙂" in mail.get_content()


def test_a_repeat_is_the_same_mail_and_says_that_it_may_be_one() -> None:
    first, second = as_read(message()), as_read(message(may_be_repeat=True))
    assert [first[name] for name in HEADERS] == [second[name] for name in HEADERS]
    assert "may be a repeat" in second.get_content()
    assert "may be a repeat" not in first.get_content()


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\x00"])
def test_no_description_can_add_a_header(end: str) -> None:
    mail = as_read(message(f"hello{end}Bcc: everybody@example.org{end}{end}<b>body</b>"))
    assert [name for name in mail.keys() if name in {*HEADERS, "Bcc"}] == HEADERS  # noqa: SIM118
    assert mail["Subject"].startswith("[pricing] hello Bcc: everybody@example.org")


@given(
    st.text(min_size=1, max_size=300),
    st.text(min_size=1, max_size=40),
    st.text(min_size=1, max_size=60),
)
def test_no_text_whatsoever_can_add_a_header(description: str, topic: str, request_id: str) -> None:
    mail = as_read(message(description, topic=topic, request_id=request_id))
    assert [name for name in mail.keys() if not name.startswith("Content")] == [  # noqa: SIM118
        *HEADERS,
        "MIME-Version",
    ]
    assert not mail.defects


@given(st.text(max_size=1000))
def test_a_subject_is_one_line_and_not_too_long(text: str) -> None:
    line = subject("pricing", text)
    assert line.isprintable()
    assert len(line) <= 120
    assert one_line(line) == line


@pytest.mark.parametrize(
    "recipients", ["", "nobody", "a@b\r\nRCPT TO:<x@y>", "a@b c@d", "a@b,", "@b", "a@", "ä@b.c"]
)
def test_addresses_that_are_none_are_refused(recipients: str) -> None:
    with pytest.raises(ValidationError, match="recipients"):
        settings("localhost", 25, recipients=recipients)


def test_a_password_never_goes_in_the_clear() -> None:
    with pytest.raises(ValidationError, match="in the clear"):
        settings("localhost", 25, smtp_username="me", smtp_password=SecretStr("hush"))


def test_a_name_without_a_password_is_refused() -> None:
    with pytest.raises(ValidationError, match="go together"):
        settings("localhost", 25, smtp_tls=Tls.TLS, smtp_username="me")


async def test_a_mail_arrives_at_every_recipient(third_parties: ThirdParties) -> None:
    assert isinstance(await send(sandbox(third_parties)), Done)
    [received] = third_parties.received("email")
    assert received["envelope_to"] == ["pricing@example.org", "boss@example.org"]
    assert received["subject"] == "[pricing] How much?"
    assert received["request_id"] == message().request_id
    assert received["message_id"] == f"<{message().idempotency_key}@example.org>"


async def test_a_reply_that_is_no_utf8_can_be_stored() -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 here\r\n")
        while line := (await reader.readline()).strip():
            writer.write(b"354 go on\r\n" if line == b"DATA" else b"250 ok\r\n")
            if line == b"DATA":
                await reader.readuntil(b"\r\n.\r\n")
                writer.write("250 angenommen für später\r\n".encode("latin-1"))

    async with server_that(converse) as port:
        verdict = await send(settings("127.0.0.1", port))
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


async def test_a_server_that_closes_shop_is_tried_later(third_parties: ThirdParties) -> None:
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


async def test_a_server_without_starttls_is_our_fault_and_not_the_requests(
    third_parties: ThirdParties,
) -> None:
    table = settings(third_parties.smtp_host, third_parties.smtp_port, smtp_tls="starttls")
    verdict = await send(table)
    assert isinstance(verdict, Later)
    assert verdict.code == "login_impossible"


async def test_a_server_that_wants_a_login_is_our_fault_and_not_the_requests() -> None:
    def wants_login(line: str) -> str:
        return "250 hello" if line.startswith("EHLO") else "530 5.7.0 log in first"

    async with mail_server_that(wants_login) as port:
        verdict = await send(settings("127.0.0.1", port))
    assert verdict == Later("530", "5.7.0 log in first")


async def test_a_reply_that_is_no_smtp_is_tried_later_before_the_message_was_sent() -> None:
    async with mail_server_that(lambda _line: "what?") as port:
        assert isinstance(await send(settings("127.0.0.1", port)), Later)


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
async def test_a_password_is_not_told_to_a_server_that_nobody_vouches_for(
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
    return settings("127.0.0.1", port, smtp_tls=tls, **login)
