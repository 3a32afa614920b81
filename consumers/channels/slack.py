"""
Slack, in one of two ways:
by incoming webhook, https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks, or
by a bot's token, https://docs.slack.dev/reference/methods/chat.postMessage

    answer                                      verdict
    2xx `ok`, or JSON with ok: true             done
    2xx JSON with ok: false                     by its error word: never when it is about this
                                                message, else later
    2xx with anything else                      unknown: whoever answered, it was not Slack
    400, 413, 422                               never, unless its word is about the destination
    408, 425, 429, 5xx                          later; Retry-After is honoured
    every other status (403, 404, 410 ...), and later, and an error in the log: a revoked webhook,
    a word about the destination                an archived channel or a redirect is our
                                                configuration's fault, not the request's
    no connection, or nothing sent in time      later
    sent, and no answer                         unknown

410 says that the webhook is gone for good; all the same the requests wait for a new one, or until
their attempts are used up. A redirect is not followed.

Slack promises no idempotency, so a repeat says that it may be one.
"""

import re
from ipaddress import ip_address
from typing import Annotated, Any, Self

import orjson
from loguru import logger
from pydantic import (
    AfterValidator,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from assistance.verdict import Done, Later, Never, Unknown, Verdict
from consumers.channels import OutboundMessage
from consumers.channels.http import MESSAGE_STATUSES, Answer, HttpClient, parse_url, secrets_of
from runtime.settings import SettingsTable

POST_MESSAGE_URL = "https://slack.com/api/chat.postMessage"

#: Slack cuts at 40,000 characters; nobody reads as many.
TEXT_LIMIT_CHARACTERS = 3000

#: Words of https://docs.slack.dev/reference/methods/chat.postMessage#errors about this one message.
#: A word in neither list is tried again: the attempts bound it, and a new word fails nobody.
MESSAGE_ERRORS = frozenset(
    {
        "invalid_blocks",
        "invalid_blocks_format",
        "invalid_payload",
        "msg_blocks_too_long",
        "msg_too_long",
        "no_text",
        "too_many_attachments",
    }
)

#: Words of the same list, and of the webhooks' own, that somebody mends at Slack or in the
#: settings; every request that waits for this destination meets the same one.
DESTINATION_ERRORS = frozenset(
    {
        "access_denied",
        "account_inactive",
        "action_prohibited",
        "channel_is_archived",
        "channel_not_found",
        "invalid_auth",
        "invalid_token",
        "is_archived",
        "missing_scope",
        "no_permission",
        "no_service",
        "no_team",
        "not_authed",
        "not_in_channel",
        "restricted_action",
        "token_expired",
        "token_revoked",
        "user_not_found",
    }
)

#: Slack makes no link of these unless asked to; a webhook of the old kind may be set up to ask.
_SHOUT = re.compile(r"(?<!\w)@(?=(?:channel|here|everyone|group)\b)", re.IGNORECASE)
#: A code is logged and counted; anything else in its place may be what people wrote.
_ERROR_WORD = re.compile(r"[a-z][a-z_]{0,63}")

_WORD_JOINER = "\u2060"


def _checked(url: str, *, allow_http: bool) -> None:
    parsed = parse_url(url)
    if parsed.scheme == "http" and not allow_http and not _is_this_machine(parsed.host):
        raise ValueError("must begin with https://; http:// would send a secret in the clear")


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _checked_token(token: SecretStr) -> SecretStr:
    text = token.get_secret_value()
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError("is no token of Slack's, which is letters, digits and hyphens")
    return token


class SlackSettings(SettingsTable):
    # before the URLs, whose check reads it
    allow_http: bool = Field(
        default=False,
        description="accept http:// for another machine, which sends the secret in the clear: "
        "for a sandbox on a network of its own",
    )
    webhook_url: SecretStr | None = Field(
        default=None,
        description="the incoming webhook's URL, which is a secret; or else the token and channel",
    )
    token: Annotated[SecretStr, AfterValidator(_checked_token)] | None = Field(
        default=None, description="a bot's token with the scope chat:write; goes with the channel"
    )
    channel: str | None = Field(
        default=None, description="where the bot posts: the channel's id, such as C0123456789"
    )
    api_url: str = Field(
        default=POST_MESSAGE_URL, description="where chat.postMessage is; for a sandbox or a proxy"
    )

    @field_validator("webhook_url", "api_url")
    @classmethod
    def _not_in_the_clear(
        cls, url: SecretStr | str | None, info: ValidationInfo
    ) -> SecretStr | str | None:
        if url is not None:
            text = url if isinstance(url, str) else url.get_secret_value()
            _checked(text, allow_http=bool(info.data.get("allow_http")))
        return url

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        prefix = str(self.model_config.get("env_prefix", "")).upper()
        webhook, token, channel = (
            f"{prefix}{name}" for name in ("WEBHOOK_URL", "TOKEN", "CHANNEL")
        )
        if (self.token is None) != (self.channel is None):
            raise ValueError(f"{token} and {channel} go together")
        if self.webhook_url is None and self.token is None:
            raise ValueError(f"{webhook} is missing, or {token} and {channel} in its place")
        if self.webhook_url is not None and self.token is not None:
            raise ValueError(f"{webhook} or {token} with {channel}: give one of them, not both")
        return self


class Slack:
    Settings = SlackSettings
    #: https://docs.slack.dev/apis/web-api/rate-limits : one message a second to each channel
    RATE_PER_SECOND = 1.0

    def __init__(self, settings: SlackSettings, *, call_timeout_seconds: float) -> None:
        self._headers = {"Content-Type": "application/json; charset=utf-8"}
        self._place: dict[str, str] = {}
        if settings.token is None:
            assert settings.webhook_url is not None
            self._url = settings.webhook_url.get_secret_value()
            secrets = secrets_of(self._url)
        else:
            assert settings.channel is not None
            self._url = settings.api_url
            secrets = [settings.token.get_secret_value()]
            self._headers["Authorization"] = f"Bearer {secrets[0]}"
            self._place = {"channel": settings.channel}
        self._http = HttpClient(call_timeout_seconds=call_timeout_seconds, secrets=secrets)

    async def send(self, message: OutboundMessage) -> Verdict:
        answer = await self._http.post(
            self._url,
            content=orjson.dumps(self._place | payload(message)),
            headers={
                **self._headers,
                "X-Request-ID": message.request_id,
                "Idempotency-Key": message.idempotency_key,
            },
        )
        return judge(answer) if isinstance(answer, Answer) else answer

    async def close(self) -> None:
        await self._http.close()


def payload(message: OutboundMessage) -> dict[str, Any]:
    """What is posted: plain text, in which nothing is a link, a mention or a format."""
    repeat = (
        "This may be a repeat: Slack gave no answer to an earlier try.\n"
        if message.may_be_repeat
        else ""
    )
    return {
        "text": (
            f"New request: {escape(message.topic)}\n"
            f"{escape(message.description)}\n"
            f"{repeat}Request {escape(message.request_id)}"
        ),
        "mrkdwn": False,
        "parse": "none",
        "link_names": False,
        "unfurl_links": False,
        "unfurl_media": False,
    }


def escape(text: str) -> str:
    """
    Text that Slack shows as it is, and that calls nobody.

    https://docs.slack.dev/messaging/formatting-message-text#escaping
    """
    if len(text) > TEXT_LIMIT_CHARACTERS:
        text = text[: TEXT_LIMIT_CHARACTERS - 1] + "…"
    text = _SHOUT.sub("@" + _WORD_JOINER, text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def judge(answer: Answer) -> Verdict:
    """The table at the head of this file."""
    code, excerpt, wait_seconds = str(answer.status), answer.excerpt, answer.retry_after_seconds
    if answer.is_success:
        return _judge_ok(answer)
    if answer.asks_to_try_later:
        return Later(code, excerpt, wait_seconds)
    word = answer.text.strip()
    if word in DESTINATION_ERRORS:
        return _misconfigured(word, answer)
    if answer.status in MESSAGE_STATUSES:
        return Never(code, excerpt)
    return _misconfigured(code, answer)


def _judge_ok(answer: Answer) -> Verdict:
    if answer.text.strip() == "ok":
        return Done("200", answer.excerpt)
    match _decoded(answer.text):
        case {"ok": True}:
            return Done("200", answer.excerpt)
        case {"ok": False, "error": str(word)} if word in MESSAGE_ERRORS:
            return Never(word, answer.excerpt)
        case {"ok": False, "error": str(word)} if word in DESTINATION_ERRORS:
            return _misconfigured(word, answer)
        case {"ok": False, "error": str(word)} if _ERROR_WORD.fullmatch(word):
            return Later(word, answer.excerpt, answer.retry_after_seconds)
        case {"ok": False}:
            return Later("ok_false", answer.excerpt, answer.retry_after_seconds)
    return Unknown("unexpected_answer", answer.excerpt)


def _misconfigured(code: str, answer: Answer) -> Later:
    # the excerpt stays in the ledger: a page in Slack's place may repeat what people wrote
    logger.error("slack.misconfigured", code=code)
    return Later(code, answer.excerpt, answer.retry_after_seconds)


def _decoded(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
