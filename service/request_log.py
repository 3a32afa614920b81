"""One log line per call: route, status and duration, never what people wrote."""

from time import monotonic
from traceback import format_tb
from typing import Any

from loguru import logger
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import internal_error

#: Called every few seconds by whatever monitors the process.
PROBES = frozenset({"/livez", "/readyz"})

SERVER_ERRORS = 500


def note(scope: Scope, **fields: Any) -> None:
    """Add fields, such as `request_id`, to the log line of this call."""
    scope["notes"].update(fields)


class RequestLog:
    """The outermost ASGI middleware: it logs unhandled exceptions and answers them with 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["notes"] = {}
        # the scope's own may be replaced on the way
        method, started = scope["method"], monotonic()
        status: int | None = None

        async def send_and_remember(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_remember)
        except Exception as error:
            _log_defect(scope, error)
            if status is not None:
                raise
            await internal_error().response(scope)(scope, receive, send_and_remember)
        finally:
            duration_ms = round((monotonic() - started) * 1000, 1)
            _log_call(scope, method, status, duration_ms)


def _log_call(scope: Scope, method: str, status: int | None, duration_ms: float) -> None:
    # the template, not the path: anything that a client types would end up in the log
    route = getattr(scope.get("route"), "path", "unknown")
    if status is None or status >= SERVER_ERRORS:
        level = "WARNING"
    else:
        level = "DEBUG" if route in PROBES else "INFO"
    logger.bind(
        method=method,
        route=route,
        status=status,
        duration_ms=duration_ms,
        **scope["notes"],
    ).log(level, "http.answered" if status is not None else "http.not_answered")


def _log_defect(scope: Scope, error: Exception) -> None:
    # without its message: a refused write, for example, quotes the document
    note(scope, error=type(error).__name__)
    code = getattr(error, "code", None)
    logger.bind(code=code, stack="".join(format_tb(error.__traceback__)), **scope["notes"]).error(
        "http.failed"
    )
