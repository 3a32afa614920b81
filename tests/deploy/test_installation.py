"""The installation step, against real servers: empty ones, and such as it has prepared before."""

import json
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pika
import pytest
from pika.exceptions import ChannelClosedByBroker
from pymongo import MongoClient
from pymongo.errors import OperationFailure
from typer.testing import CliRunner

from installation.__main__ import commands
from installation.mongodb import STRUCTURES
from installation.settings import MissingPasswords, find_passwords
from installation.users import mongodb_roles, rabbitmq_permissions
from sandbox.mongodb import REPLICA_SET, LocalMongo, MongoServer
from sandbox.ports import LOOPBACK, port_answers
from sandbox.rabbitmq import RabbitServer
from sandbox.servers import find_mongo
from sandbox.waiting import wait_until

MONGODB_USERS = ("service", "relay", "consumers")
RABBITMQ_USERS = ("relay", "dead-letters", "worker-slack", "worker-email")


@dataclass
class Step:
    """The commands, with the settings of one installation."""

    folder: Path
    environment: dict[str, str]

    def run(self, *arguments: str, code: int = 0, **more: str) -> str:
        """What the command says; more: settings beside or instead of the installation's own."""
        ended = CliRunner().invoke(commands, arguments, env={**self.environment, **more})
        assert ended.exit_code == code, ended.output
        return ended.output

    def secret(self, name: str) -> str:
        return (self.folder / "installation" / name).read_text()


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Step:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "secrets"
    return Step(folder, {"SECRETS_FOLDER": str(folder / "installation")})


@pytest.fixture
def prepared(
    step: Step,
    mongo_server: MongoServer,
    database_name: str,
    rabbit_server: RabbitServer,
    vhost: str,
) -> Iterator[Step]:
    """Both servers prepared by the step; its users are removed afterwards."""
    broker = urlsplit(rabbit_server.url)
    management = urlsplit(rabbit_server.management_url)
    step.environment |= {
        "MONGODB_URL": mongo_server.url,
        "MONGODB_DATABASE": database_name,
        "RABBITMQ_URL": rabbit_server.url_of(vhost),
        "RABBITMQ_MANAGEMENT_URL": management._replace(
            netloc=f"{broker.username}:{broker.password}@{management.netloc}"
        ).geturl(),
    }
    step.run("secrets", str(step.folder))
    step.run("mongodb")
    step.run("rabbitmq")
    yield step
    with MongoClient[dict[str, Any]](mongo_server.url) as client:
        for role in MONGODB_USERS:
            client.admin.command("dropUser", role)
            client.admin.command("dropRole", role)
    with httpx.Client(
        base_url=f"{rabbit_server.management_url}/api/",
        auth=(broker.username or "", broker.password or ""),
        trust_env=False,
    ) as api:
        for user in RABBITMQ_USERS:
            api.delete(f"users/{user}").raise_for_status()


def test_secrets_are_made_once_and_each_reader_gets_its_own_only(step: Step) -> None:
    step.run("secrets", str(step.folder))
    first = {path: path.read_text() for path in step.folder.rglob("*") if path.is_file()}
    again = step.run("secrets", str(step.folder))

    assert "0 files written" in again
    assert {path: path.read_text() for path in first} == first
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o400 for path in first)
    readers = {
        folder.name: {path.name for path in folder.iterdir()} for folder in step.folder.iterdir()
    }
    assert readers["service"] == {"mongodb-url", "api-keys"}
    assert readers["relay"] == readers["slack"] == {"mongodb-url", "rabbitmq-url"}
    assert readers["reconciler"] == {"mongodb-url"}
    assert readers["mongodb"] == {"replica-set.key"}
    # no password of another user stands in what a worker reads
    slack = "".join(text for path, text in first.items() if path.parent.name == "slack")
    others = ("mongodb-root", "mongodb-relay", "rabbitmq-operator", "rabbitmq-worker-email")
    assert not [name for name in others if step.secret(f"{name}-password") in slack]


def test_a_secret_that_is_given_replaces_the_kept_one(step: Step, tmp_path: Path) -> None:
    step.run("secrets", str(step.folder))
    (tmp_path / "provided").write_text("from/a:file\n")
    step.environment |= {
        "RABBITMQ_RELAY_PASSWORD": "given@here",
        "MONGODB_RELAY_PASSWORD_FILE": str(tmp_path / "provided"),
    }

    step.run("secrets", str(step.folder))

    relay = step.folder / "relay"
    assert (relay / "rabbitmq-url").read_text() == "amqp://relay:given%40here@rabbitmq:5672/"
    assert "relay:from%2Fa%3Afile@mongodb:27017" in (relay / "mongodb-url").read_text()


def test_every_secret_that_is_missing_is_named_when_none_may_be_made(step: Step) -> None:
    arguments = ("secrets", str(step.folder), "--no-generate", "--require", "EMAIL_SMTP_HOST")
    output = step.run(*arguments, code=78, API_KEYS="k" * 20)

    assert "EMAIL_SMTP_HOST is missing" in output
    for name in ("MONGODB_ROOT_PASSWORD", "RABBITMQ_WORKER_SLACK_PASSWORD"):
        assert f"{name} is missing; give it, {name}_FILE, or" in output
    assert "API_KEYS" not in output
    assert not step.folder.exists()


def test_secrets_may_be_provided_as_files_of_one_folder(step: Step, tmp_path: Path) -> None:
    step.run("secrets", str(step.folder))
    provided = tmp_path / "provided"
    shutil.copytree(step.folder / "installation", provided)
    (provided / "mongodb-relay-password").chmod(0o600)
    (provided / "mongodb-relay-password").write_text("another\n")

    arguments = ("secrets", str(step.folder), "--no-generate")
    step.run(*arguments, PROVIDED_SECRETS_FOLDER=str(provided))

    assert "relay:another@" in (step.folder / "relay" / "mongodb-url").read_text()


def test_the_commands_name_every_password_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingPasswords) as missing:
        find_passwords("mongodb", list(MONGODB_USERS), tmp_path)

    assert missing.value.names == [f"MONGODB_{user.upper()}_PASSWORD" for user in MONGODB_USERS]


def test_an_empty_mongod_becomes_a_replica_set_with_users(
    step: Step, tmp_path: Path, database_name: str
) -> None:
    server = find_mongo(tmp_path, {})
    assert isinstance(server, LocalMongo)
    (port,) = server.ports
    step.environment |= {
        "MONGODB_DATABASE": database_name,
        "MONGODB_MEMBERS": f"{LOOPBACK}:{port}",
        "MONGODB_REPLICA_SET": REPLICA_SET,
    }
    step.run("secrets", str(step.folder))
    root = step.secret("mongodb-root-password")
    step.environment["MONGODB_URL"] = (
        f"mongodb://root:{root}@{LOOPBACK}:{port}/?directConnection=true"
    )
    try:
        server.launch()
        wait_until(lambda: port_answers(port), "mongod listens", deadline_seconds=20)

        first = step.run("mongodb", MONGODB_RELAY_PASSWORD="replaced below")
        assert "replica set rs0, user root (created)" in first
        assert "(created)" not in step.run("mongodb")

        url = (step.folder / "relay" / "mongodb-url").read_text()
        with MongoClient[dict[str, Any]](url, serverSelectionTimeoutMS=20_000) as relay:
            assert relay[database_name]["outbox"].find_one() is None
        wrong = f"mongodb://root:wrong@{LOOPBACK}:{port}/?directConnection=true"
        refusal = step.run("mongodb", code=1, MONGODB_URL=wrong)
        assert refusal.startswith("mongodb: MongoDB refuses the user 'root' in MONGODB_URL")
    finally:
        server.discard()


def test_the_step_may_be_repeated_and_finds_no_difference(prepared: Step) -> None:
    prepared.run("mongodb")
    prepared.run("rabbitmq")

    assert "both servers are as they should be" in prepared.run("check", "--note", "the note")
    assert "the note" in prepared.run("check", "--note", "the note")


def test_every_difference_is_named_and_put_right_by_the_step(
    prepared: Step,
    mongo_server: MongoServer,
    database_name: str,
    rabbit_server: RabbitServer,
    vhost: str,
) -> None:
    with MongoClient[dict[str, Any]](mongo_server.url) as client:
        client[database_name]["outbox"].drop_index("expiry")
        client[database_name].drop_collection("operations")
        client[database_name].command("collMod", "assistances", validator={})
        client.admin.command("updateRole", "relay", privileges=[])
        client.admin.command("updateUser", "service", pwd="other")
    broker = urlsplit(rabbit_server.url)
    auth = (broker.username or "", broker.password or "")
    with httpx.Client(
        base_url=f"{rabbit_server.management_url}/api/", auth=auth, trust_env=False
    ) as api:
        api.delete(f"queues/{vhost}/deliveries.slack").raise_for_status()
        rights = {"configure": ".*", "write": "", "read": ""}
        api.put(f"permissions/{vhost}/worker-email", json=rights).raise_for_status()

    output = prepared.run("check", code=1)
    assert set(output.splitlines()) == {
        "MongoDB: index expiry of outbox is missing",
        "MongoDB: collection operations is missing",
        "MongoDB: the validator of assistances differs",
        "MongoDB: role relay grants something else, or is missing",
        "MongoDB: user service is refused with its password",
        "RabbitMQ: user worker-email has other permissions, or is missing",
        "RabbitMQ: queue deliveries.slack is missing",
        "check: run the commands `installation mongodb` and `installation rabbitmq`",
    }

    prepared.run("mongodb")
    prepared.run("rabbitmq")
    prepared.run("check")


def test_a_worker_reaches_no_other_destinations_queue(
    prepared: Step, rabbit_server: RabbitServer, vhost: str
) -> None:
    password = prepared.secret("rabbitmq-worker-slack-password")
    broker = urlsplit(rabbit_server.url_of(vhost))
    url = broker._replace(
        netloc=f"worker-slack:{quote(password)}@{broker.hostname}:{broker.port}"
    ).geturl()
    connection = pika.BlockingConnection(pika.URLParameters(url))
    refused: dict[str, Callable[[Any], object]] = {
        "consume another queue": lambda channel: next(
            channel.consume("deliveries.email", inactivity_timeout=1)
        ),
        "delete another queue": lambda channel: channel.queue_delete("deliveries.email"),
        "declare a queue to spy with": lambda channel: channel.queue_declare("spy"),
        "publish an event": lambda channel: (
            channel.basic_publish("events", "delivery_due.email", b"{}"),
            channel.queue_declare("deliveries.slack", passive=True),
        ),
    }
    try:
        for name, act in refused.items():
            with pytest.raises(ChannelClosedByBroker) as closed:
                act(connection.channel())
            assert closed.value.reply_code == 403, name
    finally:
        connection.close()


def test_no_role_may_remove_a_document_or_read_another_database(
    prepared: Step, mongo_server: MongoServer, database_name: str
) -> None:
    hosts = urlsplit(mongo_server.url).netloc.rpartition("@")[2]
    for user in MONGODB_USERS:
        password = prepared.secret(f"mongodb-{user}-password")
        url = f"mongodb://{user}:{password}@{hosts}/?replicaSet={REPLICA_SET}"
        with MongoClient[dict[str, Any]](url) as client:
            forbidden: list[Callable[[MongoClient[dict[str, Any]]], object]] = [
                lambda client: client[database_name]["outbox"].delete_one({}),
                lambda client: client[database_name]["outbox"].drop(),
                lambda client: client["another"]["outbox"].find_one(),
                lambda client: client.admin["system.users"].find_one(),
            ]
            for act in forbidden:
                with pytest.raises(OperationFailure, match="not authorized"):
                    act(client)


def test_a_wrong_operator_is_named_with_the_fix(prepared: Step) -> None:
    url = urlsplit(prepared.environment["RABBITMQ_MANAGEMENT_URL"])
    address = f"{url.hostname}:{url.port}"
    wrong = url._replace(netloc=f"operator:wrong@{address}").geturl()

    output = prepared.run("rabbitmq", code=1, RABBITMQ_MANAGEMENT_URL=wrong)

    assert output.startswith(
        "rabbitmq: RabbitMQ refuses the user or password in RABBITMQ_MANAGEMENT_URL"
    )


def test_the_first_user_of_the_broker_is_given_by_hash(step: Step) -> None:
    step.run("secrets", str(step.folder))
    text = (step.folder / "rabbitmq" / "definitions.json").read_text()

    (user,) = json.loads(text)["users"]
    assert user["tags"] == ["administrator"]
    assert step.secret("rabbitmq-operator-password") not in text


def test_every_collection_that_a_role_names_is_made_by_the_step() -> None:
    granted = {
        grant["collection"]
        for grants in mongodb_roles().values()
        for grant in grants
        if "database" not in grant and grant["collection"]
    }

    assert granted == {structure.collection for structure in STRUCTURES}


def test_patterns_name_whole_names_only() -> None:
    for permissions in rabbitmq_permissions(["slack"], events_exchange="events").values():
        for pattern in (permissions.configure, permissions.write, permissions.read):
            assert pattern.startswith("^")
            assert pattern.endswith(("$", r"^relay\.lock\."))
