"""What limits the relay: everything but RabbitMQ, RabbitMQ alone, and both at once."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders import NULL_PUBLISHER, Contender, running
from benchmarks.drain import rate_of, watch_growth
from benchmarks.field import Field, open_field
from sandbox.servers import Servers


@dataclass(frozen=True)
class Ceilings:
    """Events or messages a second; `beside`: while the other one ran too."""

    null_publisher: float
    flood: float
    null_publisher_beside: float
    flood_beside: float


def measure_ceilings(servers: Servers, folder: Path, count: int, flood_count: int) -> Ceilings:
    """count: events the null publisher passes; flood_count: messages of the flood alone."""
    with open_field(servers, folder) as field:
        null_alone = _pass_events(field, count)
    with open_field(servers, folder) as field, running(_flood(flood_count), field) as flood:
        flood_alone = rate_of(watch_growth(field.depth, flood_count, flood, time.monotonic()))
    with open_field(servers, folder) as field:
        null_beside, flood_beside = _pass_events_beside_flood(field, count)
    return Ceilings(null_alone, flood_alone, null_beside, flood_beside)


def _pass_events(field: Field, count: int) -> float:
    settled_before = _append_backlog(field, count)
    began = time.monotonic()
    with running(NULL_PUBLISHER, field) as process:
        return rate_of(
            watch_growth(lambda: field.settled() - settled_before, count, process, began)
        )


def _pass_events_beside_flood(field: Field, count: int) -> tuple[float, float]:
    settled_before = _append_backlog(field, count)
    began = time.monotonic()
    depths: list[tuple[float, int]] = []

    def passed() -> int:
        settled = field.settled() - settled_before
        if settled:
            depths.append((time.monotonic(), field.depth()))
        return settled

    with running(_flood(None), field), running(NULL_PUBLISHER, field) as process:
        null_rate = rate_of(watch_growth(passed, count, process, began))
    return null_rate, rate_of(depths)


def _append_backlog(field: Field, count: int) -> int:
    """A backlog behind a saved position; returns how many were settled before it."""
    with running(NULL_PUBLISHER, field):
        field.wait_position()
    field.append(count)
    field.wait_quiet()
    return field.settled()


def _flood(count: int | None) -> Contender:
    limit = [] if count is None else [str(count)]
    return Contender("flood", [sys.executable, "-m", "benchmarks.flood", *limit])
