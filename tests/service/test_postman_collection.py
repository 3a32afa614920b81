"""The requests of docs/postman, in order, against the real service; see also tests/unit."""

import json
from collections.abc import Iterator

import pytest

from sandbox.mongodb import MongoServer
from tests.conftest import RunProcess
from tests.support.paths import REPOSITORY
from tests.support.postman import read_calls, uncovered
from tests.support.running_service import RunningService, start_service

FOLDER = REPOSITORY / "docs" / "postman"


@pytest.fixture
def service(
    run_process: RunProcess, mongo_server: MongoServer, database_name: str
) -> Iterator[RunningService]:
    with start_service(run_process, mongo_server.url, database_name) as service:
        service.wait_ready()
        yield service


def test_the_collection_runs_and_covers_every_operation(service: RunningService) -> None:
    calls = read_calls(
        json.loads((FOLDER / "collection.json").read_text()),
        json.loads((FOLDER / "environment.json").read_text()),
    )
    variables = {"baseUrl": service.url, "apiKey": service.keys[0]}
    with service.client({}) as http:
        for call in calls:
            call.send(http, variables)
        assert uncovered(calls, http.get("/openapi.json").json()["paths"]) == set()
