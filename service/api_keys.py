"""Authentication: the header X-API-KEY."""

import hmac
from collections.abc import Callable, Coroutine, Iterable
from hashlib import sha256
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader
from pydantic import SecretStr

from service.problems import unauthorized

#: Documents the header in OpenAPI and adds the page's button; `guarded_by` does the check.
API_KEY_HEADER = APIKeyHeader(name="X-API-KEY", scheme_name="api_key", auto_error=False)


class ApiKeys:
    def __init__(self, keys: Iterable[SecretStr]) -> None:
        self._digests = [digest(key.get_secret_value().encode()) for key in keys]

    def know(self, key: bytes) -> bool:
        """The time this takes depends neither on the key nor on where it differs."""
        sent = digest(key)
        matches = [hmac.compare_digest(sent, known) for known in self._digests]
        return any(matches)


def digest(key: bytes) -> bytes:
    # digests have one length; comparing the keys themselves would reveal theirs
    return sha256(key).digest()


def guarded_by(keys: ApiKeys) -> type[APIRoute]:
    """
    Routes that check the API key first. `request.state.caller` is then the digest of the key.

    A dependency would be too late: FastAPI reads and parses the body before it runs one, so callers
    without a key would have their bodies read and their JSON errors reported.
    """

    class GuardedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_known_caller(request: Request) -> Response:
                # as the header's bytes were decoded
                key = request.headers.get(API_KEY_HEADER.model.name, "").encode("latin-1")
                if not keys.know(key):
                    raise unauthorized()
                request.state.caller = digest(key)
                return await handle(request)

            return handle_known_caller

    return GuardedRoute
