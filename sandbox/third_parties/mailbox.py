"""A mail server that accepts any recipient, delivers to the inbox, and fails on request."""

import asyncio
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any, AnyStr, NoReturn, cast

from aiosmtpd.smtp import SMTP, Envelope, Session

from sandbox.third_parties.answering import MAX_BODY_BYTES
from sandbox.third_parties.inbox import Call, Inbox
from sandbox.third_parties.listener import LOOPBACK, Listener, reset
from sandbox.third_parties.misbehaviour import Misbehaviour, Misbehaviours, Stage

CLOSING_CHANNEL = 421


def smtp_listener(
    port: int, inbox: Inbox, misbehaviours: Misbehaviours, *, host: str = LOOPBACK
) -> Listener:
    mailbox = Mailbox(inbox, misbehaviours)
    return Listener(
        port, lambda: _Conversation(mailbox, loop=asyncio.get_running_loop()), host=host
    )


class Mailbox:
    """aiosmtpd's handler: its hooks are named after the commands of SMTP."""

    def __init__(self, inbox: Inbox, misbehaviours: Misbehaviours) -> None:
        self._inbox = inbox
        self._misbehaviours = misbehaviours

    async def greet(self, server: SMTP) -> str | None:
        return await self._misbehave(server, "connect", _nothing_yet("", []))

    async def handle_MAIL(  # noqa: N802 (aiosmtpd names its hooks after the commands)
        self, server: SMTP, _: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        refusal = await self._misbehave(server, "MAIL", _nothing_yet(address, []))
        if refusal:
            return refusal
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(  # noqa: N802 (aiosmtpd names its hooks after the commands)
        self, server: SMTP, _: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        attempt = _nothing_yet(envelope.mail_from or "", [*envelope.rcpt_tos, address])
        refusal = await self._misbehave(server, "RCPT", attempt)
        if refusal:
            return refusal
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 OK"

    async def handle_DATA(  # noqa: N802 (aiosmtpd names its hooks after the commands)
        self, server: SMTP, _: Session, envelope: Envelope
    ) -> str:
        mail = _read(envelope)
        misbehaviour = self._misbehaviours.take("email", "DATA")
        if misbehaviour is None:
            self._inbox.keep(mail, accepted=True, answer="250 OK")
        elif misbehaviour.mode == "slow":
            after = f"250 OK after {misbehaviour.delay_seconds:g} s"
            self._inbox.keep(mail, accepted=True, answer=after)
            await self._misbehaviours.rest(misbehaviour)
        elif misbehaviour.mode == "accept_then_fail":
            self._inbox.keep(mail, accepted=True, answer="250 OK, answer lost")
            await _cut(server)
        else:
            return await self._fail(server, "DATA", mail, misbehaviour)
        return "250 OK"

    async def _misbehave(self, server: SMTP, stage: Stage, attempt: Call) -> str | None:
        """Answer with a refusal, or with None where the conversation goes on."""
        misbehaviour = self._misbehaviours.take("email", stage)
        if misbehaviour is None:
            return None
        if misbehaviour.mode == "slow":
            await self._misbehaviours.rest(misbehaviour)
            return None
        return await self._fail(server, stage, attempt, misbehaviour)

    async def _fail(
        self, server: SMTP, stage: Stage, attempt: Call, misbehaviour: Misbehaviour
    ) -> str:
        match misbehaviour.mode:
            case "status":
                code, text = misbehaviour.code, misbehaviour.body or "on request"
                self._inbox.keep(attempt, accepted=False, answer=f"{code} at {stage}")
                if code == CLOSING_CHANNEL or stage == "connect":
                    await server.push(f"{code} {text}")
                    await _hang_up(server)
                return f"{code} {text}"
            case "hang":
                self._inbox.keep(attempt, accepted=False, answer=f"no answer at {stage}")
                await self._misbehaviours.released("email")
            case _:
                answer = f"connection reset at {stage}"
                self._inbox.keep(attempt, accepted=False, answer=answer)
        return await _cut(server)


class _Conversation(SMTP):
    """One connection; the greeting, too, is a moment at which the mailbox may fail."""

    def __init__(self, mailbox: Mailbox, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            mailbox,
            hostname="localhost",
            ident="sandbox mailbox",
            enable_SMTPUTF8=True,
            data_size_limit=MAX_BODY_BYTES,
            loop=loop,
        )
        self._mailbox = mailbox
        self._greeted = False

    async def push(self, status: AnyStr) -> None:
        """Send a reply; the first one is the greeting."""
        refusal = await self._greet()
        if refusal:
            await super().push(refusal)
        else:
            await super().push(status)

    async def _greet(self) -> str | None:
        if self._greeted:
            return None
        self._greeted = True
        return await self._mailbox.greet(self)


def _nothing_yet(envelope_from: str, envelope_to: list[str]) -> Call:
    """Name an attempt that was refused before there was a message."""
    return _call(envelope_from, envelope_to, request_id=None, content={})


def _read(envelope: Envelope) -> Call:
    mail = message_from_bytes(envelope.original_content or b"", policy=policy.default)
    return _call(
        envelope.mail_from or "",
        envelope.rcpt_tos,
        request_id=mail["X-Request-ID"],
        content={
            "subject": mail["Subject"],
            "from": mail["From"],
            "to": mail["To"],
            "date": mail["Date"],
            "message_id": mail["Message-ID"],
            "headers": [(name, str(value)) for name, value in mail.items()],
            "body": _text(mail),
        },
    )


def _text(mail: EmailMessage) -> str:
    body = mail.get_body(preferencelist=("plain", "html"))
    if body is None:
        return ""
    try:
        return str(body.get_content())
    except LookupError:  # a charset that Python does not know
        return cast(bytes, body.get_payload(decode=True)).decode(errors="replace")


def _call(
    envelope_from: str, envelope_to: list[str], request_id: str | None, content: dict[str, Any]
) -> Call:
    return Call(
        kind="email",
        destination=", ".join(envelope_to),
        request_id=request_id,
        idempotency_key=content.get("message_id"),
        content={"envelope_from": envelope_from, "envelope_to": envelope_to, **content},
    )


async def _cut(server: SMTP) -> NoReturn:
    reset(_connection(server))
    await _end_with_connection()


async def _hang_up(server: SMTP) -> NoReturn:
    _connection(server).close()
    await _end_with_connection()


def _connection(server: SMTP) -> asyncio.Transport:
    return cast(asyncio.Transport, server.transport)


async def _end_with_connection() -> NoReturn:
    """Say nothing more: aiosmtpd cancels its task once the connection is gone."""
    while True:
        await asyncio.Event().wait()
