"""Limits the size of request bodies and the time that they may take to arrive."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import body_too_large, body_too_slow


class BodyLimit:
    """ASGI middleware; Starlette's own answers in plain text instead of a problem document."""

    def __init__(self, app: ASGIApp, *, limit_bytes: int, limit_seconds: float) -> None:
        self._app = app
        self._limit_bytes = limit_bytes
        self._limit_seconds = limit_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # h11 has checked that it is a number
        if int(Headers(scope=scope).get("content-length", "0")) > self._limit_bytes:
            too_large = body_too_large(self._limit_bytes).response(scope)
            await too_large(scope, receive, send)
            return
        received_bytes = 0
        complete = False
        deadline = asyncio.get_running_loop().time() + self._limit_seconds

        async def receive_up_to_the_limit() -> Message:
            nonlocal received_bytes, complete
            try:
                # a call after the end of the body waits for the client to disconnect
                async with asyncio.timeout_at(None if complete else deadline):
                    message = await receive()
            except TimeoutError:
                raise body_too_slow(self._limit_seconds) from None
            received_bytes += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received_bytes > self._limit_bytes:
                raise body_too_large(self._limit_bytes)
            return message

        await self._app(scope, receive_up_to_the_limit, send)
