# ruff: noqa: INP001  # a module, and a project of its own
"""
Whatever Apprise knows, by its URL: https://github.com/caronc/apprise/wiki

    what Apprise says                           verdict
    it was sent                                 done
    it was not                                  unknown: it does not tell a refusal from a lost
                                                answer
    nothing within the deadline                 unknown
    an error of its own                         unknown

Apprise knows no idempotency key, so a repeat says that it may be one.
"""

import asyncio
import logging
from typing import Annotated

import apprise
from pydantic import AfterValidator, Field, SecretStr

from assistance.verdict import Done, Unknown, Verdict
from consumers.channels import OutboundMessage
from runtime.settings import SettingsTable


def _known_to_apprise(url: SecretStr) -> SecretStr:
    if apprise.Apprise.instantiate(url.get_secret_value()) is None:
        raise ValueError("is not a URL that Apprise knows")
    return url


class AppriseSettings(SettingsTable):
    url: Annotated[SecretStr, AfterValidator(_known_to_apprise)] = Field(
        description="where Apprise sends to, such as ntfy://topic; a secret"
    )


class AppriseChannel:
    Settings = AppriseSettings

    def __init__(self, settings: AppriseSettings, *, call_timeout_seconds: float) -> None:
        for library in ("apprise", "urllib3"):
            # their own lines hold URLs and what people wrote
            logging.getLogger(library).setLevel(logging.CRITICAL)
        self._call_timeout_seconds = call_timeout_seconds
        self._services = apprise.Apprise()
        self._services.add(settings.url.get_secret_value())

    async def send(self, message: OutboundMessage) -> Verdict:
        try:
            async with asyncio.timeout(self._call_timeout_seconds):
                was_sent = await self._services.async_notify(
                    title=f"New request: {message.topic}",
                    body=text(message),
                    body_format=apprise.NotifyFormat.TEXT,
                )
        except TimeoutError:
            return Unknown("no_answer_in_time")
        except Exception as error:  # noqa: BLE001  # a hundred services, each with its own
            return Unknown(type(error).__name__)
        return Done("sent") if was_sent else Unknown("not_confirmed")

    async def close(self) -> None:
        """Apprise keeps no connection."""


def text(message: OutboundMessage) -> str:
    lines = [message.description]
    if message.may_be_repeat:
        lines.append("This may be a repeat: an earlier try had no answer.")
    return "\n".join([*lines, f"Request {message.request_id}"])
