"""The rights that deploy/ grants are enough for every process and command."""

import asyncio
import importlib
import json
import secrets
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from pymongo import MongoClient
from typer.main import get_command
from typer.testing import CliRunner

from assistance.collection import ASSISTANCES
from outbox.collection import OUTBOX
from relay.backlog import measure_runway
from relay.checkpoint import CHECKPOINTS
from runtime.exit_codes import ExitCode
from runtime.mongo import close, open_client
from runtime.operations import OPERATIONS
from sandbox.mongodb import MongoServer
from sandbox.ports import free_ports
from sandbox.rabbitmq import RabbitServer
from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.deliveries import Deliveries
from tests.support.deployment import RIGHTS, ROLES
from tests.support.operating import fail_many
from tests.support.third_parties import ThirdParties


def test_a_request_is_delivered_with_just_the_rights_that_deploy_grants(
    restricted_mongodb: Mapping[str, str],
    restricted_rabbitmq: Mapping[str, str],
    database_name: str,
    third_parties: ThirdParties,
    run_process: RunProcess,
) -> None:
    (port,) = free_ports(1)
    key = secrets.token_hex(24)
    mongodb = {
        user: {"MONGODB_URL": url, "MONGODB_DATABASE": database_name}
        for user, url in restricted_mongodb.items()
    }
    rabbitmq = {user: {"RABBITMQ_URL": url} for user, url in restricted_rabbitmq.items()}
    worker = mongodb["consumers"] | rabbitmq["worker-slack"]
    dead_letters = mongodb["consumers"] | rabbitmq["dead-letters"]
    slack = {"SLACK_WEBHOOK_URL": third_parties.slack_url}
    processes = [
        run_process(
            *("service", "run"),
            environment=mongodb["service"] | {"API_KEYS": key, "API_PORT": str(port)},
        ),
        run_process("relay", "run", environment=mongodb["relay"] | rabbitmq["relay"]),
        run_process("consumers", "run", "slack", environment=worker | slack),
        run_process("consumers", "run", "dead-letters", environment=dead_letters),
        run_process("consumers", "run", "reconciler", environment=mongodb["consumers"]),
    ]
    # the second one is refused for good, so that a dead letter is written too
    third_parties.misbehave("slack", "status", code=400, times=1)

    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}", headers={"X-API-KEY": key}, trust_env=False
    ) as api:

        def is_ready() -> bool:
            try:
                return api.get("/readyz").is_success
            except httpx.TransportError:
                return False

        def final_status_of(link: str) -> str | None:
            status: str = api.get(link).json()["status"]
            return None if status == "accepted" else status

        wait_until(is_ready, "the API is ready", deadline_seconds=20)
        statuses = []
        for _ in range(2):
            body = {"topic": "sales", "description": "help"}
            once = {"Idempotency-Key": secrets.token_hex(8)}
            answer = api.post("/api/assistances", json=body, headers=once)
            link = answer.raise_for_status().json()["link"]
            again = api.post("/api/assistances", json=body, headers=once)
            assert again.json() == answer.json()
            assert api.get(f"{link}/timeline").is_success
            statuses.append(
                wait_until(
                    lambda link=link: final_status_of(link),  # type: ignore[misc]
                    "the request is final",
                    deadline_seconds=20,
                )
            )

        assert api.get("/api/assistances").json()["items"][0]["status"] == "succeeded"

    assert statuses == ["failed", "succeeded"]
    assert all(process.running for process in processes)
    refusals = [process.output() for process in processes if "refuse" in process.output()]
    assert not refusals
    assert asyncio.run(_runway_seconds(restricted_mongodb["relay"], database_name)) is not None


def test_every_command_works_with_the_rights_of_its_process_and_prints_json(
    restricted_mongodb: Mapping[str, str],
    deliveries: Deliveries,
    run_process: RunProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    programs = {
        process: importlib.import_module(f"{process}.__main__").commands
        for process in restricted_mongodb
    }
    given: set[str] = set()

    def settings_of_process(process: str) -> dict[str, str]:
        url, name = restricted_mongodb[process], deliveries.database_name
        return {"MONGODB_URL": url, "MONGODB_DATABASE": name}

    def give(process: str, name: str, *arguments: str, code: int = 0) -> Any:
        command = f"{process} {name}"
        given.add(command)
        ended = CliRunner().invoke(
            programs[process],
            [*name.split(), *arguments, "--json"],
            env=settings_of_process(process),
        )
        assert ended.exit_code == code, f"{command}: {ended.output}"
        return json.loads(ended.stdout)

    # there is no leader, and no worker
    monkeypatch.setattr("relay.__main__.PATIENCE_SECONDS", 0.0)
    at_once = ("--yes", "--patience-seconds", "0")
    why = ("--why", "a rehearsal", "--who", "ann")
    deliveries.database[CHECKPOINTS].insert_one(
        {"_id": "relay", "epoch": 1, "owner": "a", "led_since": datetime.now(UTC), "settled": 0}
    )
    deliveries.database[OUTBOX].insert_many(
        {"_id": event_id, "state": "parked"} for event_id in ("mended", "poison")
    )
    request_ids = fail_many(deliveries, 4)
    letter_ids = [f"delivery/{request_id}/slack" for request_id in request_ids]
    undecided = [deliveries.accept() for _ in range(2)]
    deliveries.database[ASSISTANCES].update_many(
        {"_id": {"$in": undecided}},
        {
            "$set": {
                "deliveries.0.state": "needs_decision",
                "deliveries.0.attempts": [{"number": 1, "started_at": datetime.now(UTC)}],
            }
        },
    )

    give("relay", "position show")
    give("relay", "position reset", *why)
    give("relay", "held list")
    for step, event_id in (("release", "mended"), ("discard", "poison")):
        give("relay", f"held {step}", event_id, *why, code=ExitCode.UNFINISHED)

    give("consumers", "needs-decision list")
    give("consumers", "needs-decision sent", undecided[0], "slack", *why)
    give("consumers", "needs-decision retry", undecided[1], "slack", *why)
    give("consumers", "destinations list")
    for step in ("suspend", "resume"):
        give("consumers", f"destinations {step}", "email", *why)
    give("consumers", "dead-letters list")
    give("consumers", "dead-letters show", letter_ids[0])
    give("consumers", "dead-letters discard", letter_ids[0], "--yes", *why)
    give("consumers", "dead-letters redrive", *letter_ids[1:], *at_once, *why, code=1)
    (redrive,) = give("consumers", "dead-letters redrives list")
    assert redrive["state"] == "paused"
    give("consumers", "dead-letters redrives show", redrive["_id"])
    deliveries.database[OPERATIONS].update_one(
        {"_id": redrive["_id"]}, {"$set": {"state": "running"}}
    )
    give("consumers", "dead-letters redrives pause", redrive["_id"], *why)
    resume = ("dead-letters redrives resume", redrive["_id"], *at_once[1:])
    resumed = give("consumers", *resume, *why, code=ExitCode.FOUND)
    assert "no outcomes" in resumed["redrive"]["reason"]
    give("consumers", "dead-letters redrives cancel", redrive["_id"], *why)
    give("consumers", "resend", *why)
    overdue = give("consumers", "overdue", code=ExitCode.FOUND)
    assert overdue["overdue"]["slack"]["count"] == 2

    looks = [
        run_process("service", *look, environment=settings_of_process("service"))
        for look in (("show", undecided[0], "--json"), ("audit", "--json"))
    ]
    for look in looks:
        assert look.wait_exit() == 0, look.output()
        json.loads(look.output())
        given.add(" ".join(look.arguments[:2]))

    without_mongodb = {"consumers routes", "consumers topology"}
    known = {
        f"{process} {name}"
        for process, commands in programs.items()
        for name in _names(get_command(commands))
        if name != "run"
    }
    assert given == known - without_mongodb


def test_a_command_with_the_user_of_another_process_names_the_missing_right(
    restricted_mongodb: Mapping[str, str], deliveries: Deliveries
) -> None:
    for process, name, user, needed in (
        ("service", "audit", "relay", 'find: "closed_balance"'),
        ("relay", "position show", "service", 'find: "checkpoints"'),
        ("consumers", "dead-letters list", "service", 'create: "dead_letters"'),
    ):
        refused = CliRunner().invoke(
            importlib.import_module(f"{process}.__main__").commands,
            name.split(),
            env={
                "MONGODB_URL": restricted_mongodb[user],
                "MONGODB_DATABASE": deliveries.database_name,
            },
        )
        assert refused.exit_code == ExitCode.PERMISSION
        assert refused.output == (
            "MongoDB refuses a right that is needed (not authorized on "
            f"{deliveries.database_name} to execute {needed}): "
            "run `python -m installation mongodb`, which grants the role of this process\n"
        )


@pytest.fixture
def restricted_mongodb(mongo_server: MongoServer, database_name: str) -> Iterator[dict[str, str]]:
    """A user for each role of roles.json, in `admin` as in production; its URL by its name."""
    parts = urlsplit(mongo_server.url)
    hosts = parts.netloc.rpartition("@")[2]
    urls = {}
    with MongoClient[dict[str, Any]](mongo_server.url) as client:
        for role, grants in ROLES.items():
            name, password = f"{database_name}_{role}", secrets.token_hex(12)
            privileges = [
                {
                    "resource": {
                        "db": grant.get("database", database_name),
                        "collection": grant["collection"],
                    },
                    "actions": grant["actions"],
                }
                for grant in grants
            ]
            client.admin.command("createRole", name, privileges=privileges, roles=[])
            client.admin.command("createUser", name, pwd=password, roles=[name])
            urls[role] = f"mongodb://{name}:{password}@{hosts}/?{parts.query}&authSource=admin"
        yield urls
        for role in ROLES:
            client.admin.command("dropUser", f"{database_name}_{role}")
            client.admin.command("dropRole", f"{database_name}_{role}")


@pytest.fixture
def restricted_rabbitmq(rabbit_server: RabbitServer, vhost: str) -> Iterator[dict[str, str]]:
    """A user for each line of `rights`, on the test's own virtual host; its URL by its name."""
    parts = urlsplit(rabbit_server.url)
    urls = {}
    with httpx.Client(
        base_url=f"{rabbit_server.management_url}/api/",
        auth=(parts.username or "", parts.password or ""),
        trust_env=False,
        timeout=30,
    ) as management:
        for user, (configure, write, read) in RIGHTS.items():
            name, password = f"{vhost}_{user}", secrets.token_hex(12)
            rights = {"configure": configure, "write": write, "read": read}
            management.put(f"users/{name}", json={"password": password, "tags": ""})
            management.put(f"permissions/{vhost}/{name}", json=rights).raise_for_status()
            urls[user] = (
                f"amqp://{name}:{password}@{parts.hostname}:{parts.port}/{quote(vhost, safe='')}"
            )
        yield urls
        for user in RIGHTS:
            management.delete(f"users/{vhost}_{user}").raise_for_status()


async def _runway_seconds(url: str, database_name: str) -> float | None:
    client = open_client(url, process="test")
    try:
        return await measure_runway(client[database_name], "relay")
    finally:
        await close(client)


def _names(command: Any) -> Iterator[str]:
    """Of every command that does something, below a group of them."""
    for name, inner in command.commands.items():
        if hasattr(inner, "commands"):
            yield from (f"{name} {deeper}" for deeper in _names(inner))
        else:
            yield name
