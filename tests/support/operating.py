"""What the operators' tests share: failed requests with their letters, and commands run here."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from pymongo import UpdateOne
from typer.testing import CliRunner

from assistance import dead_letter
from assistance.collection import ASSISTANCES, DEAD_LETTERS
from assistance.request import Status, closing_facts
from consumers.__main__ import commands
from consumers.database import open_database
from outbox.collection import OUTBOX
from runtime.mongo import Database
from runtime.settings import MongoSettings
from runtime.shutdown import Stop
from tests.support.deliveries import Deliveries, new_request


@asynccontextmanager
async def database_of(deliveries: Deliveries) -> AsyncIterator[Database]:
    table = MongoSettings(
        mongodb_url=deliveries.mongodb_url,  # type: ignore[arg-type]
        mongodb_database=deliveries.database_name,
    )
    async with open_database(table, "test", Stop()) as database:
        yield database


def fail_many(deliveries: Deliveries, count: int) -> list[str]:
    """Requests that failed after one attempt, with their letters, as the ledger leaves them."""
    began_at = datetime.now(UTC) - timedelta(hours=1)
    requests, outbox, letters = [], [], []
    for number in range(count):
        acceptance = new_request(f"number {number}", now=began_at)
        request: Any = acceptance.request
        attempt = {"number": 1, "fence": 1, "worker": "w", "started_at": began_at}
        attempt |= {"ended_at": began_at, "verdict": "never", "code": "404", "calls": 1}
        closed = {"state": "failed", "attempts": [attempt], "attempts_counted": 1, "fence": 1}
        request["deliveries"][0] |= closed
        facts = closing_facts(acceptance.request, Status.FAILED, began_at)
        request |= {"status": "failed", "version": 3, "next_due_at": None}
        requests.append(request)
        outbox += [
            event | {"state": "published"} for event in [*acceptance.outbox_documents, *facts]
        ]
        letter = dead_letter.from_delivery(
            request_id=request["_id"],
            destination="slack",
            reason="permanent",
            code="404",
            excerpt="no_service",
            seen_at=began_at + timedelta(seconds=number),
        )
        stored = dead_letter.upsert_of_delivery(letter)
        letters.append(UpdateOne({"_id": letter.id}, stored, upsert=True))
    deliveries.database[ASSISTANCES].insert_many(requests)
    deliveries.database[OUTBOX].insert_many(outbox)
    deliveries.database[DEAD_LETTERS].bulk_write(letters)
    return [request["_id"] for request in requests]


def run_command(deliveries: Deliveries, *arguments: str, code: int = 0) -> str:
    """`python -m consumers ...` without the second that a process takes to start; its output."""
    wide = {"COLUMNS": "250", "TERM": "dumb"}
    ended = CliRunner().invoke(commands, arguments, env=deliveries.environment() | wide)
    assert ended.exit_code == code, ended.output
    return ended.output


def json_of(deliveries: Deliveries, *arguments: str, code: int = 0) -> Any:
    return json.loads(run_command(deliveries, *arguments, "--json", code=code))
