"""
A webhook receiver: every name is an address, everything is taken, 204 is the answer.

It keeps what it was signed with (https://www.standardwebhooks.com), and checks nothing.
"""

from dataclasses import replace
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import Response

from sandbox.third_parties.answering import Desk, Judgement, read_body, received_call


def webhook_app(desk: Desk) -> FastAPI:
    app = FastAPI(title="Webhook receiver, in the sandbox", openapi_url=None)

    @app.post("/webhooks/{name}")
    async def receive(request: Request, name: str) -> Response:
        body = (await read_body(request)).decode(errors="replace")
        taken = Judgement(
            accepted=True, response=Response(status_code=HTTPStatus.NO_CONTENT), summary="204"
        )
        call = received_call(request, "webhook", name, {"body": body})
        id = request.headers.get("webhook-id", call.idempotency_key)
        return await desk.answer(request, replace(call, idempotency_key=id), taken)

    return app
