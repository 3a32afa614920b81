"""Draining a backlog that was appended while the contender was stopped."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.contenders import Contender, running
from benchmarks.field import (
    Field,
    MeasurementFailed,
    cpu_seconds,
    open_field,
    server_processes,
    wait_until,
)
from sandbox.server_process import ServerProcess
from sandbox.servers import Servers

#: Each poll of the queue costs the broker a little; the last arrival is known to this precision.
POLL_SECONDS = 0.02

DEADLINE_SECONDS = 180.0


@dataclass(frozen=True)
class Drain:
    """
    One drained backlog.

    rate_per_second: between the first arrival seen in the queue and the last.
    seconds_from_start: from the start of the process to the last arrival.
    settled_rate_per_second: until the last event was marked and the position saved behind it; None
    for a contender without marks.
    cpu_microseconds: of the contender's own process, from its start to the last arrival, per event.
    servers_cpu_microseconds: of both servers together.
    curve: seconds since the start, messages in the queue.
    """

    contender: str
    count: int
    rate_per_second: float
    seconds_from_start: float
    settled_rate_per_second: float | None
    cpu_microseconds: float
    servers_cpu_microseconds: float
    curve: list[tuple[float, int]]


def drain_stream(
    servers: Servers,
    folder: Path,
    contender: Contender,
    count: int,
    *,
    events_per_key: int = 1,
    marks: bool = False,
) -> Drain:
    """The position is saved, the contender stops, the backlog is appended, it starts again."""
    with open_field(servers, folder) as field:
        with running(contender, field) as process:
            make_ready(field, process)
            if marks:
                field.wait_position()
        field.purge()
        field.append(count, events_per_key=events_per_key)
        return _drain(field, contender, count, marks=marks)


def drain_first_start(
    servers: Servers, folder: Path, contender: Contender, count: int, *, marks: bool = False
) -> Drain:
    """The backlog was there before the contender ever ran."""
    with open_field(servers, folder) as field:
        field.append(count)
        return _drain(field, contender, count, marks=marks)


def make_ready(field: Field, process: ServerProcess) -> None:
    """Append an event now and then until one arrives: then it works, and it has a position."""

    def arrives() -> bool:
        process.check_alive()
        field.append(1, state="pending")
        return bool(field.depth())

    wait_until(arrives, f"{process.name} passes an event on", max_pause_seconds=0.1)
    last_depth = -1

    def all_arrived() -> bool:
        nonlocal last_depth
        before, last_depth = last_depth, field.depth()
        return before == last_depth

    wait_until(all_arrived, f"{process.name} has passed on the rest", max_pause_seconds=0.3)


def _drain(field: Field, contender: Contender, count: int, *, marks: bool) -> Drain:
    field.wait_quiet()
    settled_before = field.settled()
    servers = server_processes(field.servers)
    servers_before = cpu_seconds(servers)
    began = time.monotonic()
    with running(contender, field) as process:
        curve = watch_growth(field.depth, count, process, began)
        assert process.pid is not None
        own = cpu_seconds([psutil.Process(process.pid)])
        of_servers = cpu_seconds(servers) - servers_before
        if marks:
            wait_until(lambda: field.settled() >= settled_before + count, "everything is settled")
            settled_at = time.monotonic() - began
    first, last = curve[0], curve[-1]
    return Drain(
        contender=contender.name,
        count=count,
        rate_per_second=rate_of(curve),
        seconds_from_start=last[0],
        settled_rate_per_second=(count - first[1]) / (settled_at - first[0]) if marks else None,
        cpu_microseconds=own / count * 1e6,
        servers_cpu_microseconds=of_servers / count * 1e6,
        curve=curve,
    )


def watch_growth(
    poll: Callable[[], int], count: int, process: ServerProcess, began: float
) -> list[tuple[float, int]]:
    """The results of `poll`, from the first that is not zero until it reaches `count`."""
    curve: list[tuple[float, int]] = []
    while not curve or curve[-1][1] < count:
        alive, seen = process.running, poll()
        now = time.monotonic() - began
        if seen and (not curve or seen > curve[-1][1]):
            curve.append((now, seen))
        elif not alive or now > DEADLINE_SECONDS:
            raise MeasurementFailed(
                f"{process.name} brought {seen} of {count} events\n{process.last_words()}"
            )
        time.sleep(POLL_SECONDS)
    if len(curve) < 2:  # noqa: PLR2004 - a rate needs two points
        raise MeasurementFailed(f"{process.name}: {count} events are too few for a rate")
    return curve


def rate_of(curve: list[tuple[float, int]]) -> float:
    (first_at, first), (last_at, last) = curve[0], curve[-1]
    return (last - first) / (last_at - first_at)
