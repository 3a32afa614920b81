"""
The API's error answers.

Each has the members of RFC 9457 (type, title, status, detail, instance) and those of the original
contract (code, message, errors), so that clients of either kind can read it.
https://www.rfc-editor.org/rfc/rfc9457
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from math import ceil
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
REQUEST_TIMEOUT = "request_timeout"
UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
TOO_MANY_WRONG_KEYS = "too_many_wrong_keys"
REQUEST_IN_PROGRESS = "request_in_progress"
IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
UNAVAILABLE = "unavailable"
INTERNAL_ERROR = "internal_error"

#: Accepting a request takes milliseconds.
IN_PROGRESS_RETRY_AFTER_SECONDS = 1

#: MongoDB elects a new primary within a few seconds.
RETRY_AFTER_SECONDS = 2


class FieldError(TypedDict):
    """path: location of the error (`body.topic`); code: its machine-readable kind (`enum`)."""

    path: str
    code: str
    message: str


class Problem(HTTPException):
    """Raise it to end a call with an error answer; `message` is for people."""

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
        "The header X-API-KEY is missing, or its key is not valid",
        headers={"WWW-Authenticate": "ApiKey"},
    )


def request_not_found() -> Problem:
    return Problem(HTTPStatus.NOT_FOUND, REQUEST_NOT_FOUND, "No assistance request has this id")


def request_in_progress() -> Problem:
    return Problem(
        HTTPStatus.CONFLICT,
        REQUEST_IN_PROGRESS,
        "A call with this Idempotency-Key is still in progress; try again",
        headers={"Retry-After": str(IN_PROGRESS_RETRY_AFTER_SECONDS)},
    )


def idempotency_key_reused() -> Problem:
    return Problem(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        IDEMPOTENCY_KEY_REUSED,
        "This Idempotency-Key was used with another topic or description; choose a new key",
    )


def body_too_large(limit_bytes: int) -> Problem:
    return Problem(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        BODY_TOO_LARGE,
        f"The body is longer than {limit_bytes} bytes",
        headers={"Connection": "close"},
    )


def body_too_slow(limit_seconds: float) -> Problem:
    return Problem(
        HTTPStatus.REQUEST_TIMEOUT,
        REQUEST_TIMEOUT,
        f"The body took longer than {limit_seconds:g} seconds",
        headers={"Connection": "close"},
    )


def not_json() -> Problem:
    return Problem(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        UNSUPPORTED_MEDIA_TYPE,
        "The header Content-Type names another type than JSON; send application/json",
        headers={"Accept": "application/json"},
    )


def unsupported_encoding() -> Problem:
    return Problem(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        UNSUPPORTED_MEDIA_TYPE,
        "The header Content-Encoding names an encoding that is not supported; send plain JSON",
        headers={"Accept-Encoding": "identity"},
    )


def too_many_wrong_keys(wait_seconds: float) -> Problem:
    return Problem(
        HTTPStatus.TOO_MANY_REQUESTS,
        TOO_MANY_WRONG_KEYS,
        "Too many wrong keys came from this address; try again later",
        headers={"Retry-After": str(ceil(wait_seconds))},
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
    """An error that the framework raised: unknown path or method, or an unreadable body."""
    if isinstance(error, Problem):
        return error
    if error.status_code == HTTPStatus.BAD_REQUEST:
        return invalid_request(
            [{"path": "body", "code": "json_invalid", "message": "The body cannot be read as JSON"}]
        )
    status = HTTPStatus(error.status_code)
    code = status.phrase.lower().replace(" ", "_")
    return Problem(status, code, status.description or status.phrase, headers=error.headers)


#: pydantic's error type for an unknown member.
EXTRA = "extra_forbidden"


def from_validation_error(details: Sequence[Any]) -> Problem:
    """details: pydantic's errors, each with `loc`, `type`, `msg` and perhaps `ctx`."""
    return invalid_request([_field_error(detail) for detail in details])


def _field_error(detail: Any) -> FieldError:
    if detail["type"] == "json_invalid":
        # the location of this error ends with a character position instead of a member's name
        position = detail["loc"][-1]
        message = f"Not JSON: {detail['ctx']['error']} (character {position})"
        return {"path": "body", "code": "json_invalid", "message": message}
    path = ".".join(str(part) for part in detail["loc"])
    message = "Unknown parameter" if detail["type"] == EXTRA else detail["msg"]
    return {"path": path, "code": detail["type"], "message": message}


SCHEMA_NAME = "Problem"

SCHEMA: dict[str, Any] = {
    "title": SCHEMA_NAME,
    "description": "RFC 9457 problem details, extended by `code`, `message` and `errors`",
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
    """OpenAPI responses that document these problems, each with its headers and an example."""
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
