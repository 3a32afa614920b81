"""Who may call: the header X-API-KEY."""

import hmac
from collections.abc import Callable, Coroutine, Iterable
from hashlib import sha256
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader
from pydantic import SecretStr

from service.problems import unauthorized

#: For the OpenAPI page, its button included; the check itself is the route's, below.
API_KEY_HEADER = APIKeyHeader(name="X-API-KEY", scheme_name="api_key", auto_error=False)


class ApiKeys:
    def __init__(self, keys: Iterable[SecretStr]) -> None:
        self._digests = [digest(key.get_secret_value().encode()) for key in keys]

    def know(self, key: bytes) -> bool:
        """Takes the same time whichever key it is and wherever it differs."""
        sent = digest(key)
        matches = [hmac.compare_digest(sent, known) for known in self._digests]
        return any(matches)


def digest(key: bytes) -> bytes:
    # digests are equally long; comparing the keys themselves would tell their length
    return sha256(key).digest()


def guarded_by(keys: ApiKeys) -> type[APIRoute]:
    """
    Routes that ask for the key before anything else.

    Who calls is then known as `request.state.caller`, the digest of the key.

    FastAPI reads and parses the body before it runs a dependency: a stranger would be told what is
    wrong with his JSON.
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
