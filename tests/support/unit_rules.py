"""Markers by folder, and what a unit test may not do: ask for a server, or open a socket."""

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

#: A test that asks for one of these, even indirectly, needs a server process.
SERVER_FIXTURES = {
    "launched_servers",
    "own_mongo_server",
    "own_rabbit_server",
    "third_parties_process",
}

#: https://docs.python.org/3/library/audit_events.html
NETWORK_EVENTS = {"socket.bind", "socket.connect"}

_unit_test_runs = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if folder == "unit":
            item.add_marker("unit")
        if item.get_closest_marker("unit") is None:
            item.add_marker("servers")
        elif forbidden := sorted(SERVER_FIXTURES & fixtures):
            raise pytest.UsageError(
                f"{item.nodeid} is a unit test and asks for {', '.join(forbidden)}: "
                "move it out of tests/unit"
            )
        if folder == "chaos":
            item.add_marker("chaos")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    global _unit_test_runs  # noqa: PLW0603  an audit hook can never be removed, only switched
    _unit_test_runs = item.get_closest_marker("unit") is not None
    try:
        return (yield)
    finally:
        _unit_test_runs = False


def _refuse_network(event: str, arguments: tuple[object, ...]) -> None:
    if not _unit_test_runs or event not in NETWORK_EVENTS:
        return
    # an address in the file system is not the network: multiprocessing's fork server has one
    if isinstance(arguments[1], tuple):
        pytest.fail(f"a unit test opens no socket ({event}): move it out of tests/unit")


sys.addaudithook(_refuse_network)
