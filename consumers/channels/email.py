"""
E-mail, by SMTP (https://www.rfc-editor.org/rfc/rfc5321). What each reply means is in `ANSWERS`.

Before the content is sent, no reply can be about the message. Of several recipients, those that the
server accepts get the message; the refused ones are recorded with the attempt and logged.

A repeat has the same Message-ID, by which many mail systems drop a second copy. That is not
promised, so an unknown outcome is repeated rarely.
"""

import asyncio
import re
import ssl
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from enum import StrEnum, auto
from ipaddress import ip_address
from typing import Annotated, Self

import aiosmtplib
from loguru import logger
from pydantic import AfterValidator, Field, SecretStr, model_validator

from assistance.verdict import Done, Later, Never, Unknown, Verdict
from consumers.channels import OutboundMessage
from consumers.channels.answers import Meaning, Row
from consumers.channels.causes import causes_of, system_reason
from consumers.channels.excerpts import cut_excerpt
from consumers.channels.hosts import check_host
from consumers.channels.text import one_line, quoted
from runtime import clock
from runtime.settings import SettingsTable

ANSWERS = (
    Row("connecting", "no connection, or no greeting in time", Meaning.MOMENT),
    Row("connecting", "the host name cannot be resolved", Meaning.MOMENT),
    Row("greeting", "4xx, or not SMTP", Meaning.MOMENT),
    Row("greeting", "5xx", Meaning.US, "the server refuses us before it has seen a message"),
    Row("EHLO", "4xx", Meaning.MOMENT),
    Row("EHLO", "5xx, such as 504 for our name", Meaning.US, "set EMAIL_SMTP_EHLO_NAME"),
    Row("TLS", "STARTTLS is not offered, or refused with 5xx", Meaning.US),
    Row("TLS", "STARTTLS is refused with 4xx", Meaning.MOMENT),
    Row("TLS", "the certificate is not trusted, or TLS fails", Meaning.US),
    Row("login", "no way to log in is offered", Meaning.US),
    Row("login", "4xx", Meaning.MOMENT),
    Row("login", "5xx, such as 535", Meaning.US, "the user name or password is wrong"),
    Row("sender (MAIL)", "4xx", Meaning.MOMENT),
    Row("sender (MAIL)", "5xx", Meaning.US, "the sender is a setting"),
    Row(
        "recipients (RCPT)",
        "4xx to any",
        Meaning.MOMENT,
        "for the first 15 minutes of a request; then as 5xx, unless all are refused",
    ),
    Row("recipients (RCPT)", "5xx to all", Meaning.US, "the recipients are a setting"),
    Row(
        "recipients (RCPT)",
        "5xx to some, 250 to the message",
        Meaning.DELIVERED,
        "to the accepted ones; the refused ones are recorded and logged",
    ),
    Row("before the content", "421, silence or a lost connection", Meaning.MOMENT),
    Row("DATA", "4xx", Meaning.MOMENT),
    Row("DATA", "5xx", Meaning.US, "the server has not seen the message"),
    Row("content sent", "250", Meaning.DELIVERED),
    Row("content sent", "4xx", Meaning.MOMENT),
    Row("content sent", "5xx", Meaning.MESSAGE),
    Row(
        "content sent",
        "530, 535, 538, or 5.7.8, 5.7.9, 5.7.20 to 5.7.30",
        Meaning.US,
        "a login is missing, or SPF, DKIM or reverse DNS of our domain is wrong (RFC 7372)",
    ),
    Row("content sent", "silence or a lost connection", Meaning.UNKNOWN, "it may have the message"),
    Row("content sent", "any other reply", Meaning.UNKNOWN, "SMTP defines no such reply here"),
)

SUBJECT_LIMIT_CHARACTERS = 120

#: Greylisting refuses an unknown sender for some minutes. After this age of a request, a recipient
#: that is still refused for now does not keep the others from getting the message.
RECIPIENTS_PATIENCE_SECONDS = 900.0

#: Seven bits, so that it passes servers without 8BITMIME too.
_POLICY = SMTP.clone(cte_type="7bit")

TEMPORARY_REPLY = 400
PERMANENT_REPLY = 500
CLOSING_REPLY = 421

#: https://www.rfc-editor.org/rfc/rfc4954#section-6 : authentication required, failed, needs TLS
AUTHENTICATION_REPLIES = frozenset({530, 535, 538})
#: https://www.rfc-editor.org/rfc/rfc7372 : DKIM, SPF, reverse DNS; 5.7.8 and 5.7.9 are of the login
_ABOUT_OUR_DOMAIN = re.compile(r"\s*5\.7\.(8|9|2\d|30)\b")


IPV4 = 4


class Tls(StrEnum):
    NONE = "none"
    STARTTLS = "starttls"
    TLS = "tls"


DEFAULT_PORTS = {Tls.NONE: 25, Tls.STARTTLS: 587, Tls.TLS: 465}


def _one_address(text: str) -> str:
    try:
        address = Address(addr_spec=text.strip())
    except (ValueError, IndexError, MessageError):
        raise ValueError("must be an e-mail address such as team@example.org") from None
    if not address.username or not address.domain or not _is_plain(address.addr_spec):
        raise ValueError("must be an e-mail address in ASCII, such as team@example.org")
    try:
        check_host(address.domain.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise ValueError("must be an e-mail address with a valid domain") from None
    return address.addr_spec


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _addresses(text: str) -> str:
    return ",".join(_one_address(part) for part in text.split(","))


class EmailSettings(SettingsTable):
    smtp_host: Annotated[str, AfterValidator(check_host)] = Field(
        description="host name or IP address of the mail server"
    )
    smtp_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="TCP port of the mail server; the default is 587 for `starttls`, 465 for `tls` "
        "and 25 for `none`",
    )
    smtp_tls: Tls = Field(
        default=Tls.STARTTLS,
        description="encryption of the connection: `starttls`, `tls` (from the first byte), `none`",
    )
    smtp_username: str | None = Field(
        default=None,
        min_length=1,
        description="user name for the mail server; without one there is no login",
    )
    smtp_password: SecretStr | None = Field(
        default=None, min_length=1, description="password for the mail server; requires a user name"
    )
    smtp_ehlo_name: Annotated[str, AfterValidator(check_host)] | None = Field(
        default=None,
        description="the name by which we greet the mail server (EHLO); some servers require the "
        "host's public DNS name. The default is the domain of the sender",
    )
    sender: Annotated[str, AfterValidator(_one_address)] = Field(
        description="the address in From, and for bounces"
    )
    recipients: Annotated[str, AfterValidator(_addresses)] = Field(
        description="the addresses that get the messages, separated by commas"
    )

    @property
    def ehlo_name(self) -> str:
        name = self.smtp_ehlo_name or self.sender.rpartition("@")[2]
        try:
            address = ip_address(name)
        except ValueError:
            return name
        # https://www.rfc-editor.org/rfc/rfc5321#section-4.1.3
        return f"[{address}]" if address.version == IPV4 else f"[IPv6:{address}]"

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
    """How far a call came; the meaning of an error depends on it."""

    CONNECT = auto()
    LOGIN = auto()
    ENVELOPE = auto()
    CONTENT = auto()


@dataclass(frozen=True, slots=True)
class _Refused:
    """A recipient that the server did not accept."""

    recipient: str
    code: int
    text: str

    def __str__(self) -> str:
        return f"{self.recipient} was refused: {self.code} {self.text}"

    @property
    def is_temporary(self) -> bool:
        return self.code < PERMANENT_REPLY


class Email:
    Settings = EmailSettings

    def __init__(self, settings: EmailSettings, *, call_timeout_seconds: float) -> None:
        self._settings = settings
        self._call_timeout_seconds = call_timeout_seconds
        self._tls_context = ssl.create_default_context()
        self._recipients = settings.recipients.split(",")
        self._secrets = _forms_of_password(settings)

    async def send(self, message: OutboundMessage) -> Verdict:
        stage = Stage.CONNECT

        def content_is_sent() -> None:
            nonlocal stage
            stage = Stage.CONTENT

        client = self._client()
        try:
            mail = compose(message, sender=self._settings.sender, recipients=self._recipients)
            async with asyncio.timeout(self._call_timeout_seconds):
                await client.connect()
                stage = Stage.LOGIN
                await self._greet_and_log_in(client)
                stage = Stage.ENVELOPE
                await client.mail(self._settings.sender)
                refused = [
                    refusal
                    for recipient in self._recipients
                    if (refusal := await _offer(client, recipient))
                ]
                if verdict := self._judge_recipients(refused, message.created_at):
                    return verdict
                _watch(client, content_is_sent)
                reply = await client.data(mail.as_bytes())
        except Exception as error:  # noqa: BLE001  # only here is it known what had been sent
            return self._judge(error, stage)
        finally:
            # a QUIT would wait for an answer that changes nothing any more
            client.close()
        return self._delivered(reply, refused)

    async def close(self) -> None:
        """Nothing to close: every message has a connection of its own."""

    def _client(self) -> aiosmtplib.SMTP:
        settings = self._settings
        return aiosmtplib.SMTP(
            hostname=settings.smtp_host,
            port=settings.smtp_port or DEFAULT_PORTS[settings.smtp_tls],
            use_tls=settings.smtp_tls is Tls.TLS,
            start_tls=False,  # done in `_greet_and_log_in`, where its errors are recognised
            tls_context=self._tls_context,
            local_hostname=settings.ehlo_name,
            timeout=None,
        )

    async def _greet_and_log_in(self, client: aiosmtplib.SMTP) -> None:
        if self._settings.smtp_tls is Tls.STARTTLS:
            await client.starttls()
        if self._settings.smtp_username is not None and self._settings.smtp_password is not None:
            password = self._settings.smtp_password.get_secret_value()
            await client.login(self._settings.smtp_username, password)
        if client.is_ehlo_or_helo_needed:
            await client.ehlo()

    def _judge_recipients(self, refused: list[_Refused], created_at: datetime) -> Verdict | None:
        """The verdict that ends the call before the content, or None to send it."""
        temporary = [one for one in refused if one.is_temporary]
        all_refused = len(refused) == len(self._recipients)
        is_patient = clock.age_seconds(created_at) < RECIPIENTS_PATIENCE_SECONDS
        if temporary and (all_refused or is_patient):
            return Later(str(temporary[0].code), self._excerpt(str(temporary[0])))
        if all_refused:
            return self._misconfigured(str(refused[0].code), str(refused[0]))
        return None

    def _delivered(self, reply: aiosmtplib.SMTPResponse, refused: list[_Refused]) -> Verdict:
        if not refused:
            return Done(str(reply.code), self._excerpt(reply.message))
        for one in refused:
            # the address and the reply stay in the ledger: they may be personal
            logger.warning(
                "email.recipient_refused", server=self._settings.smtp_host, code=str(one.code)
            )
        return Done("some_recipients_refused", self._excerpt("; ".join(map(str, refused))))

    def _judge(self, error: Exception, stage: Stage) -> Verdict:
        """See ANSWERS."""
        if isinstance(error, aiosmtplib.SMTPResponseException):
            return self._judge_reply(error.code, error.message, stage)
        if stage is Stage.CONTENT:
            return Unknown("timeout" if isinstance(error, TimeoutError) else "connection_lost")
        for cause in causes_of(error):
            if isinstance(cause, ssl.SSLError):
                return self._misconfigured("tls_failed", cause.reason or "")
        if isinstance(error, TimeoutError):
            return Later(f"{stage}_timeout")
        if isinstance(error, OSError):
            return Later(f"{stage}_connection_lost", system_reason(error))
        # aiosmtplib's words when STARTTLS or a way to log in is not offered; else an error of ours
        code = "login_impossible" if stage is Stage.LOGIN else f"{stage}_failed"
        return self._misconfigured(code, str(error) or type(error).__name__)

    def _judge_reply(self, code: int, text: str, stage: Stage) -> Verdict:
        excerpt = self._excerpt(text)
        if code < TEMPORARY_REPLY:
            # a reply that SMTP does not define here; aiosmtplib makes an unreadable one a -1
            odd = "unexpected_reply"
            return Unknown(odd, excerpt) if stage is Stage.CONTENT else Later(odd, excerpt)
        if code < PERMANENT_REPLY:
            return Later(str(code), excerpt)
        about_our_domain = code in AUTHENTICATION_REPLIES or _ABOUT_OUR_DOMAIN.match(text)
        if stage is not Stage.CONTENT or about_our_domain:
            return self._misconfigured(str(code), text)
        return Never(str(code), excerpt)

    def _misconfigured(self, code: str, reason: str) -> Later:
        # the excerpt stays in the ledger: a server may repeat what it was sent
        logger.error("email.misconfigured", server=self._settings.smtp_host, code=code)
        return Later(code, self._excerpt(reason), about_us=True)

    def _excerpt(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return cut_excerpt(text)


async def _offer(client: aiosmtplib.SMTP, recipient: str) -> _Refused | None:
    """Raises what ends the whole call: a lost connection, or a reply that SMTP does not define."""
    try:
        await client.rcpt(recipient)
    except aiosmtplib.SMTPRecipientRefused as refusal:
        ends_the_call = {CLOSING_REPLY, *AUTHENTICATION_REPLIES}
        if refusal.code < TEMPORARY_REPLY or refusal.code in ends_the_call:
            raise
        return _Refused(recipient, refusal.code, refusal.message)
    return None


def _watch(client: aiosmtplib.SMTP, content_is_sent: Callable[[], None]) -> None:
    """Report when more than the command DATA is written; aiosmtplib's errors do not say."""
    protocol = client.protocol
    assert protocol is not None
    write = protocol.write

    def watched(data: bytes) -> None:
        if data != b"DATA\r\n":
            content_is_sent()
        write(data)

    vars(protocol)["write"] = watched


def _forms_of_password(settings: EmailSettings) -> list[str]:
    """As it is, and as AUTH PLAIN and AUTH LOGIN send it."""
    if settings.smtp_password is None:
        return []
    password = settings.smtp_password.get_secret_value()
    plain = f"\0{settings.smtp_username}\0{password}"
    return [password, *(b64encode(form.encode()).decode() for form in (plain, password))]


def compose(message: OutboundMessage, *, sender: str, recipients: Sequence[str]) -> EmailMessage:
    """
    The mail, the same in every attempt except for the notice that it may be a repeat.

    The description is quoted: no line of it passes for one of ours.
    """
    mail = EmailMessage(policy=_POLICY)
    mail["Subject"] = subject(message.topic, message.description)
    mail["From"] = sender
    mail["To"] = ", ".join(recipients)
    mail["Date"] = message.created_at
    mail["Message-ID"] = f"<{one_line(message.idempotency_key)}@{sender.rpartition('@')[2]}>"
    mail["X-Request-ID"] = one_line(message.request_id)
    repeat = (
        "This may be a repeat: an earlier attempt had no answer.\n\n"
        if message.may_be_repeat
        else ""
    )
    mail.set_content(
        f"{repeat}{quoted(message.description)}\n\n"
        f"Topic: {one_line(message.topic)}\n"
        f"Request: {one_line(message.request_id)}\n"
        f"Received: {message.created_at:%Y-%m-%d %H:%M:%S %Z}\n"
    )
    return mail


def subject(topic: str, description: str) -> str:
    line = one_line(f"[{topic}] {description}")
    if len(line) <= SUBJECT_LIMIT_CHARACTERS:
        return line
    return line[: SUBJECT_LIMIT_CHARACTERS - 1] + "…"
