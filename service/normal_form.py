"""Equivalent forms of a request: HEAD as GET without the body, and a path with a trailing slash."""

from http import HTTPMethod

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class NormalForm:
    """
    ASGI middleware.

    Starlette would redirect a trailing slash before the key is checked, to a URL without the prefix
    that a proxy may have removed; and it answers HEAD with 405.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = send

        async def send_without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await reply(message)

        if scope["type"] == "http":
            # in place: what the router adds to the scope is read by the log
            scope["path"] = scope["path"].removesuffix("/") or "/"
            if scope["method"] == HTTPMethod.HEAD:
                scope["method"], send = HTTPMethod.GET.value, send_without_body
        await self._app(scope, receive, send)
