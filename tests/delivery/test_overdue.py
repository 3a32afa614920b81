"""Who waits past the target time is found, by a command and by a metric, through an index."""

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from assistance.collection import ASSISTANCES, NEWEST_OF_STATUS
from consumers.maintenance.overdue import overdue
from outbox.collection import OUTBOX
from sandbox.ports import free_ports
from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.deliveries import Deliveries
from tests.support.operating import database_of, fail_many, json_of, run_command

TARGET_SECONDS = 900.0


def accepted_ago(deliveries: Deliveries, *destinations: str, minutes: float) -> str:
    now = datetime.now(UTC) - timedelta(minutes=minutes)
    return deliveries.accept("a secret", destinations=destinations, now=now)


def plan_of(deliveries: Deliveries, profiled: Mapping[str, Any]) -> str:
    """How the server reads the collection for this aggregation: the plan of its first stage."""
    command = profiled["command"]
    explained = deliveries.database.command(
        "aggregate", command["aggregate"], pipeline=command["pipeline"], explain=True
    )
    first = explained["stages"][0]["$cursor"] if "stages" in explained else explained
    return json.dumps(first["queryPlanner"]["winningPlan"], default=str)


async def test_requests_past_their_target_time_are_counted_by_destination(
    deliveries: Deliveries,
) -> None:
    fail_many(deliveries, 3)
    accepted_ago(deliveries, "slack", minutes=14)
    accepted_ago(deliveries, "slack", minutes=30)
    half = accepted_ago(deliveries, "slack", "email", minutes=60)
    deliveries.database[ASSISTANCES].update_one(
        {"_id": half}, {"$set": {"deliveries.1.state": "succeeded"}}
    )
    async with database_of(deliveries) as database:
        await database.command("profile", 2)
        found = await overdue(database, TARGET_SECONDS)
        assert {name: one.count for name, one in found.items()} == {"slack": 2}
        assert 3600 <= found["slack"].oldest_age_seconds < 3700
        assert await overdue(database, 7200) == {}
        await database.command("profile", 0)
    profiled = {"op": "command", "command.aggregate": ASSISTANCES}
    found_late, found_none = deliveries.database["system.profile"].find(profiled).sort("ts")
    assert NEWEST_OF_STATUS in plan_of(deliveries, found_late)
    assert '"SORT"' not in plan_of(deliveries, found_late), "the index gives the order, too"
    assert (found_late["docsExamined"], found_none["docsExamined"]) == (2, 0)


def test_the_command_tells_what_waits_for_what_and_ends_with_one(deliveries: Deliveries) -> None:
    assert "nothing is older than 900 s" in run_command(deliveries, "overdue")
    request_id = accepted_ago(deliveries, "slack", minutes=30)
    deliveries.database[OUTBOX].update_many({}, {"$set": {"state": "held"}})
    said = run_command(deliveries, "overdue", code=1)
    assert request_id in said
    assert "hint held" in said
    assert "slack: 1 overdue, the oldest by 18" in said
    assert "secret" not in said
    shown = json_of(deliveries, "overdue", code=1)
    assert (shown["oldest"][0]["destination"], shown["oldest"][0]["waits"]) == (
        "slack",
        "hint held",
    )


def test_the_reconciler_shows_what_is_overdue(
    deliveries: Deliveries, run_process: RunProcess
) -> None:
    accepted_ago(deliveries, "slack", minutes=30)
    (port,) = free_ports(1)
    environment = deliveries.environment(monitoring_port=port)
    run_process("consumers", "run", "reconciler", environment=environment)
    shown = 'deliveries_overdue{destination="slack"} 1.0'

    def scraped() -> bool:
        with suppress(httpx.HTTPError):
            page = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
            return shown in page.text
        return False

    wait_until(scraped, shown, deadline_seconds=30)
