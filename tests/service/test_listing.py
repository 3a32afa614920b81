"""The list of requests: filters that find, pages that stay, and an index behind each of them."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from assistance.collection import ASSISTANCES
from assistance.request import Status, accept
from assistance.routing import Destination
from sandbox.mongodb import MongoServer
from service.listing import NEWEST_FIRST, Cursor, Filters, query_of
from tests.support.processes import OurProcess
from tests.support.running_service import (
    PATH,
    Document,
    RunningService,
    Written,
    service_environment,
)

BEGAN = datetime(2026, 11, 23, 10, 0, tzinfo=UTC)
COUNT = 60


def at(number: int) -> datetime:
    """Three requests share a millisecond, so that pages end between them."""
    return BEGAN + timedelta(milliseconds=number // 3)


def seeded(number: int) -> dict[str, Any]:
    request = accept(
        request_id=str(uuid4()),
        topic="sales" if number % 2 else "pricing",
        description=str(number),
        destinations=[Destination("slack", "slack")],
        now=at(number),
    ).request
    status = list(Status)[number % 3]
    return {**request, "status": status.value}


@pytest.fixture(scope="module")
def environment(mongo_server: MongoServer) -> dict[str, str]:
    return service_environment(mongo_server.url, f"test_{uuid4().hex}")


@pytest.fixture(scope="module")
def service(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    log = tmp_path_factory.mktemp("service") / "service.log"
    process = OurProcess(("service", "run"), environment, log)
    try:
        with RunningService(process, environment) as service:
            yield service
    finally:
        process.end()


@pytest.fixture(scope="module")
def written(
    mongo_server: MongoServer, environment: Mapping[str, str], service: RunningService
) -> Iterator[Written]:
    """With the collections and indexes that the service makes."""
    service.wait_ready()
    written = Written(mongo_server.url, environment["MONGODB_DATABASE"])
    with written.client:
        yield written
        written.client.drop_database(written.database)


@pytest.fixture
def stored(written: Written) -> list[Document]:
    """What is there, the newest first."""
    documents = [seeded(number) for number in range(COUNT)]
    written.database[ASSISTANCES].delete_many({})
    written.database[ASSISTANCES].insert_many(documents)
    return sorted(
        documents, key=lambda document: (document["created_at"], document["_id"]), reverse=True
    )


def pages(service: RunningService, **filters: object) -> Iterator[list[Document]]:
    path: str | None = str(httpx.URL(PATH, params=filters))
    while path is not None:
        answer = service.http.get(path)
        assert answer.status_code == 200, answer.text
        assert set(answer.json()) == {"items", "next"}
        yield answer.json()["items"]
        path = answer.json()["next"]


def ids(documents: list[Document]) -> list[str]:
    return [document.get("_id") or document["id"] for document in documents]


def found(service: RunningService, **filters: object) -> list[str]:
    return [request_id for page in pages(service, **filters) for request_id in ids(page)]


def test_every_request_is_shown_once_the_newest_first(
    service: RunningService, stored: list[Document]
) -> None:
    assert found(service, limit=7) == ids(stored)
    assert [len(page) for page in pages(service)] == [20, 20, 20]
    assert [len(page) for page in pages(service, limit=100)] == [COUNT]
    newest = service.http.get(PATH, params={"limit": 1}).json()["items"][0]
    assert newest == service.http.get(f"{PATH}/{newest['id']}").json()


def test_what_comes_in_meanwhile_moves_no_page(
    service: RunningService, stored: list[Document], written: Written
) -> None:
    shown = []
    for page in pages(service, limit=13):
        shown += ids(page)
        written.database[ASSISTANCES].insert_one({**seeded(0), "created_at": at(COUNT)})
        written.database[ASSISTANCES].delete_one({"_id": shown[-1]})
    assert shown == ids(stored)


@pytest.mark.parametrize(
    "filters",
    [
        {"status": "failed"},
        {"topic": "sales"},
        {"status": ["failed", "succeeded"], "topic": "pricing"},
        {"created_from": at(9), "created_to": at(30)},
        {"status": "accepted", "topic": "sales", "created_from": at(9)},
        {"topic": "unheard-of"},
    ],
)
def test_filters_narrow_the_list_on_every_page(
    service: RunningService, stored: list[Document], filters: Mapping[str, Any]
) -> None:
    expected = [
        document["_id"]
        for document in stored
        if document["status"] in filters.get("status", document["status"])
        and document["topic"] == filters.get("topic", document["topic"])
        and filters.get("created_from", BEGAN) <= document["created_at"]
        and document["created_at"] < filters.get("created_to", at(3 * COUNT))
    ]
    asked = {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in filters.items()
    }
    assert found(service, limit=4, **asked) == expected
    assert bool(expected) == (filters.get("topic") != "unheard-of")


@pytest.mark.parametrize("filters", [{}, {"status": ["failed"]}, {"topic": "sales"}])
def test_a_page_reads_what_it_shows_and_little_more(
    stored: list[Document], written: Written, filters: dict[str, Any]
) -> None:
    middle = stored[COUNT // 2]
    cursor = str(Cursor(middle["created_at"], middle["_id"]))
    query = query_of(Filters.model_validate({**filters, "cursor": cursor}))
    cursor_in_mongodb = written.database[ASSISTANCES].find(
        query.criteria, sort=NEWEST_FIRST, hint=query.index, limit=5
    )
    statistics = cursor_in_mongodb.explain()["executionStats"]
    assert statistics["nReturned"] == 5
    of_the_same_moment = 3
    assert statistics["totalDocsExamined"] <= 5 + of_the_same_moment
    assert statistics["totalKeysExamined"] <= 5 + of_the_same_moment * len(Status)
    assert "'stage': 'SORT'" not in str(statistics)


def test_a_filter_that_cannot_be_is_told_where_and_why(service: RunningService) -> None:
    for query, path, code in (
        ("status=lost", "query.status.0", "enum"),
        ("state=failed", "query.state", "extra_forbidden"),
        ("topic=" + "x" * 256, "query.topic", "string_too_long"),
        ("limit=0", "query.limit", "greater_than_equal"),
        ("limit=101", "query.limit", "less_than_equal"),
        ("limit=many", "query.limit", "int_parsing"),
        ("created_from=yesterday", "query.created_from", "datetime_from_date_parsing"),
        ("created_from=2026-11-23T10:00:00", "query.created_from", "timezone_aware"),
        ("created_to=0001-01-01T00:00:00%2B14:00", "query.created_to", "moment"),
        (
            "created_from=2026-11-23T10:00:00Z&created_to=2026-11-23T11:00:00%2B01:00",
            "query.created_to",
            "range",
        ),
        ("cursor=", "query.cursor", "cursor"),
        ("cursor=next", "query.cursor", "cursor"),
        ("cursor=%F0%9F%99%82", "query.cursor", "cursor"),
        ("cursor=" + "9" * 600, "query.cursor", "string_too_long"),
    ):
        answer = service.http.get(f"{PATH}?{query}")
        assert answer.status_code == 400, (query, answer.text)
        assert answer.json()["code"] == "invalid_request"
        (error,) = answer.json()["errors"]
        assert (error["path"], error["code"]) == (path, code)
        assert error["message"]
