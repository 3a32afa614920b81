"""The API as an ASGI application: its routes, middleware and the answer to each error."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pymongo.errors import PyMongoError
from starlette.exceptions import HTTPException

from runtime.mongo import Client, CommitUnknown, is_transient
from service import problems
from service.api_keys import ApiKeys
from service.assistances import assistances_router
from service.body_limit import BodyLimit
from service.health import health_router
from service.normal_form import NormalForm
from service.readiness import Readiness
from service.request_log import RequestLog, note
from service.settings import ServiceSettings
from service.store import RequestStore
from service.wrong_keys import WrongKeys

DESCRIPTION = (
    "Accepts requests for assistance and delivers each one to the right team. A request that was "
    "answered 202 is stored durably and is never lost."
)

#: Beside the statuses documented for each call. It also keeps FastAPI from documenting its own
#: 422: invalid input is answered 400.
ANY_OTHER_PROBLEM: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "Any other problem, such as 404 or 405",
        "content": {
            problems.MEDIA_TYPE: {
                "schema": {"$ref": f"#/components/schemas/{problems.SCHEMA_NAME}"}
            }
        },
    }
}


class Api(FastAPI):
    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["components"]["schemas"][problems.SCHEMA_NAME] = problems.SCHEMA
        return document


def create_app(settings: ServiceSettings, client: Client, readiness: Readiness) -> FastAPI:
    app = Api(
        title="Assistance requests",
        version="1",
        description=DESCRIPTION,
        redoc_url=None,
        responses=ANY_OTHER_PROBLEM,
        # the first clients may send JSON without saying that it is
        strict_content_type=False,
        redirect_slashes=False,
    )
    app.include_router(
        assistances_router(
            routing=settings.routing,
            keys=ApiKeys(settings.api_keys),
            wrong_keys=WrongKeys(settings.api_wrong_keys_per_minute),
            store=RequestStore(
                client, client[settings.mongodb_database], settings.api_deadline_seconds
            ),
            readiness=readiness,
            idempotency_window_seconds=settings.idempotency_window_seconds,
        )
    )
    app.include_router(health_router(readiness))
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(CommitUnknown, _answer_commit_unknown)
    app.add_exception_handler(PyMongoError, _answer_mongodb_error)
    app.add_middleware(
        BodyLimit,
        limit_bytes=settings.api_body_limit_bytes,
        limit_seconds=settings.api_receive_deadline_seconds,
    )
    app.add_middleware(NormalForm)
    app.add_middleware(RequestLog)
    return app


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        route = getattr(request.scope.get("route"), "path", "")
        # the framework lists the methods of one function only; a path may have several
        if methods := request.app.openapi()["paths"].get(route):
            allowed = {*methods, "head"} if "get" in methods else methods
            error.headers = {"Allow": ", ".join(sorted(allowed)).upper()}
    return problems.from_http_exception(error).response(request.scope)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problems.from_validation_error(error.errors()).response(request.scope)


async def _answer_commit_unknown(request: Request, error: Exception) -> Response:
    note(request.scope, error=type(error).__name__)
    return problems.unavailable(
        "MongoDB did not confirm in time: the request was accepted as a whole or not at all; "
        "with an Idempotency-Key it is safe to ask again"
    ).response(request.scope)


async def _answer_mongodb_error(request: Request, error: Exception) -> Response:
    if not is_transient(error):
        raise error
    note(request.scope, error=type(error).__name__)
    return problems.unavailable("MongoDB does not answer; try again").response(request.scope)
