"""
Slack, by incoming webhook: https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks

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

import asyncio
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Annotated, Any

import httpx
import orjson
from loguru import logger
from pydantic import AfterValidator, Field, SecretStr

from assistance.verdict import Done, Later, Never, Unknown, Verdict, cut_excerpt
from consumers.channels import Message
from runtime.settings import SettingsTable

#: Slack cuts at 40,000 characters; nobody reads as many.
TEXT_LIMIT_CHARACTERS = 3000

#: Slack answers in a few words; more is not Slack, and is not read.
ANSWER_LIMIT_BYTES = 4096

TRY_LATER = frozenset(
    {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
)

#: Statuses that refuse what was sent, and not whoever sent it or where to.
MESSAGE_STATUSES = frozenset(
    {
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
    }
)

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
_WORD_JOINER = "\u2060"


def _is_http(url: SecretStr) -> SecretStr:
    try:
        parsed = httpx.URL(url.get_secret_value())
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ValueError("must be the webhook's whole URL, beginning with https://")
    return url


class SlackSettings(SettingsTable):
    webhook_url: Annotated[SecretStr, AfterValidator(_is_http)] = Field(
        description="the incoming webhook's URL, which is a secret"
    )


class Slack:
    Settings = SlackSettings

    def __init__(self, settings: SlackSettings, *, call_timeout_seconds: float) -> None:
        self._url = settings.webhook_url.get_secret_value()
        self._secret = httpx.URL(self._url).path.strip("/")
        self._call_timeout_seconds = call_timeout_seconds
        self._http = httpx.AsyncClient(
            # the deadline below bounds the whole call; httpx' own bound each step of it only
            timeout=None,  # noqa: S113
            trust_env=False,
            follow_redirects=False,
            # a kept connection that Slack closes at the moment of use looks like a lost answer
            limits=httpx.Limits(max_keepalive_connections=0),
            headers={"User-Agent": "assistance-relay", "Accept-Encoding": "identity"},
        )

    async def send(self, message: Message) -> Verdict:
        sent = False

        async def watch(event: str, _details: Any) -> None:
            nonlocal sent
            sent = sent or event.endswith("send_request_headers.started")

        try:
            async with asyncio.timeout(self._call_timeout_seconds):
                answer = await self._post(message, watch)
        except TimeoutError:
            return Unknown("no_answer_in_time") if sent else Later("connect_timeout")
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            # its words may hold the URL, which is the secret
            code = _snake(type(error).__name__)
            return Unknown(code) if sent else Later(code)
        return judge(*answer, secret=self._secret, now=datetime.now(UTC))

    async def close(self) -> None:
        await self._http.aclose()

    async def _post(self, message: Message, watch: Any) -> tuple[int, Mapping[str, str], bytes]:
        headers = {
            "Content-Type": "application/json",
            "X-Request-ID": message.request_id,
            "Idempotency-Key": message.idempotency_key,
        }
        async with self._http.stream(
            "POST",
            self._url,
            content=orjson.dumps(payload(message)),
            headers=headers,
            extensions={"trace": watch},
        ) as response:
            body = b""
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > ANSWER_LIMIT_BYTES:
                    break
        return response.status_code, response.headers, body[:ANSWER_LIMIT_BYTES]


def payload(message: Message) -> dict[str, Any]:
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


def judge(
    status: int, headers: Mapping[str, str], body: bytes, *, secret: str, now: datetime
) -> Verdict:
    """The table at the head of this file."""
    said = body.decode("utf-8", "replace")
    excerpt = cut_excerpt(said.replace(secret, "…") if secret else said)
    wait_seconds = retry_after_seconds(headers.get("Retry-After"), now)
    if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        return _judge_ok(said, excerpt, wait_seconds)
    if status in TRY_LATER or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Later(str(status), excerpt, wait_seconds)
    word = said.strip()
    if word in DESTINATION_ERRORS:
        return _misconfigured(word, excerpt, wait_seconds)
    if status in MESSAGE_STATUSES:
        return Never(str(status), excerpt)
    return _misconfigured(str(status), excerpt, wait_seconds)


def _judge_ok(said: str, excerpt: str, wait_seconds: float | None) -> Verdict:
    if said.strip() == "ok":
        return Done("200", excerpt)
    try:
        answer = orjson.loads(said)
    except orjson.JSONDecodeError:
        answer = None
    match answer:
        case {"ok": True}:
            return Done("200", excerpt)
        case {"ok": False, "error": str(word)} if word in MESSAGE_ERRORS:
            return Never(word, excerpt)
        case {"ok": False, "error": str(word)} if word in DESTINATION_ERRORS:
            return _misconfigured(word, excerpt, wait_seconds)
        case {"ok": False, "error": str(word)}:
            return Later(cut_excerpt(word), excerpt, wait_seconds)
        case {"ok": False}:
            return Later("ok_false", excerpt, wait_seconds)
    return Unknown("unexpected_answer", excerpt)


def _misconfigured(code: str, excerpt: str, wait_seconds: float | None) -> Later:
    # the excerpt stays in the ledger: a page in Slack's place may repeat what people wrote
    logger.error("slack.misconfigured", code=code)
    return Later(code, excerpt, wait_seconds)


def retry_after_seconds(value: str | None, now: datetime) -> float | None:
    """`Retry-After` in either form, seconds or an HTTP date; nonsense counts as none."""
    if value is None:
        return None
    if re.fullmatch(r"\d{1,9}", value.strip(), re.ASCII):
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max((moment - now).total_seconds(), 0.0)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
