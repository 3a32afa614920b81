"""
Webhooks, signed as https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md

What each answer means is in `ANSWERS`. `webhook-id` is the same in every attempt of a delivery, and
in no other: by it the receiver recognises a repeat. With several secrets each call has several
signatures, so that a secret can be replaced without an interruption. docs/channels.md describes
what a receiver gets.
"""

import base64
import binascii
import socket
from datetime import datetime
from http import HTTPStatus
from ipaddress import ip_address, ip_network
from typing import Annotated, Any, Self

import orjson
from loguru import logger
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from standardwebhooks import Webhook as Signer

from assistance.verdict import Done, Later, Never, Verdict
from consumers.channels import OutboundMessage
from consumers.channels.answers import Meaning, Row
from consumers.channels.http import (
    MESSAGE_STATUSES,
    Answer,
    HttpClient,
    new_transport,
    parse_url,
    secrets_of,
)
from consumers.channels.public_addresses import GuardedTransport, Network, refusal
from consumers.channels.text import clean_text
from runtime import clock
from runtime.settings import SettingsTable

ANSWERS = (
    Row("connecting", "no connection, or nothing sent in time", Meaning.MOMENT),
    Row("connecting", "the host name cannot be resolved", Meaning.MOMENT),
    Row("connecting", "the certificate is not trusted, or TLS fails", Meaning.US),
    Row("connecting", "an address that is not public", Meaning.US, "see *Where a webhook can go*"),
    Row("sent", "2xx, whatever its text", Meaning.DELIVERED),
    Row("sent", "400, 413, 422", Meaning.MESSAGE),
    Row("sent", "408, 425, 429, 5xx", Meaning.MOMENT, "`Retry-After` may lengthen the wait"),
    Row("sent", "410", Meaning.US, "the destination is suspended until an operator resumes it"),
    Row(
        "sent",
        "any other status: 401, 404, a redirect",
        Meaning.US,
        "the URL, the secret or the receiver's configuration is wrong",
    ),
    Row("sent", "no answer", Meaning.UNKNOWN, "it may have the message"),
)

EVENT_TYPE = "assistance.requested"

#: The maximum that Standard Webhooks recommends; a description of 300 characters is far below it.
PAYLOAD_LIMIT_BYTES = 20_000

SECRET_PREFIX = "whsec_"  # noqa: S105  # what every secret begins with
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64


def _checked_url(url: SecretStr) -> SecretStr:
    parse_url(url.get_secret_value())
    return url


def _checked_secrets(secrets: SecretStr) -> SecretStr:
    for secret in _split(secrets.get_secret_value()):
        try:
            key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
        except binascii.Error:
            key = b""
        if not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
            raise ValueError(
                f"each must be {SECRET_PREFIX} and {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} "
                "random bytes in base64; several are separated by commas"
            )
    return secrets


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _networks(value: Any) -> Any:
    """`10.1.0.0/16,fd00::/8`"""
    if not isinstance(value, str):
        return value
    try:
        return tuple(ip_network(part) for part in _split(value))
    except ValueError:
        raise ValueError("must be networks such as 10.1.0.0/16,fd00::/8") from None


class WebhookSettings(SettingsTable):
    url: Annotated[SecretStr, AfterValidator(_checked_url)] = Field(
        description="the URL to post to, beginning with https://; treated as a secret"
    )
    signing_secrets: Annotated[SecretStr, AfterValidator(_checked_secrets)] = Field(
        description="secrets `whsec_...`, separated by commas; each call is signed with all of them"
    )
    allowed_networks: Annotated[tuple[Network, ...], BeforeValidator(_networks)] = Field(
        default=(),
        description="networks that may be called although they are not public, also by http://",
    )

    @model_validator(mode="after")
    def _the_guard_lets_it_pass(self) -> Self:
        prefix = str(self.model_config.get("env_prefix", "")).upper()
        url = parse_url(self.url.get_secret_value())
        encrypted = url.scheme == "https"
        if not encrypted and not self.allowed_networks:
            raise ValueError(
                f"{prefix}URL must begin with https://; http:// is for {prefix}ALLOWED_NETWORKS"
            )
        try:
            # 0x7f.1 and 2130706433 are addresses too; a name is resolved at each call
            found = socket.getaddrinfo(url.raw_host, None, flags=socket.AI_NUMERICHOST)
        except (OSError, UnicodeError):
            return self
        address = ip_address(found[0][4][0])
        reason = refusal(address, self.allowed_networks, encrypted=encrypted)
        if reason:
            raise ValueError(f"{prefix}URL: its address {reason} ({prefix}ALLOWED_NETWORKS)")
        return self


class Webhook:
    Settings = WebhookSettings
    #: by `webhook-id`, as Standard Webhooks requires of receivers
    KNOWS_IDEMPOTENCY_KEY = True

    def __init__(self, settings: WebhookSettings, *, call_timeout_seconds: float) -> None:
        self._url = settings.url.get_secret_value()
        self._signers = [Signer(key) for key in _split(settings.signing_secrets.get_secret_value())]
        self._http = HttpClient(
            call_timeout_seconds=call_timeout_seconds,
            secrets=secrets_of(self._url),
            transport=GuardedTransport(
                new_transport(),
                allowed=settings.allowed_networks,
                connect_seconds=call_timeout_seconds,
            ),
        )

    async def send(self, message: OutboundMessage) -> Verdict:
        body = orjson.dumps(payload(message)).decode()
        if len(body.encode()) > PAYLOAD_LIMIT_BYTES:
            return Never("payload_too_large")
        answer = await self._http.post(
            self._url,
            content=body.encode(),
            headers={
                "Content-Type": "application/json",
                "X-Request-ID": message.request_id,
                **message.trace,
                **self._signed(message.idempotency_key, body, clock.now()),
            },
        )
        if isinstance(answer, Answer):
            return judge(answer)
        if isinstance(answer, Later) and answer.about_us:
            _report(answer.code)
        return answer

    async def close(self) -> None:
        await self._http.close()

    def _signed(self, id: str, body: str, now: datetime) -> dict[str, str]:
        signatures = [signer.sign(msg_id=id, timestamp=now, data=body) for signer in self._signers]
        return {
            "webhook-id": id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": " ".join(signatures),
        }


def payload(message: OutboundMessage) -> dict[str, Any]:
    """What is posted, the same in every attempt."""
    return {
        "type": EVENT_TYPE,
        "timestamp": message.created_at,
        "data": {
            "request_id": message.request_id,
            "topic": message.topic,
            "description": clean_text(message.description),
            "created_at": message.created_at,
        },
    }


def judge(answer: Answer) -> Verdict:
    """See ANSWERS."""
    code, excerpt = str(answer.status), answer.excerpt
    if answer.is_success:
        return Done(code, excerpt)
    if answer.asks_to_try_later:
        return Later(code, excerpt, answer.retry_after_seconds)
    if answer.status in MESSAGE_STATUSES:
        return Never(code, excerpt)
    _report(code)
    disables = answer.status == HTTPStatus.GONE
    return Later(code, excerpt, answer.retry_after_seconds, disables=disables, about_us=True)


def _report(code: str) -> None:
    # the excerpt stays in the ledger: an answer may repeat a user's text
    logger.error("webhook.misconfigured", code=code)
