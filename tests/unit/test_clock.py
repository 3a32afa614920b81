"""One clock decides, MongoDB's; a machine whose own is wrong says so once and changes nothing."""

import ast
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from runtime import clock
from tests.support.paths import REPOSITORY

HOUR = timedelta(hours=1)

#: Who may read the machine's own clock: the clock, and the log, whose lines are this machine's.
READERS = {"runtime/clock.py"}
CLOCKS = {"datetime.now", "datetime.utcnow", "time.time", "time", "date.today"}


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    monkeypatch.setattr(clock, "_clock", type(clock._clock)())
    seen: list[str] = []
    sink = logger.add(lambda message: seen.append(message.record["message"]), level="WARNING")
    yield seen
    logger.remove(sink)


@pytest.mark.parametrize("ahead", [HOUR, -HOUR])
def test_the_servers_clock_is_taken(
    warnings: list[str], monkeypatch: pytest.MonkeyPatch, ahead: timedelta
) -> None:
    monkeypatch.setattr(clock, "machine_time", lambda: datetime.now(UTC) + ahead)
    assert abs(clock.now() - datetime.now(UTC)) > HOUR / 2
    for _ in range(3):
        clock.note_server_time(datetime.now(UTC))
        assert abs(clock.now() - datetime.now(UTC)) < timedelta(seconds=1)
    assert warnings == ["clock.differs"]
    assert clock.difference_seconds() == pytest.approx(ahead.total_seconds(), abs=1)
    assert "3600 s " + ("ahead of" if ahead > timedelta() else "behind") in str(
        clock.describe_difference()
    )


@pytest.mark.usefixtures("warnings")
def test_it_is_never_ahead_of_the_server() -> None:
    """Otherwise a delivery that is due at once would look due later to the server."""
    read = datetime.now(UTC)
    clock.note_server_time(read)
    assert clock.now() <= datetime.now(UTC)


def test_clocks_that_agree_are_not_reported(warnings: list[str]) -> None:
    clock.note_server_time(datetime.now(UTC) - timedelta(seconds=1))
    assert clock.describe_difference() is None
    assert not warnings


def test_a_difference_that_comes_back_is_reported_again(warnings: list[str]) -> None:
    for server_time in (datetime.now(UTC) - HOUR, datetime.now(UTC), datetime.now(UTC) - HOUR):
        clock.note_server_time(server_time)
    assert warnings == ["clock.differs"] * 2


def readings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CLOCKS:
            yield f"{path.relative_to(REPOSITORY)}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "package", ["outbox", "assistance", "runtime", "service", "relay", "consumers"]
)
def test_nothing_else_reads_the_machines_clock(package: str) -> None:
    found: list[Any] = [
        reading
        for path in sorted((REPOSITORY / package).rglob("*.py"))
        if str(path.relative_to(REPOSITORY)) not in READERS
        for reading in readings(path)
    ]
    assert not found, "use runtime.clock.now()"
