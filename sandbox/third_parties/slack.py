"""
Slack's two doors for a message: an incoming webhook, and `chat.postMessage`.

The answers are those of
https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks (plain text and a
status code) and https://docs.slack.dev/reference/methods/chat.postMessage (always 200; `ok`
decides). There is no rate limit unless one is configured. Teams are `T...`, services `B...`; any
token is good unless it begins with `revoked`.
"""

import time
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from sandbox.third_parties.answering import Desk, Judgement, read_body, received_call

REVOKED = "revoked"


def slack_app(desk: Desk) -> FastAPI:
    app = FastAPI(title="Slack, in the sandbox", openapi_url=None)

    @app.post("/services/{team}/{service}/{token}")
    async def incoming_webhook(request: Request, team: str, service: str, token: str) -> Response:
        message = _decode(await read_body(request))
        call = received_call(request, "slack", f"{team}/{service}", _content(message))
        return await desk.answer(request, call, _judge_webhook(team, service, token, message))

    @app.post("/api/chat.postMessage")
    async def chat_post_message(request: Request) -> Response:
        message = _decode(await read_body(request))
        channel = str((message or {}).get("channel") or "")
        call = received_call(request, "slack", channel, _content(message))
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        return await desk.answer(request, call, _judge_post(bearer, channel, message))

    return app


def _judge_webhook(
    team: str, service: str, token: str, message: dict[str, Any] | None
) -> Judgement:
    if not team.startswith("T"):
        return _plain(HTTPStatus.NOT_FOUND, "no_team")
    if not service.startswith("B"):
        return _plain(HTTPStatus.NOT_FOUND, "no_service")
    if token.startswith(REVOKED):
        return _plain(HTTPStatus.FORBIDDEN, "invalid_token")
    if message is None:
        return _plain(HTTPStatus.BAD_REQUEST, "invalid_payload")
    if not _says_something(message):
        return _plain(HTTPStatus.BAD_REQUEST, "no_text")
    return _plain(HTTPStatus.OK, "ok")


def _judge_post(bearer: str, channel: str, message: dict[str, Any] | None) -> Judgement:
    if not bearer:
        return _not_ok("not_authed")
    if bearer.startswith(REVOKED):
        return _not_ok("invalid_auth")
    if message is None:
        return _not_ok("invalid_json")
    if not channel:
        return _not_ok("channel_not_found")
    if not _says_something(message):
        return _not_ok("no_text")
    sent_at = f"{time.time():.6f}"
    posted = {"type": "message", "text": message.get("text", ""), "ts": sent_at}
    return Judgement(
        accepted=True,
        response=JSONResponse({"ok": True, "channel": channel, "ts": sent_at, "message": posted}),
        summary="200 ok: true",
    )


def _plain(code: HTTPStatus, text: str) -> Judgement:
    return Judgement(
        accepted=code == HTTPStatus.OK,
        response=HTMLResponse(text, status_code=code),  # Slack labels its plain text so
        summary=f"{code.value} {text}",
    )


def _not_ok(error: str) -> Judgement:
    return Judgement(
        accepted=False,
        response=JSONResponse({"ok": False, "error": error}),
        summary=f"200 ok: false, {error}",
    )


def _decode(body: bytes) -> dict[str, Any] | None:
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return message if isinstance(message, dict) else None


def _says_something(message: dict[str, Any]) -> bool:
    text = message.get("text")
    has_text = isinstance(text, str) and bool(text)
    return has_text or bool(message.get("blocks")) or bool(message.get("attachments"))


def _content(message: dict[str, Any] | None) -> dict[str, Any]:
    text = (message or {}).get("text")
    return {"text": text if isinstance(text, str) else "", "payload": message}
