"""Commands show the program name they were called by: `python -m relay` or `outbox-relay`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RunProcess
from tests.support.paths import REPOSITORY


def usage(name: str) -> str:
    return f"Usage: {name} run [OPTIONS]"


def hint(name: str) -> str:
    return f"Try '{name} run --help' for help."


@pytest.mark.parametrize("module", ["service", "relay", "consumers"])
def test_a_module_shows_the_call_of_the_module(run_process: RunProcess, module: str) -> None:
    process = run_process(module, "run", "--no-such-option", environment={})
    assert process.wait_exit() == 2
    assert usage(f"python -m {module}") in process.output()
    assert hint(f"python -m {module}") in process.output()


@pytest.mark.parametrize("script", ["assistance-service", "outbox-relay", "assistance-consumers"])
def test_a_script_shows_its_own_name(script: str) -> None:
    ended = subprocess.run(
        [Path(sys.executable).with_name(script), "run", "--no-such-option"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"COLUMNS": "120"},
    )
    assert ended.returncode == 2
    assert usage(script) in ended.stderr
    assert hint(script) in ended.stderr


@pytest.mark.parametrize("package", ["service", "relay", "consumers"])
def test_no_text_of_a_process_has_a_fixed_name_for_its_own_program(package: str) -> None:
    """Docstrings may: they are for readers of the code."""
    places = [
        f"{path.relative_to(REPOSITORY)}: {text}"
        for path in (REPOSITORY / package).rglob("*.py")
        for text in texts(path)
        if f"python -m {package}" in text
    ]
    assert places == []


def texts(path: Path) -> set[str]:
    """Give the string literals of a module that are not docstrings of the module."""
    tree = ast.parse(path.read_text())
    return {
        node.value
        for statement in tree.body
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for node in ast.walk(statement)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
