"""Files for editors, the hosted workflow and packaging name only what exists."""

import importlib.util
import json
import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from sandbox.__main__ import ENV_FILE, LOCAL
from tests.support.paths import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PRODUCT = ("outbox", "assistance", "runtime", "service", "relay", "consumers")
WORKFLOW = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
MAKE_TARGETS = set(
    re.findall(r"^([a-z-]+):.*## ", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
)


def read_json(path: str) -> Any:
    return json.loads((REPOSITORY / path).read_text())


def launch_entries() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = read_json(".vscode/launch.json")["configurations"]
    return entries


@pytest.mark.parametrize("entry", launch_entries(), ids=lambda entry: entry["name"])
def test_a_launch_entry_starts_a_module_that_exists(entry: dict[str, Any]) -> None:
    assert importlib.util.find_spec(entry["module"])


@pytest.mark.parametrize("process", ["service", "relay", "consumers"])
def test_each_process_has_a_launch_entry_against_the_sandbox(process: str) -> None:
    files = {entry.get("envFile") for entry in launch_entries() if entry["module"] == process}
    assert files == {f"${{workspaceFolder}}/{LOCAL / ENV_FILE}"}


def test_tasks_run_make_targets() -> None:
    commands = [task["command"] for task in read_json(".vscode/tasks.json")["tasks"]]
    assert commands
    assert {command.removeprefix("make ") for command in commands} <= MAKE_TARGETS


def test_the_dev_container_runs_a_make_target() -> None:
    command = read_json(".devcontainer/devcontainer.json")["postCreateCommand"]
    assert command.removeprefix("CI=true make ") in MAKE_TARGETS


def workflow_steps() -> list[dict[str, Any]]:
    return [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def test_workflow_commands_are_make_targets_or_files() -> None:
    commands = [step["run"].split() for step in workflow_steps() if "run" in step]
    assert commands
    for first, *rest in commands:
        assert rest[0] in MAKE_TARGETS if first == "make" else (REPOSITORY / first).is_file()


def test_workflow_actions_are_pinned_to_a_commit() -> None:
    actions = [step["uses"] for step in workflow_steps() if "uses" in step]
    assert actions
    assert [action for action in actions if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action)] == []


def test_the_workflow_runs_unit_tests_on_every_supported_python() -> None:
    versions = WORKFLOW["jobs"]["unit"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"


@pytest.mark.parametrize(
    ("script", "module"),
    [
        ("assistance-service", "service"),
        ("outbox-relay", "relay"),
        ("assistance-consumers", "consumers"),
    ],
)
def test_a_script_is_the_command_of_its_package(script: str, module: str) -> None:
    target = PROJECT["project"]["scripts"][script]
    assert target == f"{module}.__main__:commands"
    assert isinstance(EntryPoint(script, target, "console_scripts").load(), typer.Typer)


@pytest.mark.parametrize("package", PRODUCT)
def test_packages_publish_their_types(package: str) -> None:
    assert (REPOSITORY / package / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["*"]


@pytest.mark.parametrize(
    "page",
    sorted((REPOSITORY / "docs" / "decisions").glob("0*.md")),
    ids=lambda page: page.stem,
)
def test_a_decision_has_number_date_status_and_trigger(page: Path) -> None:
    text = page.read_text()
    assert text.startswith(f"# {int(page.stem[:4])}. ")
    assert re.search(r"\n\n\*\*Date:\*\* \d{4}-\d\d-\d\d\. \*\*Status:\*\* \w", text)
    assert "\n**Decision.** " in text
    assert "\n**Why.** " in text
    assert text.count("\n**Revisit when** ") == 1
    assert f"]({page.name}) | {text.splitlines()[0].partition('. ')[2]} |" in (
        page.with_name("README.md").read_text()
    )
