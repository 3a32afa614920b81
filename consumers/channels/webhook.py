"""
Webhooks, signed as https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md

    answer                                      verdict
    2xx, whatever its text                      done
    400, 413, 422                               never
    408, 425, 429, 5xx                          later; Retry-After is honoured
    410                                         later, and the destination is disabled: its requests
                                                wait until somebody has seen to it
    every other status (401, 404, a redirect)   later, and an error in the log: the receiver's
                                                or our configuration is at fault, not the request
    no connection, or nothing sent in time      later
    an address that is not public               later, and an error in the log
    sent, and no answer                         unknown

`webhook-id` is the same in every attempt of a delivery, and in no other, by which the receiver
drops a second copy. Several secrets sign side by side, so that one can be replaced while both
sides know both. A redirect is not followed. See docs/channels.md for what a receiver gets.
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
from consumers.channels.http import (
    MESSAGE_STATUSES,
    Answer,
    HttpClient,
    new_transport,
    parse_url,
    secrets_of,
)
from consumers.channels.public_addresses import AddressRefused, GuardedTransport, Network, refusal
from runtime import clock
from runtime.settings import SettingsTable

EVENT_TYPE = "assistance.requested"

#: What Standard Webhooks recommends at most; a description of 300 characters is far from it.
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
        description="where to post, beginning with https://; a secret if a part of it is"
    )
    signing_secrets: Annotated[SecretStr, AfterValidator(_checked_secrets)] = Field(
        description="whsec_...; while one is replaced, the new and the old, separated by a comma"
    )
    allowed_networks: Annotated[tuple[Network, ...], BeforeValidator(_networks)] = Field(
        default=(),
        description="networks that are not public and may be called all the same, by http:// too",
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
        if answer.code == AddressRefused.code:
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
            "description": message.description,
            "created_at": message.created_at,
        },
    }


def judge(answer: Answer) -> Verdict:
    """The table at the head of this file."""
    code, excerpt = str(answer.status), answer.excerpt
    if answer.is_success:
        return Done(code, excerpt)
    if answer.asks_to_try_later:
        return Later(code, excerpt, answer.retry_after_seconds)
    if answer.status in MESSAGE_STATUSES:
        return Never(code, excerpt)
    _report(code)
    disables = answer.status == HTTPStatus.GONE
    return Later(code, excerpt, answer.retry_after_seconds, disables=disables)


def _report(code: str) -> None:
    # the excerpt stays in the ledger: an answer may repeat what people wrote
    logger.error("webhook.misconfigured", code=code)
