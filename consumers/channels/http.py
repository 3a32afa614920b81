"""
What calls over HTTP have in common, whoever answers.

One deadline for the whole call; no redirect is followed, no proxy of the environment is used, no
more than the beginning of an answer is read. Whether anything had been sent is watched: it tells
"it does not have it" from "it may have it". Once the status has arrived it decides, even if the
rest of the answer never comes.

The URL, or a part of it, is a secret: no error's words are kept, and what is kept of an answer is
redacted.
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
from consumers.channels.excerpts import cut_excerpt
from runtime import clock

#: Third parties answer in a few words; more is a page that nobody reads here.
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

#: A shorter part of a URL is a word, such as `services`, and no secret.
MIN_SECRET_CHARACTERS = 12


class NotConnected(httpx.TransportError):
    """No connection was made, for a reason of our own; `code` and the words hold no secret."""

    code: str


@dataclass(frozen=True, slots=True)
class Answer:
    """
    text: as it came, so perhaps with a secret or with what people wrote: to be judged, not kept.
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
    secrets: what is blotted out of excerpts.
    transport: how connections are made; any that reads no proxy from the environment.
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
        """The answer, or what it means that there is none; raises nothing."""
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
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            if response is None:
                return _judge_silence(error, sent=sent)
        # no call is to remember what was answered to another
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
    """What an answer may repeat of a URL that nobody else may know."""
    parsed = httpx.URL(url)
    paths = [parsed.path.strip("/"), parsed.raw_path.decode("ascii").strip("/")]
    words = re.split(r"[/?&=]", "/".join(paths))
    return [*paths, *(word for word in words if len(word) >= MIN_SECRET_CHARACTERS)]


def parse_url(text: str) -> httpx.URL:
    """
    An HTTP third party's URL, as it may stand in a setting.

    Raises ValueError, which does not repeat it.
    """
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError("must be a whole URL, beginning with https://")
    if url.userinfo:
        raise ValueError("must hold no user name and no password: they would end up in logs")
    return url


def retry_after_seconds(value: str | None, now: datetime) -> float | None:
    """`Retry-After` in either form, seconds or an HTTP date; nonsense counts as none."""
    if value is None:
        return None
    if re.fullmatch(r"\d{1,9}", value.strip(), re.ASCII):
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max((moment - now).total_seconds(), 0.0)


def _judge_silence(error: Exception, *, sent: bool) -> Later | Unknown:
    if isinstance(error, NotConnected):
        return Later(error.code, cut_excerpt(str(error)))
    if isinstance(error, TimeoutError):
        return Unknown("no_answer_in_time") if sent else Later("connect_timeout")
    # its words may hold the URL
    code = _snake(type(error).__name__)
    if sent:
        return Unknown(code)
    return Later("tls_failed" if _is_about_tls(error) else code)


def _is_about_tls(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
