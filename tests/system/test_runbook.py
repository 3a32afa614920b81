"""The commands of docs/runbook.md, run beside `make up` with nothing but the line of its banner."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from runtime.exit_codes import ExitCode
from sandbox.waiting import wait_until
from tests.support.paths import REPOSITORY
from tests.support.processes import bare_environment, leashed

#: A command on the page, in a table or in a sentence.
COMMAND = re.compile(r"`(python -m (?:service|relay|consumers) [^`]*)`")

#: A command that is given an ID of another kind may find nothing to do.
HARMLESS = {ExitCode.OK, ExitCode.NOTHING_DONE}


@pytest.fixture(scope="module")
def banner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What `python -m sandbox up` prints before it waits."""
    folder = tmp_path_factory.mktemp("up")
    output = folder / "output"
    with (
        output.open("wb") as written,
        subprocess.Popen(
            [sys.executable, "-m", "sandbox", "up", "--folder", str(folder / "local")],
            cwd=REPOSITORY,
            env=bare_environment() | {"PYTHONUNBUFFERED": "1"},
            stdout=written,
            stderr=subprocess.STDOUT,
        ) as sandbox,
        leashed(sandbox),
    ):
        try:
            wait_until(
                lambda: "Ctrl-C stops" in output.read_text() or sandbox.poll() is not None,
                "the sandbox is up",
                deadline_seconds=120,
            )
            assert sandbox.poll() is None, output.read_text()
            yield output.read_text()
        finally:
            sandbox.send_signal(signal.SIGTERM)
            sandbox.wait(60)


def test_every_command_of_the_runbook_runs_after_the_line_of_the_banner(
    banner: str, tmp_path: Path
) -> None:
    [line] = re.findall(r"^ *(set -a;.*)$", banner, re.MULTILINE)
    page = (REPOSITORY / "docs/runbook.md").read_text()
    commands = sorted(set(COMMAND.findall(page)))
    assert len(commands) > 20

    def run(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/bash", "-c", f"{line}\n{command}"],
            cwd=tmp_path,
            env={"PATH": os.defpath, "HOME": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    request_id = accept(banner)
    with ThreadPoolExecutor(2) as pool:
        ended = dict(
            zip(
                commands,
                pool.map(lambda one: run(filled_in(one, request_id)), commands),
                strict=True,
            )
        )
    broken = {
        command: f"exit {one.returncode}: {one.stdout}{one.stderr}"
        for command, one in ended.items()
        if one.returncode not in (HARMLESS if " ID" in command or "--why" in command else {0})
    }
    assert not broken
    assert ended["python -m service show ID"].stdout.startswith(request_id)


def accept(banner: str) -> str:
    """Post a request as the banner's curl does; its ID."""
    [url] = re.findall(r"curl -s (\S+)", banner)
    [key] = re.findall(r"X-API-KEY: ([^']+)", banner)
    body = {"topic": "sales", "description": "Hello"}
    answer = httpx.post(url, json=body, headers={"X-API-KEY": key}, trust_env=False)
    request_id: str = answer.raise_for_status().json()["id"]
    return request_id


def filled_in(command: str, request_id: str) -> str:
    given = {r"\bID\b": request_id, r"\bNAME\b": "slack", "…": "'a rehearsal'"}
    for name, value in given.items():
        command = re.sub(name, value, command)
    return command
