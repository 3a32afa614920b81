"""The requests of docs/postman, in order, against the real service."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from sandbox.mongodb import MongoServer
from tests.conftest import RunProcess
from tests.support.paths import REPOSITORY
from tests.support.running_service import RunningService, start_service

FOLDER = REPOSITORY / "docs" / "postman"
ITEMS: list[dict[str, Any]] = json.loads((FOLDER / "collection.json").read_text())["item"]

STATUS = re.compile(r"pm\.response\.to\.have\.status\((\d+)\)")
EQUAL = re.compile(r'pm\.expect\(pm\.response\.json\(\)\.(\w+)\)\.to\.eql\("(\w+)"\)')
REMEMBER = re.compile(r'pm\.collectionVariables\.set\("(\w+)", pm\.response\.json\(\)\.(\w+)\)')


def script(item: dict[str, Any]) -> str:
    return "\n".join(item["event"][0]["script"]["exec"])


def send(item: dict[str, Any], http: httpx.Client, variables: dict[str, str]) -> httpx.Response:
    """Send the request as Postman would, check its script's assertions, keep its variables."""

    def filled(text: str) -> str:
        return re.sub(r"\{\{(\w+)\}\}", lambda found: variables[found[1]], text)

    request = item["request"]
    answer = http.request(
        request["method"],
        filled(request["url"]["raw"]),
        headers={header["key"]: filled(header["value"]) for header in request["header"]},
        content=filled(request.get("body", {}).get("raw", "")),
    )
    (status,) = STATUS.findall(script(item))
    assert answer.status_code == int(status), f"{item['name']}: {answer.text}"
    for member, value in EQUAL.findall(script(item)):
        assert answer.json()[member] == value, item["name"]
    for name, member in REMEMBER.findall(script(item)):
        variables[name] = answer.json()[member]
    return answer


def operation(item: dict[str, Any], paths: dict[str, Any]) -> tuple[str, str] | None:
    path = item["request"]["url"]["raw"].removeprefix("{{baseUrl}}").partition("?")[0]
    for template in sorted(paths, key=lambda template: "{" in template):
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path):
            return item["request"]["method"].lower(), template
    return None


@pytest.fixture
def service(
    run_process: RunProcess, mongo_server: MongoServer, database_name: str
) -> Iterator[RunningService]:
    with start_service(run_process, mongo_server.url, database_name) as service:
        service.wait_ready()
        yield service


def test_the_collection_runs_and_covers_every_operation(service: RunningService) -> None:
    variables = {"baseUrl": service.url, "apiKey": service.keys[0]}
    with service.client({}) as http:
        for item in ITEMS:
            send(item, http, variables)
        paths = http.get("/openapi.json").json()["paths"]
    existing = {(method, path) for path, methods in paths.items() for method in methods}
    used = {operation(item, paths) for item in ITEMS} - {None}
    assert used == existing


def test_the_first_three_requests_are_those_of_the_first_service() -> None:
    requests = [item["request"] for item in ITEMS[:3]]
    assert [(request["method"], request["url"]["raw"]) for request in requests] == [
        ("GET", "{{baseUrl}}/docs"),
        ("POST", "{{baseUrl}}/api/assistances"),
        ("GET", "{{baseUrl}}/api/assistances/{{requestId}}"),
    ]
    for request in requests[1:]:
        assert {"key": "X-API-KEY", "value": "{{apiKey}}"} in request["header"]


def test_the_environment_holds_no_secret() -> None:
    values = json.loads((FOLDER / "environment.json").read_text())["values"]
    assert {value["key"]: value["value"] for value in values}["apiKey"] == ""
