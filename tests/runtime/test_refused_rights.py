"""A right that is revoked while something runs: a process waits for it, a command ends."""

import asyncio
import signal
from collections.abc import Iterator, Mapping

import pytest
from loguru import logger
from pymongo.errors import OperationFailure

from runtime.exit_codes import ExitCode
from runtime.mongo import retry_while_unavailable
from sandbox.mongodb import MongoServer
from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.deliveries import Deliveries
from tests.support.operating import fail_many

WHY = ("--why", "a rehearsal", "--who", "ann")


@pytest.fixture
def restricted(mongo_server: MongoServer, deliveries: Deliveries) -> Iterator[Mapping[str, str]]:
    """The settings of a user that has every right on the database, until it is revoked."""
    rights = [{"role": "dbOwner", "db": deliveries.database_name}]
    deliveries.database.command("createUser", "on_call", pwd="secret", roles=rights)
    hosts = mongo_server.url.rpartition("@")[2]
    url = f"mongodb://on_call:secret@{hosts}&authSource={deliveries.database_name}"
    yield deliveries.environment(mongodb_url=url)
    deliveries.database.command("dropUser", "on_call")


@pytest.mark.parametrize(
    "command", [("resend", "--rate", "0.1"), ("dead-letters", "redrive", "--code", "404", "--yes")]
)
def test_a_running_command_ends_with_one_sentence(
    restricted: Mapping[str, str],
    run_process: RunProcess,
    deliveries: Deliveries,
    command: tuple[str, ...],
) -> None:
    fail_many(deliveries, 2)
    deliveries.accept_many(3)
    deliveries.database["outbox"].update_many({}, {"$set": {"state": "published"}})
    running = run_process("consumers", *command, *WHY, environment=restricted)
    wait_until_begun(deliveries)

    deliveries.database.command("updateUser", "on_call", roles=[])

    assert running.wait_exit() == ExitCode.PERMISSION
    assert "Traceback" not in running.output()
    assert "MongoDB refuses a right that is needed" in running.output().splitlines()[-1]


def wait_until_begun(deliveries: Deliveries) -> None:
    wait_until(
        lambda: deliveries.database["outbox"].count_documents({"state": "pending"}),
        "the command has appended its first hint",
    )


def test_one_pass_of_the_reconciler_ends_too(
    restricted: Mapping[str, str], run_process: RunProcess, deliveries: Deliveries
) -> None:
    deliveries.database.command("updateUser", "on_call", roles=[])
    once = run_process("consumers", "run", "reconciler", "--once", environment=restricted)
    assert once.wait_exit() == ExitCode.PERMISSION
    assert "MongoDB refuses a right that is needed" in once.output()


@pytest.mark.parametrize(
    ("command", "setting", "url"),
    [
        (("run", "reconciler", "--once"), "MONGODB_URL", "mongodb://127.0.0.1:1/"),
        (("destinations", "list"), "MONGODB_URL", "mongodb://127.0.0.1:1/"),
        (("topology",), "RABBITMQ_URL", "amqp://127.0.0.1:1/"),
    ],
)
def test_a_command_without_its_server_ends_and_says_so(
    run_process: RunProcess,
    deliveries: Deliveries,
    command: tuple[str, ...],
    setting: str,
    url: str,
) -> None:
    environment = deliveries.environment() | {setting: url}
    ended = run_process("consumers", *command, environment=environment)
    assert ended.wait_exit() == ExitCode.UNAVAILABLE
    assert f"check that it is running and that {setting} is right" in ended.output()
    assert "Traceback" not in ended.output()


def test_ctrl_c_ends_a_command_that_waits_for_mongodb(
    run_process: RunProcess, own_mongo_server: MongoServer, deliveries: Deliveries
) -> None:
    there = Deliveries(own_mongo_server.url, deliveries.database_name, deliveries.rabbitmq_url)
    with there.client:
        there.accept_many(3)
        there.database["outbox"].update_many({}, {"$set": {"state": "published"}})
        command = ("consumers", "resend", "--rate", "0.1", *WHY)
        running = run_process(*command, environment=there.environment())
        wait_until_begun(there)
        own_mongo_server.kill()
        running.wait_log("mongodb.away")
        running.signal(signal.SIGINT)
        assert running.wait_exit() == ExitCode.UNAVAILABLE


def test_a_process_waits_for_a_right_and_says_so_once() -> None:
    refusals = iter(
        [OperationFailure("not authorized on shop to execute command { find: 1 }", 13)] * 3
    )
    logged: list[str] = []

    async def read() -> str:
        for refusal in refusals:
            raise refusal
        return "read"

    sink = logger.add(lambda message: logged.append(message.record["message"]), level="INFO")
    assert asyncio.run(retry_while_unavailable(read)) == "read"
    logger.remove(sink)
    assert logged == ["mongodb.access_refused"]
