"""The sustained rate of requests from POST to acknowledged, beside the rate of bare calls."""

import asyncio
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pymongo import MongoClient

from benchmarks.bare_calls import DATABASE
from benchmarks.field import MeasurementFailed, wait_until
from benchmarks.statistics import percentile
from sandbox.ports import LOOPBACK, free_ports, port_answers
from sandbox.server_process import ServerProcess
from sandbox.stack import Stack

#: Requests that are accepted and not yet acknowledged; a client with more of them waits. It keeps
#: the lag bounded: a rate that only fills queues does not count.
OPEN_LIMIT = 100

CLIENTS = 8

#: As many as there are of ours that do the work: service, relay and worker share two cores.
BARE_PROCESSES = 2

WARM_UP_SECONDS = 3.0


@dataclass(frozen=True)
class Sustained:
    """
    per_second: acknowledged, over `seconds`, with at most `OPEN_LIMIT` open at any time.
    p50_ms, p99_ms: from the POST's start to the committed success, at that rate.
    bare_per_second: the ceiling, by bare_calls.py on the same servers right before.
    """

    seconds: float
    per_second: float
    p50_ms: float
    p99_ms: float
    bare_per_second: float

    @property
    def share_of_ceiling(self) -> float:
        return self.per_second / self.bare_per_second


def measure_sustained(
    stack: Stack,
    folder: Path,
    succeeded: Mapping[str, float],
    request: Mapping[str, str],
    *,
    seconds: float,
    bare_seconds: float,
) -> Sustained:
    """succeeded: when each request's success was seen, by its id; filled while we post."""
    bare_per_second = _measure_bare_calls(stack, folder, bare_seconds)
    began = time.monotonic() + WARM_UP_SECONDS
    ends = began + seconds
    sent = asyncio.run(_post_until(ends, stack, succeeded, request))
    wait_until(lambda: sent.keys() <= succeeded.keys(), "every request is acknowledged")
    counted = [id for id in sent if began <= succeeded[id] < ends]
    ways_ms = sorted((succeeded[id] - sent[id]) * 1e3 for id in counted)
    return Sustained(
        seconds=seconds,
        per_second=len(counted) / seconds,
        p50_ms=percentile(ways_ms, 50),
        p99_ms=percentile(ways_ms, 99),
        bare_per_second=bare_per_second,
    )


async def _post_until(
    ends: float, stack: Stack, succeeded: Mapping[str, float], request: Mapping[str, str]
) -> dict[str, float]:
    """When each POST began, by the request's id."""
    sent: dict[str, float] = {}
    closed_before = len(succeeded)

    async def post_on(api: httpx.AsyncClient) -> None:
        while time.monotonic() < ends:
            if len(sent) - (len(succeeded) - closed_before) >= OPEN_LIMIT:
                await asyncio.sleep(0.005)
                continue
            began = time.monotonic()
            answer = await api.post("/api/assistances", json=request)
            sent[answer.raise_for_status().json()["id"]] = began

    async with open_api(stack) as api:
        await asyncio.gather(*(post_on(api) for _ in range(CLIENTS)))
    return sent


def open_api(stack: Stack) -> httpx.AsyncClient:
    """A client of the API, like the bot."""
    return httpx.AsyncClient(
        base_url=stack.api.base_url,
        headers={"X-API-KEY": stack.api_key},
        timeout=30,
        trust_env=False,
    )


def _measure_bare_calls(stack: Stack, folder: Path, seconds: float) -> float:
    [port] = free_ports(1)
    environment = stack.environment | {"BARE_API_URL": f"http://{LOOPBACK}:{port}/"}
    logs = [folder / f"bare-calls-{number}.log" for number in range(BARE_PROCESSES)]
    serve = ["uvicorn", "--log-level", "warning", "--port", str(port), "benchmarks.bare_calls:app"]
    with MongoClient[dict[str, Any]](stack.servers.mongo.url) as client:
        client.drop_database(DATABASE)
        for name in ("assistances", "outbox"):
            client[DATABASE].create_collection(name)
    with ExitStack() as ended:

        def begin(module: list[str], log: Path) -> None:
            command = [sys.executable, "-m", *module]
            process = ServerProcess("bare calls", command, log, environment)
            ended.callback(process.kill)
            process.launch()

        begin(serve, folder / "bare-api.log")
        wait_until(lambda: port_answers(port), "the bare API listens")
        for log in logs:
            begin(["benchmarks.bare_calls"], log)
        began = time.monotonic() + WARM_UP_SECONDS
        time.sleep(WARM_UP_SECONDS + seconds)
    return sum(_rate_between(log, began, began + seconds) for log in logs)


def _rate_between(log: Path, began: float, ended: float) -> float:
    samples = [line.split() for line in log.read_text().splitlines()]
    try:
        counts = [(float(at), int(count)) for at, count in samples]
    except ValueError:
        raise MeasurementFailed(f"bare calls failed; the log is {log}") from None
    within = [(at, count) for at, count in counts if began <= at <= ended]
    (first_at, first), (last_at, last) = within[0], within[-1]
    return (last - first) / (last_at - first_at)
