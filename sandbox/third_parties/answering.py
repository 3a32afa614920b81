"""How an HTTP third party answers a call: by its rules, or by the current misbehaviour."""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.requests import ClientDisconnect

from sandbox.third_parties.inbox import Call, Inbox, Kind
from sandbox.third_parties.listener import reset
from sandbox.third_parties.misbehaviour import Misbehaviour, Misbehaviours

MAX_BODY_BYTES = 256 * 1024
SECRET_HEADERS = {"authorization", "cookie"}


@dataclass(frozen=True)
class Judgement:
    """What a well-behaved third party makes of a call; `summary` goes into the inbox."""

    accepted: bool
    response: Response
    summary: str


class Desk:
    """Where every HTTP call is answered and filed."""

    def __init__(self, inbox: Inbox, misbehaviours: Misbehaviours) -> None:
        self._inbox = inbox
        self._misbehaviours = misbehaviours

    async def answer(self, request: Request, call: Call, judgement: Judgement) -> Response:
        misbehaviour = self._misbehaviours.take(call.kind)
        if misbehaviour is None:
            self._file(call, judgement)
            return judgement.response
        return await self._misbehave(request, call, judgement, misbehaviour)

    async def _misbehave(
        self, request: Request, call: Call, judgement: Judgement, misbehaviour: Misbehaviour
    ) -> Response:
        match misbehaviour.mode:
            case "status":
                response = _status(misbehaviour)
                self._refuse(call, f"{response.status_code} on request")
                return response
            case "ok_false":
                self._refuse(call, f"200 ok: false, {misbehaviour.error}")
                return JSONResponse({"ok": False, "error": misbehaviour.error})
            case "slow":
                self._file(call, judgement, after=f" after {misbehaviour.delay_seconds:g} s")
                await self._misbehaviours.rest(misbehaviour)
                return judgement.response
            case "hang":
                self._refuse(call, "no answer")
                await _first(self._misbehaviours.released(call.kind), _caller_left(request))
            case "reset":
                self._refuse(call, "connection reset")
            case "accept_then_fail":
                self._file(call, judgement, after=", answer lost")
        reset(request.state.transport)
        return Response()  # goes nowhere: the connection is cut

    def _file(self, call: Call, judgement: Judgement, after: str = "") -> None:
        self._inbox.keep(call, accepted=judgement.accepted, answer=judgement.summary + after)

    def _refuse(self, call: Call, answer: str) -> None:
        self._inbox.keep(call, accepted=False, answer=answer)


async def read_body(request: Request) -> bytes:
    """
    Read the whole body. Raises HTTPException 413 beyond 256 KiB: the inbox is in memory; and 400
    when the caller leaves in the middle of it.
    """
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    except ClientDisconnect:
        raise HTTPException(HTTPStatus.BAD_REQUEST) from None
    return bytes(body)


def readable_headers(request: Request) -> list[tuple[str, str]]:
    """Every header in the order of arrival, as a list: a repeated one shows twice."""
    return [
        (name, "(hidden)" if name in SECRET_HEADERS else value)
        for name, value in request.headers.items()
    ]


def received_call(request: Request, kind: Kind, destination: str, content: dict[str, Any]) -> Call:
    return Call(
        kind=kind,
        destination=destination,
        request_id=request.headers.get("x-request-id"),
        idempotency_key=request.headers.get("idempotency-key"),
        content={**content, "headers": readable_headers(request)},
    )


def _status(misbehaviour: Misbehaviour) -> Response:
    code = misbehaviour.code or HTTPStatus.INTERNAL_SERVER_ERROR
    retry_after = misbehaviour.retry_after
    return PlainTextResponse(
        misbehaviour.body if misbehaviour.body is not None else f"{code} on request",
        status_code=code,
        headers={} if retry_after is None else {"Retry-After": str(retry_after)},
    )


async def _caller_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _first(*awaitables: Awaitable[None]) -> None:
    """Return when the first is done; the others are cancelled."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
