"""A message to a third party, and settings of the channels that send one."""

from datetime import UTC, datetime
from typing import Any

from consumers.channels import OutboundMessage
from consumers.channels.email import EmailSettings
from consumers.channels.webhook import WebhookSettings

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)

LOOPBACK = "127.0.0.0/8"
SIGNING_SECRET = "whsec_" + "aHVzaGh1c2hodXNoaHVzaGh1c2hodXNo"
NEXT_SIGNING_SECRET = "whsec_" + "bmV4dG5leHRuZXh0bmV4dG5leHRuZXh0"


def outbound_message(
    description: str = "Is it in stock?",
    *,
    topic: str = "sales",
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


def email_settings(host: str, port: int, **others: Any) -> EmailSettings:
    values: dict[str, Any] = {
        "smtp_host": host,
        "smtp_port": port,
        "smtp_tls": "none",
        "sender": "assistant@example.org",
        "recipients": "pricing@example.org, boss@example.org",
        **others,
    }
    return EmailSettings(**values)


def webhook_settings(url: str, **others: str) -> WebhookSettings:
    values: dict[str, Any] = {"url": url, "signing_secrets": SIGNING_SECRET, **others}
    return WebhookSettings(**values)
