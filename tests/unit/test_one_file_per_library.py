"""motor can be replaced in `runtime/mongo.py` alone, and backoff in `runtime/retry.py` alone."""

import ast
from collections.abc import Iterator

import pytest

from tests.support.paths import REPOSITORY

PRODUCT = ("outbox", "assistance", "runtime", "service", "relay", "consumers")

#: Calls that motor and PyMongo's asyncio API answer differently: with a coroutine, or at once.
DIFFERENT_IN_DRIVERS = {
    "aggregate",
    "aggregate_raw_batches",
    "list_collections",
    "list_databases",
    "list_indexes",
    "list_search_indexes",
    "start_session",
    "start_transaction",
}


def calls_that_depend_on_the_driver(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called, owner = node.func.attr, ast.unparse(node.func.value)
            closes_client = called == "close" and owner.rpartition(".")[2].endswith("client")
            if called in DIFFERENT_IN_DRIVERS or closes_client:
                yield f"line {node.lineno}: {owner}.{called}"


@pytest.mark.parametrize("package", PRODUCT)
def test_only_runtime_mongo_calls_what_differs_between_drivers(package: str) -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}, {call}"
        for path in sorted((REPOSITORY / package).rglob("*.py"))
        # without PyMongo's types, a client is another library's
        if path != REPOSITORY / "runtime" / "mongo.py"
        and "runtime.mongo" in (text := path.read_text())
        for call in calls_that_depend_on_the_driver(text)
    ]
    assert not found, "call the function of runtime/mongo.py instead"


@pytest.mark.parametrize(
    "source",
    [
        "outbox.aggregate(pipeline)",
        "session.start_transaction()",
        "await database.client.start_session(snapshot=True)",
        "self._client.close()",
        "client.close()",
    ],
)
def test_a_bare_call_is_found(source: str) -> None:
    assert list(calls_that_depend_on_the_driver(source))


@pytest.mark.parametrize("source", ["aggregate(outbox, pipeline)", "connection.close()"])
def test_other_calls_are_allowed(source: str) -> None:
    assert not list(calls_that_depend_on_the_driver(source))
