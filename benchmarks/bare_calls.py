"""
The ceiling of delivery: what a request costs in calls of MongoDB and HTTP, made without our code.

    POST it to a server that answers 202 and does nothing       as a client to the service
    transaction: insert the request and two events              the service
    POST it to Slack, between two updates of the request        the worker's claim and call
    read it; transaction: update it, insert an event            the worker's record
    every 50 requests: one update of 150 events, one of a row   the relay's marks and position

No RabbitMQ, no checks, no retries, no order. `python -m benchmarks.bare_calls` prints how many
requests it has made so far, a line each time that a tenth of a second has passed.
"""

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx
from pymongo import AsyncMongoClient

DATABASE = "bare_calls"
AT_ONCE = 16
MARKED_TOGETHER = 50
TOLD_EACH_SECONDS = 0.1

Send = Callable[[dict[str, Any]], Awaitable[None]]


async def app(scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Send) -> None:
    """The server that does nothing, for uvicorn."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-length", b"2"), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 202, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}"})


class Requests:
    def __init__(self, database: Any, http: httpx.AsyncClient, api: str, slack: str) -> None:
        self._database, self._http, self._api, self._slack = database, http, api, slack
        self._unmarked: list[str] = []
        self.done = 0

    async def make_for_ever(self) -> None:
        while True:
            await self.make_one()
            self.done += 1

    async def make_one(self) -> None:
        now, request_id = datetime.now(UTC), str(uuid4())
        text = {"topic": "sales", "description": "The customer asks for a quotation. " * 5}
        (await self._http.post(self._api, json=text)).raise_for_status()
        events = [_event(request_id, seq, now) for seq in (1, 2, 3)]
        delivery = {"destination": "slack", "state": "waiting", "fence": 0, "attempts": []}
        request = {"_id": request_id, **text, "status": "accepted", "deliveries": [delivery]}
        requests, outbox = self._database["assistances"], self._database["outbox"]
        client = self._database.client
        async with client.start_session() as session, await session.start_transaction():
            await requests.insert_one(request | {"created_at": now}, session=session)
            await outbox.insert_many(events[:2], session=session)
        attempt = {"number": 1, "started_at": now}
        await requests.find_one_and_update(
            {"_id": request_id, "deliveries.state": "waiting"},
            {
                "$set": {"deliveries.0.state": "claimed"},
                "$inc": {"deliveries.0.fence": 1},
                "$push": {"deliveries.0.attempts": attempt},
            },
        )
        (await self._http.post(self._slack, json={"text": str(text)})).raise_for_status()
        await requests.find_one({"_id": request_id})
        async with client.start_session() as session, await session.start_transaction():
            await requests.update_one(
                {"_id": request_id, "deliveries.fence": 1},
                {"$set": {"deliveries.0.state": "succeeded", "status": "succeeded"}},
                session=session,
            )
            await outbox.insert_many(events[2:], session=session)
        await self._mark([event["_id"] for event in events])

    async def _mark(self, events: list[str]) -> None:
        self._unmarked += events
        if len(self._unmarked) < MARKED_TOGETHER * 3:
            return
        marked, self._unmarked = self._unmarked, []
        await self._database["outbox"].update_many(
            {"_id": {"$in": marked}}, {"$set": {"state": "published"}}
        )
        await self._database["checkpoints"].update_one(
            {"_id": "bare"}, {"$inc": {"settled": len(marked)}}, upsert=True
        )


def _event(request_id: str, seq: int, now: datetime) -> dict[str, Any]:
    return {
        "_id": str(uuid4()),
        "type": "measured",
        "key": request_id,
        "seq": seq,
        "payload": "x" * 350,
        "created_at": now,
        "state": "pending",
    }


async def main() -> None:
    client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(
        os.environ["MONGODB_URL"], w="majority"
    )
    async with client, httpx.AsyncClient(timeout=30, trust_env=False) as http:
        requests = Requests(
            client[DATABASE], http, os.environ["BARE_API_URL"], os.environ["SLACK_WEBHOOK_URL"]
        )
        makers = [asyncio.create_task(requests.make_for_ever()) for _ in range(AT_ONCE)]
        while not any(maker.done() for maker in makers):
            await asyncio.sleep(TOLD_EACH_SECONDS)
            sys.stdout.write(f"{time.monotonic()} {requests.done}\n")
            sys.stdout.flush()
        await asyncio.gather(*makers)


if __name__ == "__main__":
    asyncio.run(main())
