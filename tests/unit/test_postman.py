"""docs/postman covers the API, and a wrong collection is noticed; tests/service sends its calls."""

import json
from copy import deepcopy
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest

from service.app import create_app
from service.settings import ServiceSettings
from tests.support.paths import REPOSITORY
from tests.support.postman import NotUnderstoodError, read_calls, uncovered

FOLDER = REPOSITORY / "docs" / "postman"
COLLECTION: dict[str, Any] = json.loads((FOLDER / "collection.json").read_text())
ENVIRONMENT: dict[str, Any] = json.loads((FOLDER / "environment.json").read_text())


@pytest.fixture(scope="module")
def paths() -> dict[str, Any]:
    settings = ServiceSettings.model_validate(
        {"mongodb_url": "mongodb://localhost/", "api_keys": "0123456789abcdef"}
    )
    paths: dict[str, Any] = create_app(settings, MagicMock(), MagicMock()).openapi()["paths"]
    return paths


def test_the_collection_covers_every_operation(paths: dict[str, Any]) -> None:
    assert uncovered(read_calls(COLLECTION, ENVIRONMENT), paths) == set()


def test_a_missing_call_and_a_call_of_nothing_are_found(paths: dict[str, Any]) -> None:
    calls = read_calls(COLLECTION, ENVIRONMENT)
    without = [call for call in calls if not call.url.endswith("/timeline")]
    assert uncovered(without, paths) == {("get", "/api/assistances/{id}/timeline")}
    renamed = deepcopy(COLLECTION)
    url = renamed["item"][-1]["request"]["url"]
    url["raw"], url["path"] = "{{baseUrl}}/ready", ["ready"]
    assert uncovered(read_calls(renamed, ENVIRONMENT), paths) == {
        ("get", "/ready"),
        ("get", "/readyz"),
    }


def test_the_first_three_requests_are_those_of_the_first_service() -> None:
    calls = read_calls(COLLECTION, ENVIRONMENT)[:3]
    assert [(call.method, call.url) for call in calls] == [
        ("GET", "{{baseUrl}}/docs"),
        ("POST", "{{baseUrl}}/api/assistances"),
        ("GET", "{{baseUrl}}/api/assistances/{{requestId}}"),
    ]
    for call in calls[1:]:
        assert ("X-API-KEY", "{{apiKey}}") in call.headers


def test_the_environment_holds_no_secret() -> None:
    values = {value["key"]: value["value"] for value in ENVIRONMENT["values"]}
    assert values["apiKey"] == ""


def collection(*lines: str, **request: Any) -> dict[str, Any]:
    url = {"raw": "{{baseUrl}}/a", "host": ["{{baseUrl}}"], "path": ["a"]}
    return {
        "item": [
            {
                "name": "a call",
                "event": [{"listen": "test", "script": {"exec": list(lines)}}],
                "request": {"method": "GET", "header": [], "url": url} | request,
            }
        ],
        "variable": [{"key": "seen", "value": ""}],
    }


STATUS = 'pm.test("status", () => pm.response.to.have.status(200));'


@pytest.mark.parametrize(
    "lines",
    [
        (),
        (STATUS, STATUS),
        (STATUS, 'pm.test("t", () => pm.expect(pm.response.json().a).to.be.ok);'),
        (STATUS, 'pm.test("t", () => pm.expect(pm.response.json().a).to.eql(1));'),
        (STATUS, 'pm.test("t", () => true);'),
        (STATUS, 'pm.expect(pm.response.json().a).to.eql("1");'),
        (STATUS, STATUS.replace("200", "200 || true")),
        (STATUS, 'pm.collectionVariables.set("other", pm.response.json().a);'),
        (STATUS, 'pm.test("t", () => pm.expect(pm.response.json().a).to.eql(pm.globals.a));'),
    ],
)
def test_a_script_that_would_not_be_checked_is_refused(lines: tuple[str, ...]) -> None:
    with pytest.raises(NotUnderstoodError, match="a call: "):
        read_calls(collection(*lines), ENVIRONMENT)


def test_a_value_of_a_variable_that_nothing_sets_is_refused() -> None:
    line = EQUAL_SEEN.replace("seen", "other")
    with pytest.raises(NotUnderstoodError, match=r"a call: unknown variables \['other'\]"):
        read_calls(collection(STATUS, line), ENVIRONMENT)


@pytest.mark.parametrize(
    "request_part",
    [
        {"url": {"raw": "{{baseUrl}}/b", "host": ["{{baseUrl}}"], "path": ["a"]}},
        {"url": {"raw": "{{other}}/a", "host": ["{{other}}"], "path": ["a"]}},
        {"header": [{"key": "X-API-KEY", "value": "{{other}}"}]},
        {"body": {"mode": "raw", "raw": "{{other}}"}},
        {"body": {"mode": "formdata", "formdata": []}},
        {"auth": {"type": "bearer"}},
    ],
)
def test_a_request_that_would_not_be_sent_as_postman_does_is_refused(
    request_part: dict[str, Any],
) -> None:
    with pytest.raises(NotUnderstoodError, match="a call: "):
        read_calls(collection(STATUS, **request_part), ENVIRONMENT)


EQUAL = 'pm.test("t", () => pm.expect(pm.response.json().a).to.eql("x"));'
EQUAL_SEEN = EQUAL.replace('"x"', 'pm.collectionVariables.get("seen")')
REMEMBER = 'pm.collectionVariables.set("seen", pm.response.json().a);'


@pytest.mark.parametrize(
    ("lines", "answer", "holds"),
    [
        ((STATUS, EQUAL, EQUAL_SEEN), httpx.Response(200, json={"a": "x"}), True),
        ((STATUS,), httpx.Response(202, json={"a": "x"}), False),
        ((STATUS, EQUAL), httpx.Response(200, json={"a": "y"}), False),
        ((STATUS, EQUAL_SEEN), httpx.Response(200, json={"a": "y"}), False),
    ],
)
def test_each_assertion_can_fail(
    lines: tuple[str, ...], answer: httpx.Response, holds: bool
) -> None:
    [call] = read_calls(collection(*lines), ENVIRONMENT)
    variables = {"baseUrl": "http://api", "seen": "x"}
    with httpx.Client(transport=httpx.MockTransport(lambda _request: answer)) as http:
        if holds:
            call.send(http, variables)
        else:
            with pytest.raises(AssertionError, match="a call: "):
                call.send(http, variables)


def test_a_remembered_member_is_kept_for_the_next_call() -> None:
    [call] = read_calls(collection(STATUS, REMEMBER), ENVIRONMENT)
    variables = {"baseUrl": "http://api"}
    answer = httpx.Response(200, json={"a": "kept"})
    with httpx.Client(transport=httpx.MockTransport(lambda _request: answer)) as http:
        call.send(http, variables)
    assert variables["seen"] == "kept"
