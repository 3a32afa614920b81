"""What an installation needs beside the code, held to the code: compose.yml, image, deploy/."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from typer.main import get_command

from assistance.collection import ASSISTANCES, DEAD_LETTERS, DESTINATIONS, IDEMPOTENCY_KEYS
from assistance.routing import RoutingTable
from consumers import topology
from consumers.settings import TopologySettings
from outbox.collection import OUTBOX
from relay.checkpoint import CHECKPOINTS
from relay.settings import RelaySettings
from runtime.operations import OPERATION_ITEMS, OPERATIONS
from runtime.settings import MongoSettings, RabbitSettings
from tests.support.deployment import DEPLOY, RIGHTS, ROLES
from tools.settings_pages import COMPOSE, ROOT, Tables, process_tables, settings_of

SCHEMA = ROOT / "tests" / "compose_specification" / "compose-spec.json"
DOCKERFILE = (ROOT / "Dockerfile").read_text()

SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
PROCESSES = process_tables()
DEFINITIONS = json.loads((DEPLOY / "rabbitmq" / "definitions.json").read_text())

#: The setting that bounds how long each process takes to stop.
GRACE = {
    "service": "SHUTDOWN_GRACE_SECONDS",
    "relay": "RELAY_DRAIN_SECONDS",
    "slack": "SHUTDOWN_GRACE_SECONDS",
    "email": "SHUTDOWN_GRACE_SECONDS",
    "dead-letters": "SHUTDOWN_GRACE_SECONDS",
}

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PRODUCT = {
    name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
} - {"sandbox"}


def test_compose_yml_is_what_the_compose_specification_says() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(compose)

    assert "version" not in compose


def test_compose_yml_starts_every_process() -> None:
    assert {name for name, service in SERVICES.items() if "build" in service} == PROCESSES.keys()


@pytest.mark.parametrize("process", PROCESSES)
def test_what_compose_yml_runs_is_there(process: str) -> None:
    module, *arguments = SERVICES[process]["command"]
    main = importlib.import_module(f"{module}.__main__")

    # parses every word of the command, without running it
    command = get_command(main.commands)
    context = command.make_context(module, list(arguments))
    assert isinstance(command, typer.core.TyperGroup)
    name, subcommand, rest = command.resolve_command(context, list(arguments))
    assert subcommand is not None
    subcommand.make_context(name, rest)


def test_each_worker_of_compose_yml_serves_a_destination() -> None:
    workers = {service["command"][2] for service in SERVICES.values() if _is_consumer(service)}

    assert workers == {*RoutingTable().destinations, "dead-letters", "reconciler"}


@pytest.mark.parametrize(("process", "tables"), PROCESSES.items())
def test_each_process_is_given_its_own_settings_and_no_others(process: str, tables: Tables) -> None:
    assert SERVICES[process]["environment"].keys() == settings_of(tables).keys()


@pytest.mark.parametrize(("process", "tables"), PROCESSES.items())
def test_what_a_process_requires_is_demanded_or_made_of_what_is_demanded(
    process: str, tables: Tables
) -> None:
    environment = SERVICES[process]["environment"]

    for setting in settings_of(tables).values():
        if setting.required:
            assert re.search(r"\$\{\w+:\?.+\}", environment[setting.name]), setting.name


def test_names_that_deploy_has_too_are_not_open_to_change() -> None:
    fixed = {
        "EVENTS_EXCHANGE": RabbitSettings.model_fields["events_exchange"].default,
        "MONGODB_DATABASE": MongoSettings.model_fields["mongodb_database"].default,
        "OUTBOX_COLLECTION": RelaySettings.model_fields["outbox_collection"].default,
        "DELIVERY_LIMIT": TopologySettings.model_fields["delivery_limit"].default,
    }
    for process in [*PROCESSES, "mongodb-init"]:
        environment = SERVICES[process]["environment"]
        for name in environment.keys() & fixed.keys():
            assert environment[name] == fixed[name], f"{process}: {name}"


@pytest.mark.parametrize(("process", "setting"), GRACE.items())
def test_no_process_is_killed_before_its_own_grace_time_is_over(process: str, setting: str) -> None:
    ours_seconds = float(settings_of(PROCESSES[process])[setting].default)

    assert _seconds(SERVICES[process]["stop_grace_period"]) >= ours_seconds + 10


def test_two_relays_run_so_that_one_stands_by() -> None:
    assert SERVICES["relay"]["deploy"]["replicas"] == 2


@pytest.mark.parametrize("process", PROCESSES)
def test_a_process_may_write_nowhere_and_gain_nothing(process: str) -> None:
    service = SERVICES[process]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "volumes" not in service


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_ports_are_published_on_the_loopback_address_only(service: dict[str, Any]) -> None:
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))


def test_only_who_calls_a_third_party_gets_out() -> None:
    networks = yaml.safe_load(COMPOSE.read_text())["networks"]
    outside = {name for name, service in SERVICES.items() if "third-parties" in service["networks"]}

    assert networks["inside"] == {"internal": True}
    assert outside == RoutingTable().destinations.keys()


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_servers_are_pinned_to_a_minor_version(service: dict[str, Any]) -> None:
    assert "build" in service or re.fullmatch(r"(mongo|rabbitmq):\d+\.\d+.*", service["image"])


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_what_a_service_waits_for_can_come_about(service: dict[str, Any]) -> None:
    for name, wait in service.get("depends_on", {}).items():
        if wait["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[name]
        else:
            assert wait["condition"] == "service_completed_successfully"
            assert SERVICES[name]["restart"] == "no"


def test_no_password_stands_in_the_repository() -> None:
    for path in [COMPOSE, *DEPLOY.rglob("*")]:
        if path.is_file():
            for user_info in re.findall(r"://\w+:([^@\s]+)@", path.read_text()):
                assert user_info.startswith("${"), path
    assert not {"users", "permissions"} & DEFINITIONS.keys()


async def test_the_brokers_definitions_are_what_the_consumers_declare() -> None:
    declared = Declared()
    for destination in RoutingTable().destinations:
        await topology.declare_deliveries(
            declared,  # type: ignore[arg-type]  # it only notes what a channel would be asked for
            destination,
            events_exchange=RabbitSettings.model_fields["events_exchange"].default,
            delivery_limit=TopologySettings.model_fields["delivery_limit"].default,
        )

    everything = [thing for kind in DEFINITIONS.values() for thing in kind if "durable" in thing]
    assert all(thing["durable"] and not thing["auto_delete"] for thing in everything)
    assert {exchange["name"]: exchange["type"] for exchange in DEFINITIONS["exchanges"]} == (
        declared.exchanges
    )
    assert {queue["name"]: queue["arguments"] for queue in DEFINITIONS["queues"]} == declared.queues
    assert {
        (binding["destination"], binding["source"], binding["routing_key"])
        for binding in DEFINITIONS["bindings"]
    } == declared.bindings


def test_the_broker_reads_the_definitions_that_compose_yml_brings() -> None:
    configuration = (DEPLOY / "rabbitmq" / "rabbitmq.conf").read_text()
    (path,) = re.findall(r"^definitions\.local\.path = (.+)$", configuration, re.MULTILINE)

    assert f"./deploy/rabbitmq/definitions.json:{path}:ro" in SERVICES["rabbitmq"]["volumes"]


def test_every_user_of_a_server_is_made_by_its_step() -> None:
    for server, step, made in (
        ("MONGODB", "mongodb-init", {"root", *ROLES}),
        ("RABBITMQ", "rabbitmq-users", {"operator", *RIGHTS}),
    ):
        urls = (
            str(service.get("environment", {}).get(f"{server}_URL", ""))
            for service in SERVICES.values()
        )
        used = {user for url in urls for user in re.findall(r"://(\w+):", url)}
        given = {
            name.split("_")[1].lower()
            for name in SERVICES[step]["environment"]
            if name.endswith("_PASSWORD")
        }
        assert used == made - {"root", "operator"}
        assert given == made


def test_rights_in_mongodb_are_on_collections_that_exist() -> None:
    known = {
        ASSISTANCES,
        IDEMPOTENCY_KEYS,
        OUTBOX,
        DEAD_LETTERS,
        DESTINATIONS,
        CHECKPOINTS,
        OPERATIONS,
        OPERATION_ITEMS,
        "",
    }

    granted = [grant for grants in ROLES.values() for grant in grants]
    assert {grant["collection"] for grant in granted if "database" not in grant} == known
    elsewhere = [grant for grant in granted if "database" in grant]
    assert all(grant["actions"] == ["find"] for grant in elsewhere)
    assert all(grant["why"] for grants in ROLES.values() for grant in grants)


def test_nobody_has_the_right_to_remove_anything_from_mongodb() -> None:
    actions = {
        action for grants in ROLES.values() for grant in grants for action in grant["actions"]
    }

    assert not actions & {"remove", "dropCollection", "dropDatabase", "dropIndex"}


def test_the_step_for_mongodb_is_given_what_its_script_reads() -> None:
    script = (DEPLOY / "mongodb" / "initialise.js").read_text()
    environment = SERVICES["mongodb-init"]["environment"]

    assert set(re.findall(r"setting\('(\w+)'\)", script)) <= environment.keys()
    assert all(script.count(left) == script.count(right) for left, right in ("()", "[]", "{}"))


def test_the_step_for_rabbitmq_is_a_script_that_a_shell_can_read() -> None:
    script = DEPLOY / "rabbitmq" / "users.sh"
    environment = SERVICES["rabbitmq-users"]["environment"]

    subprocess.run(["sh", "-n", script], check=True)
    assert set(re.findall(r"RABBITMQ_[A-Z_]+(?=\")", script.read_text())) <= environment.keys()


def test_the_image_takes_the_packages_of_the_product_and_nothing_of_the_sandbox() -> None:
    assert {source for source in _copied() if (ROOT / source).is_dir()} == PRODUCT


def test_the_build_sees_what_the_dockerfile_copies_and_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    first, *rules = [line for line in ignored if line and not line.startswith("#")]

    assert first == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == _copied()


def test_the_wheel_in_the_image_holds_the_product_whole_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in _copied():
        origin = ROOT / name
        if origin.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(origin, source / name, ignore=ignored)
        else:
            shutil.copy(origin, source)

    command = ["wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, "-m", "pip", *command, "--wheel-dir", tmp_path, "."],
        cwd=source,
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull},
        check=True,
    )

    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == {
        str(path.relative_to(ROOT))
        for package in PRODUCT
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_image_is_built_with_the_locked_build_tool() -> None:
    build_lock = (DEPLOY / "image" / "build.lock").read_text()

    assert build_lock in (ROOT / "requirements-dev.lock").read_text()


def test_the_image_is_built_of_what_the_locks_name_by_hash_only() -> None:
    installs = re.findall(r"pip (?:install|wheel) .+", DOCKERFILE)

    assert all("--require-hashes" in line or "--no-index" in line for line in installs)


def test_the_image_runs_a_process_directly_and_not_as_root() -> None:
    instructions = dict(re.findall(r"^([A-Z]+) (.+)$", DOCKERFILE, re.MULTILINE))

    assert instructions["ENTRYPOINT"] == '["python", "-m"]'
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", instructions["USER"])


class Declared:
    """Notes what is declared."""

    def __init__(self) -> None:
        self.exchanges: dict[str, str] = {}
        self.queues: dict[str, Mapping[str, Any]] = {}
        self.bindings: set[tuple[str, str, str]] = set()

    async def declare_exchange(self, name: str, kind: str) -> None:
        self.exchanges[name] = kind

    async def declare_queue(self, name: str, arguments: Mapping[str, Any]) -> None:
        self.queues[name] = arguments

    async def bind_queue(self, name: str, exchange: str, routing_key: str) -> None:
        self.bindings.add((name, exchange, routing_key))


def _is_consumer(service: Mapping[str, Any]) -> bool:
    return "build" in service and service["command"][:2] == ["consumers", "run"]


def _seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


def _copied() -> set[str]:
    """What the Dockerfile copies from the build context."""
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    return {source for line in copies for source in line.split()}
