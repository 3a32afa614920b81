"""
What channels over HTTP have in common.

One deadline covers the whole call. Redirects are not followed, proxies of the environment are not
used, and only the beginning of an answer is read. The client watches whether anything was sent:
before that the third party cannot have the message, after it the outcome of a lost answer is
unknown. Once the status has arrived it decides, even if the rest of the answer never comes.

The URL, or a part of it, is a secret: no words of an error are kept, except the reason that the
operating system gave, and what is kept of an answer is redacted.
"""

import asyncio
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import httpx

from assistance.verdict import Later, Unknown
from consumers.channels.causes import causes_of, system_reason
from consumers.channels.excerpts import cut_excerpt
from consumers.channels.hosts import MAX_PORT, check_host
from runtime import clock

#: Third parties answer in a few words; a longer answer is an HTML page of something in between.
ANSWER_LIMIT_BYTES = 4096

TRY_LATER = frozenset(
    {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
)

#: Statuses that refuse the content of the call, rather than its sender or its URL.
MESSAGE_STATUSES = frozenset(
    {
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
    }
)

#: A shorter part of a URL is a word, such as `services`, and not a secret.
MIN_SECRET_CHARACTERS = 12


#: A longer wait is read as this one. The cap on what a third party may ask for is a setting.
MAX_RETRY_AFTER_SECONDS = 1e9


class NotConnected(httpx.TransportError):
    """We refused to connect, or could not; `code` and the text hold no secret."""

    code: str
    about_us: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """
    text: as received, perhaps with a secret or a user's words: for the verdict only, never stored.
    excerpt: what may be stored and shown.
    """

    status: int
    text: str
    excerpt: str
    retry_after_seconds: float | None

    @property
    def is_success(self) -> bool:
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES

    @property
    def asks_to_try_later(self) -> bool:
        return self.status in TRY_LATER or self.status >= HTTPStatus.INTERNAL_SERVER_ERROR


class HttpClient:
    """
    secrets: redacted in excerpts.
    transport: makes the connections; it must not read proxies from the environment.
    """

    def __init__(
        self,
        *,
        call_timeout_seconds: float,
        secrets: Sequence[str],
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._call_timeout_seconds = call_timeout_seconds
        self._secrets = secrets
        self._client = httpx.AsyncClient(
            transport=transport or new_transport(),
            # the deadline below bounds the whole call; httpx' own bound each step of it only
            timeout=None,  # noqa: S113
            trust_env=False,
            follow_redirects=False,
            headers={"User-Agent": "assistance-relay", "Accept-Encoding": "identity"},
        )

    async def post(
        self, url: str, *, content: bytes, headers: Mapping[str, str]
    ) -> Answer | Later | Unknown:
        """The answer, or the verdict on a call without one; raises nothing."""
        sent = False
        response: httpx.Response | None = None
        body = bytearray()

        async def watch(event: str, _details: Any) -> None:
            nonlocal sent
            sent = sent or event.endswith("send_request_headers.started")

        try:
            async with (
                asyncio.timeout(self._call_timeout_seconds),
                self._client.stream(
                    "POST", url, content=content, headers=headers, extensions={"trace": watch}
                ) as response,
            ):
                async for piece in response.aiter_raw():
                    body += piece
                    if len(body) >= ANSWER_LIMIT_BYTES:
                        break
        except Exception as error:  # noqa: BLE001  # only here is it known what had been sent
            if response is None:
                return _judge_silence(error, sent=sent)
        # cookies of one answer must not go with another call
        self._client.cookies.clear()
        return read_answer(
            response.status_code,
            response.headers,
            bytes(body[:ANSWER_LIMIT_BYTES]),
            secrets=self._secrets,
            now=clock.now(),
        )

    async def close(self) -> None:
        await self._client.aclose()


def new_transport() -> httpx.AsyncHTTPTransport:
    return httpx.AsyncHTTPTransport(
        # certifi's authorities, or those of SSL_CERT_FILE
        verify=httpx.create_ssl_context(),
        trust_env=False,
        # a kept connection that is closed at the moment of use looks like a lost answer
        limits=httpx.Limits(max_keepalive_connections=0),
    )


def read_answer(
    status: int, headers: Mapping[str, str], body: bytes, *, secrets: Sequence[str], now: datetime
) -> Answer:
    text = body.decode("utf-8", "replace")
    excerpt = text
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        excerpt = excerpt.replace(secret, "…")
    wait_seconds = retry_after_seconds(headers.get("Retry-After"), now)
    return Answer(status, text, cut_excerpt(excerpt), wait_seconds)


def secrets_of(url: str) -> list[str]:
    """The parts of a URL that must be redacted in an answer."""
    parsed = httpx.URL(url)
    paths = [parsed.path.strip("/"), parsed.raw_path.decode("ascii").strip("/")]
    words = re.split(r"[/?&=]", "/".join(paths))
    return [*paths, *(word for word in words if len(word) >= MIN_SECRET_CHARACTERS)]


def parse_url(text: str) -> httpx.URL:
    """
    The URL of a third party over HTTP.

    Raises ValueError when it can never be called; the error does not repeat it.
    """
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError("must be a whole URL, beginning with https://")
    if url.userinfo:
        raise ValueError("must hold no user name and no password: they would end up in logs")
    if url.port is not None and not 1 <= url.port <= MAX_PORT:
        raise ValueError(f"must have a port from 1 to {MAX_PORT}")
    try:
        check_host(url.raw_host.decode("ascii"))
    except ValueError as reason:
        raise ValueError(f"its host {reason}") from None
    return url


def retry_after_seconds(value: str | None, now: datetime) -> float | None:
    """
    `Retry-After` in either form, seconds or an HTTP date; a past date is 0, nonsense is None.

    https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3
    """
    if value is None:
        return None
    value = value.strip(" \t")
    if re.fullmatch(r"\d+", value, re.ASCII):
        return min(float(value), MAX_RETRY_AFTER_SECONDS)
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max((moment - now).total_seconds(), 0.0)


def _judge_silence(error: Exception, *, sent: bool) -> Later | Unknown:
    if isinstance(error, NotConnected):
        return Later(error.code, cut_excerpt(str(error)), about_us=error.about_us)
    if isinstance(error, TimeoutError):
        return Unknown("no_answer_in_time") if sent else Later("connect_timeout")
    # its words may hold the URL
    code = _snake(type(error).__name__)
    if sent:
        return Unknown(code)
    if any(isinstance(cause, ssl.SSLError) for cause in causes_of(error)):
        return Later("tls_failed", about_us=True)
    return Later(code, system_reason(error))


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
