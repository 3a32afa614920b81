"""The API under load, and the way of a request from its POST to its acknowledgement."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pymongo import MongoClient

from benchmarks.field import wait_until
from benchmarks.plan import Plan
from benchmarks.statistics import percentile
from benchmarks.sustained import Sustained, measure_sustained, open_api
from sandbox.stack import DATABASE, Stack, open_stack

CLIENTS = 8
REQUEST = {"topic": "sales", "description": "The customer asks for a quotation. " * 5}


@dataclass(frozen=True)
class WholeWay:
    """
    posts_per_second: answered 202 by the service, with `CLIENTS` clients that wait for nothing
    else, while relay, worker and Slack work on what was accepted.
    acknowledged_per_second: of the same requests, from the first POST to the last acknowledgement.
    way_*: at `paced_per_second`, from the POST's start to the committed success, in milliseconds.
    """

    posts: int
    posts_per_second: float
    post_p50_ms: float
    post_p99_ms: float
    acknowledged_per_second: float
    paced_per_second: float
    way_p50_ms: float
    way_p99_ms: float
    sustained: Sustained


def measure_whole_way(folder: Path, plan: Plan, *, paced_per_second: float) -> WholeWay:
    with open_stack(folder, lambda _said: None) as stack, _successes(stack) as succeeded:
        asyncio.run(_post(stack, 50, rate=None))
        wait_until(lambda: len(succeeded) == 50, "the first requests are done")  # noqa: PLR2004

        sent = asyncio.run(_post(stack, plan.paced_posts, rate=paced_per_second))
        wait_until(lambda: sent.keys() <= succeeded.keys(), "paced requests are acknowledged")
        way = sorted((succeeded[id] - began) * 1e3 for id, (began, _ended) in sent.items())

        sent = asyncio.run(_post(stack, plan.posts, rate=None))
        wait_until(
            lambda: sent.keys() <= succeeded.keys(),
            "every request is acknowledged",
            deadline_seconds=180,
        )
        first = min(began for began, _ended in sent.values())
        answered = max(ended for _began, ended in sent.values())
        took = sorted((ended - began) * 1e3 for began, ended in sent.values())
        acknowledged_per_second = plan.posts / (max(succeeded[id] for id in sent) - first)
        sustained = measure_sustained(
            stack,
            folder,
            succeeded,
            REQUEST,
            seconds=plan.sustained_seconds,
            bare_seconds=plan.bare_seconds,
        )
        return WholeWay(
            posts=plan.posts,
            posts_per_second=plan.posts / (answered - first),
            post_p50_ms=percentile(took, 50),
            post_p99_ms=percentile(took, 99),
            acknowledged_per_second=acknowledged_per_second,
            paced_per_second=paced_per_second,
            way_p50_ms=percentile(way, 50),
            way_p99_ms=percentile(way, 99),
            sustained=sustained,
        )


async def _post(stack: Stack, count: int, *, rate: float | None) -> dict[str, tuple[float, float]]:
    """When each POST began and was answered, by the request's id; without a rate, at full speed."""
    times: dict[str, tuple[float, float]] = {}
    turns = iter(range(count))
    start = time.monotonic()

    async def post_on(api: httpx.AsyncClient) -> None:
        for turn in turns:
            if rate is not None:
                await asyncio.sleep(max(0.0, start + turn / rate - time.monotonic()))
            began = time.monotonic()
            answer = await api.post("/api/assistances", json=REQUEST)
            ended = time.monotonic()
            times[answer.raise_for_status().json()["id"]] = (began, ended)

    async with open_api(stack) as api:
        await asyncio.gather(*(post_on(api) for _ in range(CLIENTS)))
    return times


@contextmanager
def _successes(stack: Stack) -> Iterator[dict[str, float]]:
    """When each request's success was seen in MongoDB, by its id."""
    seen: dict[str, float] = {}
    client: MongoClient[dict[str, Any]] = MongoClient(stack.servers.mongo.url)
    stages = [{"$match": {"updateDescription.updatedFields.status": "succeeded"}}]
    done, watching = threading.Event(), threading.Event()

    def watch() -> None:
        collection = client[DATABASE]["assistances"]
        with collection.watch(stages, max_await_time_ms=200) as stream:
            watching.set()
            while not done.is_set():
                if change := stream.try_next():
                    seen[change["documentKey"]["_id"]] = time.monotonic()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        watching.wait()
        yield seen
    finally:
        done.set()
        thread.join()
        client.close()
