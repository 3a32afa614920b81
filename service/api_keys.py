"""Authentication: the header X-API-KEY."""

import hmac
from collections.abc import Callable, Coroutine, Mapping
from hashlib import sha256
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader
from loguru import logger
from pydantic import SecretStr

from service.content_headers import check_content_headers
from service.problems import too_many_wrong_keys, unauthorized
from service.request_log import note
from service.wrong_keys import WrongKeys, address_of

#: Documents the header in OpenAPI and adds the page's button; `guarded_by` does the check.
API_KEY_HEADER = APIKeyHeader(name="X-API-KEY", scheme_name="api_key", auto_error=False)


class ApiKeys:
    def __init__(self, keys: Mapping[str, SecretStr]) -> None:
        """keys: each key by its name."""
        self._digests = {
            name: digest(key.get_secret_value().encode()) for name, key in keys.items()
        }

    def name_of(self, key: bytes) -> str | None:
        """The time this takes depends neither on the key nor on where it differs."""
        sent = digest(key)
        matches = [
            name for name, known in self._digests.items() if hmac.compare_digest(sent, known)
        ]
        return matches[0] if matches else None


def digest(key: bytes) -> bytes:
    # digests have one length; comparing the keys themselves would reveal theirs
    return sha256(key).digest()


def guarded_by(keys: ApiKeys, wrong_keys: WrongKeys) -> type[APIRoute]:
    """
    Routes that check the API key first, then the headers that describe the body.
    `request.state.caller` is then the digest of the key; the key's name is logged.

    A dependency would be too late: FastAPI reads and parses the body before it runs one, so callers
    without a key would have their bodies read and their JSON errors reported.
    """

    class GuardedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_known_caller(request: Request) -> Response:
                # as the header's bytes were decoded
                key = request.headers.get(API_KEY_HEADER.model.name, "").encode("latin-1")
                if not key:
                    raise unauthorized()
                address = address_of(request.scope)
                _check_not_throttled(wrong_keys, address)
                name = keys.name_of(key)
                if name is None:
                    wrong_keys.count(address)
                    raise unauthorized()
                note(request.scope, caller=name)
                request.state.caller = digest(key)
                check_content_headers(request)
                return await handle(request)

            return handle_known_caller

    return GuardedRoute


def _check_not_throttled(wrong_keys: WrongKeys, address: str) -> None:
    wait_seconds = wrong_keys.wait_seconds(address)
    if wait_seconds > 0:
        if wrong_keys.is_news(address):
            logger.warning("caller.throttled", address=address)
        raise too_many_wrong_keys(wait_seconds)
