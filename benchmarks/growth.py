"""Whether anything grows: the relay's memory over many events, its cost with the outbox's size."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil

from benchmarks.contenders import OURS, running
from benchmarks.drain import make_ready
from benchmarks.field import Field, cpu_seconds, open_field, server_processes, wait_until
from benchmarks.statistics import Spread, ratios
from sandbox.servers import Servers

MEGABYTE = 1024 * 1024
SAMPLE_SECONDS = 0.2
CHUNK_EVENTS = 5_000


@dataclass(frozen=True)
class Memory:
    """
    Megabytes resident over `count` events: early is the mean over the second tenth of the time,
    late over the last. What Python and its libraries take before any event is `idle`.
    """

    count: int
    idle_mb: float
    early_mb: float
    late_mb: float
    most_mb: float
    curve: list[tuple[float, float]]


@dataclass(frozen=True)
class Growth:
    """
    The same events with few and with many published ones in the outbox: times an event, many to
    few, round by round.

    elapsed: of the drain; relay_cpu and servers_cpu: CPU time, which noise affects least.
    """

    few: int
    many: int
    elapsed: Spread
    relay_cpu: Spread
    servers_cpu: Spread


@dataclass(frozen=True)
class Cost:
    elapsed: float
    relay_cpu: float
    servers_cpu: float


def measure_memory(servers: Servers, folder: Path, count: int) -> Memory:
    """Events keep coming until `count` have passed through one relay."""
    with open_field(servers, folder) as field, running(OURS, field) as process:
        make_ready(field, process)
        assert process.pid is not None
        relay = psutil.Process(process.pid)
        idle = relay.memory_info().rss / MEGABYTE
        with _sampled(relay) as curve:
            for passed in range(0, count, CHUNK_EVENTS):
                field.append(min(CHUNK_EVENTS, count - passed), state="pending")
                _wait_settled(field, passed)
                if field.depth() > 10 * CHUNK_EVENTS:
                    field.purge()  # the broker's memory is not what is measured
            _wait_settled(field, count)
    tenth = max(1, len(curve) // 10)
    return Memory(
        count=count,
        idle_mb=idle,
        early_mb=_mean(curve[tenth : 2 * tenth]),
        late_mb=_mean(curve[-tenth:]),
        most_mb=max(megabytes for _, megabytes in curve),
        curve=curve,
    )


def measure_growth(
    servers: Servers, folder: Path, *, few: int, many: int, count: int, rounds: int
) -> Growth:
    """Two outboxes side by side, drained in turn; what was drained is taken out again."""
    with ExitStack() as fields:
        small = fields.enter_context(open_field(servers, folder))
        large = fields.enter_context(open_field(servers, folder))
        costs: dict[str, list[Cost]] = {small.name: [], large.name: []}
        for field, published in ((small, few), (large, many)):
            with running(OURS, field) as process:
                make_ready(
                    field, process
                )  # the relay creates its indexes while the outbox is small
            _append_published(field, published)
        for _ in range(rounds):
            for field in (small, large):
                costs[field.name].append(_drain_cost(field, count))

    def of(name: str) -> Spread:
        in_large = [getattr(cost, name) for cost in costs[large.name]]
        return ratios(in_large, [getattr(cost, name) for cost in costs[small.name]])

    return Growth(few, many, of("elapsed"), of("relay_cpu"), of("servers_cpu"))


def _drain_cost(field: Field, count: int) -> Cost:
    """What it costs to pass `count` events through a relay that is up and waiting."""
    field.wait_quiet()
    field.purge()
    with running(OURS, field) as process:
        make_ready(field, process)
        assert process.pid is not None
        relay = psutil.Process(process.pid)
        servers = server_processes(field.servers)
        settled = field.settled()
        # the writer's cost is not the relay's, and grows with the index of ids
        relay.suspend()
        field.append(count, state="pending")
        field.wait_quiet()
        relay_before, servers_before, began = (
            cpu_seconds([relay]),
            cpu_seconds(servers),
            time.monotonic(),
        )
        relay.resume()
        wait_until(
            lambda: field.settled() >= settled + count, "all is settled", deadline_seconds=120
        )
        cost = Cost(
            time.monotonic() - began,
            cpu_seconds([relay]) - relay_before,
            cpu_seconds(servers) - servers_before,
        )
    field.remove(key="now")
    return cost


def _append_published(field: Field, count: int) -> None:
    """Past events, as the relay leaves them."""
    now = datetime.now(UTC)
    field.append(
        count,
        key="past",
        state="published",
        published_at=now,
        expire_at=now + timedelta(days=7),
        relay_epoch=1,
    )


def _wait_settled(field: Field, count: int) -> None:
    wait_until(lambda: field.settled() >= count, f"{count} are settled", deadline_seconds=120)


@contextmanager
def _sampled(process: psutil.Process) -> Iterator[list[tuple[float, float]]]:
    curve: list[tuple[float, float]] = []
    done, began = threading.Event(), time.monotonic()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            curve.append((time.monotonic() - began, process.memory_info().rss / MEGABYTE))

    sampling = threading.Thread(target=sample)
    sampling.start()
    try:
        yield curve
    finally:
        done.set()
        sampling.join()


def _mean(curve: list[tuple[float, float]]) -> float:
    return sum(megabytes for _, megabytes in curve) / len(curve)
