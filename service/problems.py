"""
What the API answers when it does not do what was asked.

Each answer serves two kinds of client: the members of RFC 9457 (type, title, status, detail,
instance) and, beside them, those of the first contract (code, message, errors).
https://www.rfc-editor.org/rfc/rfc9457
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, TypedDict
from urllib.parse import quote

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

MEDIA_TYPE = "application/problem+json"

INVALID_REQUEST = "invalid_request"
UNAUTHORIZED = "unauthorized"
REQUEST_NOT_FOUND = "request_not_found"
BODY_TOO_LARGE = "body_too_large"
REQUEST_IN_PROGRESS = "request_in_progress"
IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
UNAVAILABLE = "unavailable"
INTERNAL_ERROR = "internal_error"

#: A request is accepted within milliseconds, or not at all.
IN_PROGRESS_RETRY_AFTER_SECONDS = 1

#: MongoDB elects a new primary in a few seconds; asking every two is often enough.
RETRY_AFTER_SECONDS = 2


class FieldError(TypedDict):
    """path: where it is (`body.topic`); code: what is wrong, for machines (`enum`)."""

    path: str
    code: str
    message: str


class Problem(HTTPException):
    """Raised wherever a request ends early; `message` is read by people."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        message: str,
        *,
        errors: Sequence[FieldError] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code
        self.errors = errors

    def response(self, scope: Scope) -> JSONResponse:
        status = HTTPStatus(self.status_code)
        body = problem_body(
            status, self.code, self.detail, instance=quote(scope["path"]), errors=self.errors
        )
        return JSONResponse(body, status, self.headers, MEDIA_TYPE)


def problem_body(
    status: HTTPStatus,
    code: str,
    message: str,
    *,
    instance: str,
    errors: Sequence[FieldError] | None = None,
) -> dict[str, Any]:
    body = {
        "type": f"urn:assistance:problem:{code}",
        "title": status.phrase,
        "status": status.value,
        "detail": message,
        "instance": instance,
        "code": code,
        "message": message,
    }
    return body if errors is None else {**body, "errors": list(errors)}


def invalid_request(errors: Sequence[FieldError]) -> Problem:
    listed = "; ".join(f"{error['path']}: {error['message']}" for error in errors)
    return Problem(HTTPStatus.BAD_REQUEST, INVALID_REQUEST, listed, errors=errors)


def unauthorized() -> Problem:
    return Problem(
        HTTPStatus.UNAUTHORIZED,
        UNAUTHORIZED,
        "The header X-API-KEY is missing, or its key is not known here",
        headers={"WWW-Authenticate": "ApiKey"},
    )


def request_not_found() -> Problem:
    return Problem(HTTPStatus.NOT_FOUND, REQUEST_NOT_FOUND, "No assistance request has this id")


def request_in_progress() -> Problem:
    return Problem(
        HTTPStatus.CONFLICT,
        REQUEST_IN_PROGRESS,
        "A call with this Idempotency-Key is still being answered; try again",
        headers={"Retry-After": str(IN_PROGRESS_RETRY_AFTER_SECONDS)},
    )


def idempotency_key_reused() -> Problem:
    return Problem(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        IDEMPOTENCY_KEY_REUSED,
        "This Idempotency-Key came with another topic or description before; choose a new key",
    )


def body_too_large(limit_bytes: int) -> Problem:
    return Problem(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        BODY_TOO_LARGE,
        f"The body is longer than {limit_bytes} bytes",
        headers={"Connection": "close"},
    )


def unavailable(message: str) -> Problem:
    return Problem(
        HTTPStatus.SERVICE_UNAVAILABLE,
        UNAVAILABLE,
        message,
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def internal_error() -> Problem:
    return Problem(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        INTERNAL_ERROR,
        "Something went wrong on our side; it has been logged",
    )


def from_http_exception(error: HTTPException) -> Problem:
    """What the framework raises itself: no such path, no such method, an unreadable body."""
    if isinstance(error, Problem):
        return error
    if error.status_code == HTTPStatus.BAD_REQUEST:
        return invalid_request(
            [{"path": "body", "code": "json_invalid", "message": "The body cannot be read as JSON"}]
        )
    status = HTTPStatus(error.status_code)
    code = status.phrase.lower().replace(" ", "_")
    return Problem(status, code, status.description or status.phrase, headers=error.headers)


#: pydantic's word for a member that nobody asked for.
EXTRA = "extra_forbidden"


def from_validation_error(details: Sequence[Any]) -> Problem:
    """details: pydantic's errors, each with `loc`, `type`, `msg` and perhaps `ctx`."""
    return invalid_request([_field_error(detail) for detail in details])


def _field_error(detail: Any) -> FieldError:
    if detail["type"] == "json_invalid":
        # its location holds the number of a character, which is no path
        position = detail["loc"][-1]
        message = f"Not JSON: {detail['ctx']['error']} (character {position})"
        return {"path": "body", "code": "json_invalid", "message": message}
    path = ".".join(str(part) for part in detail["loc"])
    message = "No such parameter is known" if detail["type"] == EXTRA else detail["msg"]
    return {"path": path, "code": detail["type"], "message": message}


SCHEMA_NAME = "Problem"

SCHEMA: dict[str, Any] = {
    "title": SCHEMA_NAME,
    "description": "RFC 9457 problem details, with `code`, `message` and `errors` beside",
    "type": "object",
    "required": ["type", "title", "status", "detail", "instance", "code", "message"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string", "format": "uri-reference"},
        "code": {"type": "string"},
        "message": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["path", "code", "message"],
                "properties": {
                    "path": {"type": "string", "examples": ["body.topic"]},
                    "code": {"type": "string", "examples": ["enum"]},
                    "message": {"type": "string"},
                },
            },
        },
    },
}


def documented(*problems: Problem, instance: str) -> dict[int | str, dict[str, Any]]:
    """How OpenAPI tells of these problems: each with its headers and an example."""
    return {problem.status_code: _documented(problem, instance) for problem in problems}


def _documented(problem: Problem, instance: str) -> dict[str, Any]:
    status = HTTPStatus(problem.status_code)
    example = problem_body(
        status, problem.code, problem.detail, instance=instance, errors=problem.errors
    )
    content = {
        MEDIA_TYPE: {"schema": {"$ref": f"#/components/schemas/{SCHEMA_NAME}"}, "example": example}
    }
    headers = {
        name: {"schema": {"type": "string"}, "example": value}
        for name, value in (problem.headers or {}).items()
    }
    return {"description": status.phrase, "content": content, "headers": headers}
