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

from assistance.collection import (
    ASSISTANCES,
    CLOSED_BALANCE,
    DEAD_LETTERS,
    DESTINATIONS,
    IDEMPOTENCY_KEYS,
)
from assistance.routing import RoutingTable
from consumers.settings import TopologySettings
from installation.secret_files import makers
from installation.settings import SecretsSettings
from outbox.collection import OUTBOX
from relay.checkpoint import CHECKPOINTS
from relay.journal import JOURNAL
from relay.settings import RelaySettings
from runtime.operations import OPERATION_ITEMS, OPERATIONS
from runtime.settings import MongoSettings, RabbitSettings
from tests.support.deployment import DEPLOY, ROLES
from tools.settings_pages import COMPOSE, ROOT, Tables, process_tables, settings_of

SCHEMA = ROOT / "tests" / "compose_specification" / "compose-spec.json"
DOCKERFILE = (ROOT / "Dockerfile").read_text()

SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
PRODUCTION: dict[str, dict[str, Any]] = yaml.safe_load(
    (ROOT / "compose.production.yml").read_text()
)["services"]
TABLES = process_tables()
STEPS = {name: tables for name, tables in TABLES.items() if SERVICES[name]["restart"] == "no"}
PROCESSES = {name: tables for name, tables in TABLES.items() if name not in STEPS}
SANDBOX = "third-parties"

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


def test_compose_yml_starts_every_process_and_step() -> None:
    ours = {name for name, service in SERVICES.items() if _is_ours(service)}

    assert ours == {*TABLES, "ready"}


def test_the_product_is_built_once_and_started_from_that_image() -> None:
    built = {name for name, service in SERVICES.items() if "build" in service}

    assert built == {"secrets", SANDBOX}
    assert {SERVICES[name]["build"]["target"] for name in built} == {"product", "sandbox"}
    assert all(SERVICES[name]["pull_policy"] == "never" for name in TABLES)


def test_compose_yml_demands_no_variable() -> None:
    assert ":?" not in COMPOSE.read_text()
    assert "env_file" not in COMPOSE.read_text()


@pytest.mark.parametrize("process", [*TABLES, "ready"])
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
    assert _given(SERVICES[process]) == settings_of(tables).keys()


@pytest.mark.parametrize(("step", "tables"), STEPS.items())
def test_a_step_is_given_no_setting_that_it_does_not_read(step: str, tables: Tables) -> None:
    assert _given(SERVICES[step]) <= settings_of(tables).keys()


@pytest.mark.parametrize(("name", "tables"), TABLES.items())
def test_everything_that_is_required_is_given(name: str, tables: Tables) -> None:
    environment = SERVICES[name]["environment"]

    for setting in settings_of(tables).values():
        if setting.required:
            assert environment.get(setting.name) or environment.get(f"{setting.name}_FILE")


@pytest.mark.parametrize("name", TABLES)
def test_every_secret_is_read_from_the_volume_that_the_service_mounts(name: str) -> None:
    paths = [value for key, value in SERVICES[name]["environment"].items() if key.endswith("_FILE")]

    assert all(path.startswith("/run/secrets/") for path in paths)
    if paths:
        (volume,) = SERVICES[name]["volumes"]
        assert volume.endswith(":/run/secrets:ro")


def test_each_secret_is_mounted_into_the_one_process_that_reads_it() -> None:
    made = {volume.partition(":")[0] for volume in SERVICES["secrets"]["volumes"]}
    readers = {
        name: {volume.partition(":")[0] for volume in service.get("volumes", [])} & made
        for name, service in SERVICES.items()
        if name != "secrets"
    }

    for name, volumes in readers.items():
        steps = {"mongodb-installation", "rabbitmq-installation", "ready"}
        own = "installation" if name in steps else name
        assert volumes <= {f"secrets-{own}"}, name
    assert set.union(*readers.values()) == made


def test_production_provides_every_secret_and_replaces_the_sandbox() -> None:
    settings = SecretsSettings()
    environment = PRODUCTION["secrets"]["environment"]

    assert makers(settings).keys() <= environment.keys()
    assert "--no-generate" in PRODUCTION["secrets"]["command"]
    assert PRODUCTION[SANDBOX] == {"profiles": ["sandbox"]}
    for name in RoutingTable().destinations:
        sandboxed = {
            key
            for key, value in SERVICES[name]["environment"].items()
            if key.startswith(f"{name.upper()}_") and value is not None
        }
        assert PRODUCTION[name]["environment"].keys() == sandboxed, name


def test_names_that_deploy_has_too_are_not_open_to_change() -> None:
    fixed = {
        "EVENTS_EXCHANGE": RabbitSettings.model_fields["events_exchange"].default,
        "MONGODB_DATABASE": MongoSettings.model_fields["mongodb_database"].default,
        "OUTBOX_COLLECTION": RelaySettings.model_fields["outbox_collection"].default,
        "DELIVERY_LIMIT": TopologySettings.model_fields["delivery_limit"].default,
    }
    for process in [*TABLES, "ready"]:
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
    assert all(volume.endswith(":ro") for volume in service["volumes"])


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_ports_are_published_on_the_loopback_address_only(service: dict[str, Any]) -> None:
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))


def test_only_workers_reach_third_parties() -> None:
    networks = yaml.safe_load(COMPOSE.read_text())["networks"]
    outside = {
        name for name, service in SERVICES.items() if "third-parties" in service.get("networks", [])
    }

    assert networks["inside"] == {"internal": True}
    assert outside == {*RoutingTable().destinations, SANDBOX}


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_servers_are_pinned_to_a_minor_version(service: dict[str, Any]) -> None:
    pinned = re.fullmatch(r"\$\{\w+:-(mongo|rabbitmq):\d+\.\d+.*\}", service["image"])
    assert pinned or "assistance-relay" in service["image"]


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_what_a_service_waits_for_can_come_about(service: dict[str, Any]) -> None:
    for name, wait in service.get("depends_on", {}).items():
        if wait["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[name]
        elif wait["condition"] == "service_started":
            # a step waits by itself for the server that it prepares
            assert service["restart"] == "no"
        else:
            assert wait["condition"] == "service_completed_successfully"
            assert SERVICES[name]["restart"] == "no"


def test_no_password_stands_in_the_repository() -> None:
    for path in [COMPOSE, *DEPLOY.rglob("*")]:
        if path.is_file() and path.suffix != ".whl":
            for user_info in re.findall(r"://\w+:([^@\s]+)@", path.read_text()):
                assert user_info.startswith("${"), path


def test_the_broker_reads_the_user_that_the_secrets_bring() -> None:
    configuration = (DEPLOY / "rabbitmq" / "rabbitmq.conf").read_text()
    (path,) = re.findall(r"^definitions\.local\.path = (.+)$", configuration, re.MULTILINE)

    assert path == "/run/secrets/definitions.json"
    assert "secrets-rabbitmq:/run/secrets:ro" in SERVICES["rabbitmq"]["volumes"]


def test_server_side_javascript_is_off() -> None:
    assert "--noscripting" in SERVICES["mongodb"]["command"]


def test_rights_in_mongodb_are_on_collections_that_exist() -> None:
    known = {
        ASSISTANCES,
        IDEMPOTENCY_KEYS,
        OUTBOX,
        DEAD_LETTERS,
        CLOSED_BALANCE,
        DESTINATIONS,
        CHECKPOINTS,
        JOURNAL,
        OPERATIONS,
        OPERATION_ITEMS,
        "",
    }

    granted = [grant for grants in ROLES.values() for grant in grants]
    assert {grant["collection"] for grant in granted if "database" not in grant} == known
    elsewhere = [grant for grant in granted if "database" in grant]
    assert all(grant["actions"] == ["find"] for grant in elsewhere)
    assert all(grant["why"] for grants in ROLES.values() for grant in grants)


def test_no_role_may_remove_anything_from_mongodb() -> None:
    actions = {
        action for grants in ROLES.values() for grant in grants for action in grant["actions"]
    }

    assert not actions & {"remove", "dropCollection", "dropDatabase", "dropIndex"}


def test_the_image_takes_the_packages_of_the_product_and_nothing_of_the_sandbox() -> None:
    assert {source for source in _copied() if (ROOT / source).is_dir()} == PRODUCT | {"sandbox"}
    product = DOCKERFILE.partition("FROM build AS build-sandbox")[0]
    assert "COPY sandbox" not in product
    assert "FROM product AS sandbox" in DOCKERFILE


def test_the_build_sees_what_the_dockerfile_copies_and_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    first, *rules = [line for line in ignored if line and not line.startswith("#")]

    assert first == "*"
    seen = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert seen == {source.replace("/wheels*", "/wheels") for source in _copied()}


def test_the_wheel_in_the_image_holds_the_product_whole_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in _copied() - {"sandbox"}:
        if "*" in name:
            continue
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


@pytest.mark.parametrize("lock", ["build.lock", "sandbox.lock"])
def test_the_images_are_built_of_what_the_development_lock_names(lock: str) -> None:
    locked = (ROOT / "requirements-dev.lock").read_text()
    parts = re.split(r"^(?=[a-z])", (DEPLOY / "image" / lock).read_text(), flags=re.MULTILINE)

    assert all(part in locked for part in parts)


def test_the_image_is_built_of_what_the_locks_name_by_hash_only() -> None:
    installs = re.findall(r"(?:install|wheel) --.+", DOCKERFILE)

    assert len(installs) == 5
    assert all("--require-hashes" in line or "--no-index" in line for line in installs)


def test_the_image_runs_a_process_directly_and_not_as_root() -> None:
    instructions = dict(re.findall(r"^([A-Z]+) (.+)$", DOCKERFILE, re.MULTILINE))

    assert instructions["ENTRYPOINT"] == '["python", "-m"]'
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", instructions["USER"])


def _is_ours(service: Mapping[str, Any]) -> bool:
    return "ASSISTANCE_IMAGE" in service["image"]


def _given(service: Mapping[str, Any]) -> set[str]:
    """The settings in a service's environment, also those that it reads from files."""
    return {name.removesuffix("_FILE") for name in service["environment"]}


def _is_consumer(service: Mapping[str, Any]) -> bool:
    return _is_ours(service) and service["command"][:2] == ["consumers", "run"]


def _seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


def _copied() -> set[str]:
    """What the Dockerfile copies from the build context."""
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    return {source for line in copies for source in line.split()}
