"""
E-mail, by SMTP: https://www.rfc-editor.org/rfc/rfc5321#section-4.2

    what happens                                verdict
    250 to the whole message                    done
    a 4xx reply to anything                     later
    a 5xx reply to anything else                never
    535, 530 and the like to the login, no      later, and an error in the log: a wrong password
    STARTTLS, a certificate that is not good    is our configuration's fault, not the request's
    no connection, dropped or silent before     later
    the command to take the message (DATA)
    dropped or silent after that                unknown

One refused recipient refuses the whole message, so that nobody is left out unnoticed. A repeat
has the same Message-ID, by which many mail systems drop the second copy.
"""

import asyncio
import socket
import ssl
from base64 import b64encode
from collections.abc import Sequence
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from enum import StrEnum, auto
from typing import Annotated, Self

import aiosmtplib
from loguru import logger
from pydantic import AfterValidator, Field, SecretStr, model_validator

from assistance.verdict import Done, Later, Never, Unknown, Verdict
from consumers.channels import OutboundMessage
from consumers.channels.excerpts import cut_excerpt
from runtime.settings import SettingsTable

SUBJECT_LIMIT_CHARACTERS = 120

#: Seven bits, so that it passes servers without 8BITMIME too.
_POLICY = SMTP.clone(cte_type="7bit")

TEMPORARY_REPLY = 400
PERMANENT_REPLY = 500
AUTHENTICATION_REQUIRED = 530


class Tls(StrEnum):
    NONE = "none"
    STARTTLS = "starttls"
    TLS = "tls"


DEFAULT_PORTS = {Tls.NONE: 25, Tls.STARTTLS: 587, Tls.TLS: 465}


def _one_address(text: str) -> str:
    try:
        address = Address(addr_spec=text.strip())
    except (ValueError, IndexError, MessageError):
        raise ValueError("holds something that is no e-mail address") from None
    if not address.username or not address.domain or not _is_plain(address.addr_spec):
        raise ValueError("holds something that is no e-mail address in ASCII")
    return address.addr_spec


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _some_addresses(text: str) -> str:
    return ",".join(_one_address(part) for part in text.split(","))


class EmailSettings(SettingsTable):
    smtp_host: str = Field(min_length=1, description="the mail server")
    smtp_port: int | None = Field(
        default=None, ge=1, le=65535, description="25, 587 or 465 by smtp_tls when not given"
    )
    smtp_tls: Tls = Field(
        default=Tls.STARTTLS, description="`starttls`, `tls` (from the first byte) or `none`"
    )
    smtp_username: str | None = Field(default=None, description="without it there is no login")
    smtp_password: SecretStr | None = Field(default=None, description="goes with the username")
    sender: Annotated[str, AfterValidator(_one_address)] = Field(
        description="the address that the messages are from"
    )
    recipients: Annotated[str, AfterValidator(_some_addresses)] = Field(
        description="the team's address; several are separated by commas"
    )

    @model_validator(mode="after")
    def _no_password_in_the_clear(self) -> Self:
        prefix = str(self.model_config.get("env_prefix", "")).upper()
        if (self.smtp_username is None) != (self.smtp_password is None):
            raise ValueError(f"{prefix}SMTP_USERNAME and {prefix}SMTP_PASSWORD go together")
        if self.smtp_username is not None and self.smtp_tls is Tls.NONE:
            raise ValueError(
                f"{prefix}SMTP_TLS=none would send the password in the clear: choose starttls or "
                "tls, or leave out the login"
            )
        return self


class Stage(StrEnum):
    """How far a call came: what an error means depends on it."""

    CONNECT = auto()
    LOGIN = auto()
    ENVELOPE = auto()
    MESSAGE = auto()


class Email:
    Settings = EmailSettings

    def __init__(self, settings: EmailSettings, *, call_timeout_seconds: float) -> None:
        self._settings = settings
        self._call_timeout_seconds = call_timeout_seconds
        self._tls_context = ssl.create_default_context()
        self._recipients = settings.recipients.split(",")
        self._secrets = _forms_of_password(settings)

    async def send(self, message: OutboundMessage) -> Verdict:
        mail = compose(message, sender=self._settings.sender, recipients=self._recipients)
        client = self._client()
        stage = Stage.CONNECT
        try:
            async with asyncio.timeout(self._call_timeout_seconds):
                await client.connect()
                stage = Stage.LOGIN
                await self._login(client)
                stage = Stage.ENVELOPE
                await client.mail(self._settings.sender)
                for recipient in self._recipients:
                    await client.rcpt(recipient)
                stage = Stage.MESSAGE
                reply = await client.data(mail.as_bytes())
        except (aiosmtplib.SMTPException, OSError) as error:
            return self._judge(error, stage)
        finally:
            # a QUIT would wait for an answer that changes nothing any more
            client.close()
        return Done(str(reply.code), self._excerpt(reply.message))

    async def close(self) -> None:
        """Every message has a connection of its own."""

    def _client(self) -> aiosmtplib.SMTP:
        settings = self._settings
        return aiosmtplib.SMTP(
            hostname=settings.smtp_host,
            port=settings.smtp_port or DEFAULT_PORTS[settings.smtp_tls],
            use_tls=settings.smtp_tls is Tls.TLS,
            start_tls=False,  # asked for below, where its errors can be told from the others
            tls_context=self._tls_context,
            # the default asks the name server for it, which may be slow or away
            local_hostname=socket.gethostname(),
            timeout=None,
        )

    async def _login(self, client: aiosmtplib.SMTP) -> None:
        if self._settings.smtp_tls is Tls.STARTTLS:
            await client.starttls()
        if self._settings.smtp_username is not None and self._settings.smtp_password is not None:
            password = self._settings.smtp_password.get_secret_value()
            await client.login(self._settings.smtp_username, password)

    def _judge(self, error: Exception, stage: Stage) -> Verdict:
        """The table at the head of this file."""
        if isinstance(error, aiosmtplib.SMTPResponseException):
            return self._judge_reply(error.code, error.message, stage)
        for cause in (error, error.__cause__):
            if isinstance(cause, ssl.SSLError):
                return self._misconfigured("tls_failed", cause.reason or "")
        if not isinstance(error, OSError) and stage is Stage.LOGIN:
            # what aiosmtplib says when STARTTLS or a way to log in is not on offer
            return self._misconfigured("login_impossible", str(error))
        code = "timeout" if isinstance(error, TimeoutError) else "connection_lost"
        return Unknown(code) if stage is Stage.MESSAGE else Later(f"{stage}_{code}")

    def _judge_reply(self, code: int, text: str, stage: Stage) -> Verdict:
        excerpt = self._excerpt(text)
        if code < TEMPORARY_REPLY:
            # a reply that SMTP does not know here; aiosmtplib makes an unreadable one a -1
            odd = "unexpected_reply"
            return Unknown(odd, excerpt) if stage is Stage.MESSAGE else Later(odd, excerpt)
        if code < PERMANENT_REPLY:
            return Later(str(code), excerpt)
        if stage is Stage.LOGIN or code == AUTHENTICATION_REQUIRED:
            return self._misconfigured(str(code), excerpt)
        return Never(str(code), excerpt)

    def _misconfigured(self, code: str, reason: str) -> Verdict:
        # the excerpt stays in the ledger: a server may repeat what it was sent
        logger.error("email.misconfigured", server=self._settings.smtp_host, code=code)
        return Later(code, self._excerpt(reason))

    def _excerpt(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return cut_excerpt(text)


def _forms_of_password(settings: EmailSettings) -> list[str]:
    """As it is, and as AUTH PLAIN and AUTH LOGIN send it."""
    if settings.smtp_password is None:
        return []
    password = settings.smtp_password.get_secret_value()
    plain = f"\0{settings.smtp_username}\0{password}"
    return [password, *(b64encode(form.encode()).decode() for form in (plain, password))]


def compose(message: OutboundMessage, *, sender: str, recipients: Sequence[str]) -> EmailMessage:
    """The mail, the same in every attempt but for the word that it may be a repeat."""
    mail = EmailMessage(policy=_POLICY)
    mail["Subject"] = subject(message.topic, message.description)
    mail["From"] = sender
    mail["To"] = ", ".join(recipients)
    mail["Date"] = message.created_at
    mail["Message-ID"] = f"<{one_line(message.idempotency_key)}@{sender.rpartition('@')[2]}>"
    mail["X-Request-ID"] = one_line(message.request_id)
    repeat = (
        "This may be a repeat: an earlier try had no answer.\n\n" if message.may_be_repeat else ""
    )
    mail.set_content(
        f"{repeat}{message.description}\n\n"
        f"Topic: {message.topic}\n"
        f"Request: {message.request_id}\n"
        f"Received: {message.created_at:%Y-%m-%d %H:%M:%S %Z}\n"
    )
    return mail


def subject(topic: str, description: str) -> str:
    line = one_line(f"[{topic}] {description}")
    if len(line) <= SUBJECT_LIMIT_CHARACTERS:
        return line
    return line[: SUBJECT_LIMIT_CHARACTERS - 1] + "…"


def one_line(text: str) -> str:
    """Text that can stand in a header: nothing in it can end the line and begin another."""
    visible = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(visible.split())
