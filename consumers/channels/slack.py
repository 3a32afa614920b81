"""
Slack, in one of two ways:
by incoming webhook, https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks, or
by a bot's token, https://docs.slack.dev/reference/methods/chat.postMessage

What each answer means is in `ANSWERS`. Slack promises no idempotency: a message whose answer was
lost is repeated rarely, and the repeat says that it may be one.
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
from consumers.channels.answers import Meaning, Row
from consumers.channels.http import MESSAGE_STATUSES, Answer, HttpClient, parse_url, secrets_of
from consumers.channels.text import one_line, quoted
from runtime.settings import SettingsTable

ANSWERS = (
    Row("connecting", "no connection, or nothing sent in time", Meaning.MOMENT),
    Row("connecting", "the certificate is not trusted, or TLS fails", Meaning.US),
    Row("sent", "2xx `ok`, or JSON with `ok` or `success` true", Meaning.DELIVERED),
    Row(
        "sent",
        "2xx without a text, from a webhook",
        Meaning.DELIVERED,
        "webhooks refuse by status; Slack and compatible servers sometimes omit the `ok`",
    ),
    Row(
        "sent",
        "2xx without a text, from chat.postMessage",
        Meaning.UNKNOWN,
        "it refuses with 200 too: the missing text would have said whether the message is there",
    ),
    Row(
        "sent",
        "2xx with any other text",
        Meaning.UNKNOWN,
        "something between us and Slack answered, and may have passed the message on",
    ),
    Row("sent", "2xx `ok: false`, a word about the message", Meaning.MESSAGE),
    Row("sent", "2xx `ok: false`, a word about the token or the channel", Meaning.US),
    Row(
        "sent",
        "2xx `ok: false`, any other word, such as `ratelimited`",
        Meaning.MOMENT,
        "a new word must fail no message",
    ),
    Row("sent", "400, 413, 422", Meaning.MESSAGE),
    Row("sent", "400, 413, 422 with a word about the token or the channel", Meaning.US),
    Row("sent", "408, 425, 429, 5xx", Meaning.MOMENT, "`Retry-After` may lengthen the wait"),
    Row(
        "sent",
        "any other status: 401, 403, 404, 410, a redirect",
        Meaning.US,
        "a revoked webhook, an archived channel, or a wrong URL",
    ),
    Row("sent", "no answer", Meaning.UNKNOWN, "it may have the message"),
)

POST_MESSAGE_URL = "https://slack.com/api/chat.postMessage"

#: Slack cuts a text at 40,000 characters; a description is far shorter.
TEXT_LIMIT_CHARACTERS = 3000

#: Words of https://docs.slack.dev/reference/methods/chat.postMessage#errors about this one message.
#: A word in neither list is tried again, so that a new word does not fail messages at once.
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

#: Words of the same list, and of the webhooks' own, that every message to this destination gets
#: until an operator corrects the cause, at Slack or in the settings.
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

#: Slack links these only on request; an old webhook may be configured to request it.
_SHOUT = re.compile(r"(?<!\w)@(?=(?:channel|here|everyone|group)\b)", re.IGNORECASE)
#: A code is logged and counted; anything else in its place may be a user's text.
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
    if not text or not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError("must be a token of Slack: letters, digits and hyphens")
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
        description="URL of Slack's incoming webhook, a secret; or set a token and a channel",
    )
    token: Annotated[SecretStr, AfterValidator(_checked_token)] | None = Field(
        default=None,
        description="token of a Slack bot with the scope chat:write; requires a channel",
    )
    channel: str | None = Field(
        default=None,
        min_length=1,
        description="id of the Slack channel in which the bot posts, such as C0123456789",
    )
    api_url: str = Field(
        default=POST_MESSAGE_URL,
        description="URL of Slack's method chat.postMessage, for a sandbox or a proxy",
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
        if not isinstance(answer, Answer):
            if isinstance(answer, Later) and answer.about_us:
                logger.error("slack.misconfigured", code=answer.code)
            return answer
        return judge(answer, by_webhook=not self._place)

    async def close(self) -> None:
        await self._http.close()


def payload(message: OutboundMessage) -> dict[str, Any]:
    """
    What is posted: plain text, without links, mentions and formats.

    The description is quoted: no line of it passes for one of ours.
    """
    repeat = (
        "This may be a repeat: an earlier attempt had no answer.\n" if message.may_be_repeat else ""
    )
    return {
        "text": (
            f"New request: {escape(one_line(message.topic))}\n"
            f"{escape(quoted(message.description))}\n"
            f"{repeat}Request {escape(one_line(message.request_id))}"
        ),
        "mrkdwn": False,
        "parse": "none",
        "link_names": False,
        "unfurl_links": False,
        "unfurl_media": False,
    }


def escape(text: str) -> str:
    """
    Text that Slack shows as it is, and that notifies no member.

    https://docs.slack.dev/messaging/formatting-message-text#escaping
    """
    if len(text) > TEXT_LIMIT_CHARACTERS:
        text = text[: TEXT_LIMIT_CHARACTERS - 1] + "…"
    text = _SHOUT.sub("@" + _WORD_JOINER, text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def judge(answer: Answer, *, by_webhook: bool) -> Verdict:
    """See ANSWERS."""
    code, excerpt, wait_seconds = str(answer.status), answer.excerpt, answer.retry_after_seconds
    if answer.is_success:
        return _judge_success(answer, by_webhook=by_webhook)
    if answer.asks_to_try_later:
        return Later(code, excerpt, wait_seconds)
    word = answer.text.strip()
    if word in DESTINATION_ERRORS:
        return _misconfigured(word, answer)
    if answer.status in MESSAGE_STATUSES:
        return Never(code, excerpt)
    return _misconfigured(code, answer)


def _judge_success(answer: Answer, *, by_webhook: bool) -> Verdict:
    text = answer.text.strip()
    if text == "ok" or (by_webhook and not text):
        return Done(str(answer.status), answer.excerpt)
    match _decoded(text):
        case {"ok": True} | {"success": True}:
            return Done(str(answer.status), answer.excerpt)
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
    # the excerpt stays in the ledger: a page in Slack's place may repeat a user's text
    logger.error("slack.misconfigured", code=code)
    return Later(code, answer.excerpt, answer.retry_after_seconds, about_us=True)


def _decoded(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
