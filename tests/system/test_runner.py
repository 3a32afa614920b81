"""What the suite promises about itself: nothing outlives its runner; unit tests need no server."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sandbox.waiting import wait_until
from tests.support.paths import REPOSITORY
from tests.support.processes import group_members, leashed

#: A test that has one of everything and waits, after it has named all that runs below its runner.
SAMPLE = """
import os
from pathlib import Path
from signal import pause

def test_that_waits(world, third_parties, run_process):
    environment = {
        "MONGODB_URL": world.mongodb_url,
        "MONGODB_DATABASE": world.database_name,
        "RABBITMQ_URL": world.rabbitmq_url,
    }
    run_process("relay", "run", environment=environment).wait_log("relay.leading")
    ready = Path(os.environ["READY"])
    ready.with_suffix(".partial").write_text(str(os.getpid()))
    ready.with_suffix(".partial").rename(ready)
    pause()
"""


@pytest.mark.parametrize("killed", ["the only process", "a worker", "the controller"])
def test_nothing_outlives_a_killed_runner(killed: str, tmp_path: Path) -> None:
    ready, sample = tmp_path / "ready", tmp_path / "test_sample.py"
    sample.write_text(SAMPLE)
    workers = "0" if killed == "the only process" else "1"
    with (tmp_path / "log").open("w") as log:
        runner = start_pytest(sample, "-n", workers, ready=ready, log=log.fileno())
    try:
        wait_until(
            lambda: ready.exists() or runner.poll() is not None,
            "the sample is in mid-test",
            deadline_seconds=120,
        )
        assert ready.exists(), (tmp_path / "log").read_text()
        in_test = psutil.Process(int(ready.read_text()))
        started = in_test.children(recursive=True)
        names = {process.name() for process in started}
        assert {"mongod", "beam.smp", "epmd"} <= names
        assert any("sandbox.third_parties" in process.cmdline() for process in started)

        (in_test if killed == "a worker" else psutil.Process(runner.pid)).kill()

        _, left = psutil.wait_procs(started, timeout=15)
        assert [process.cmdline() for process in left] == []
    finally:
        for process in group_members(runner.pid):
            process.send_signal(signal.SIGKILL)
        runner.wait()


@pytest.mark.parametrize(
    ("body", "refusal"),
    [
        (
            "def test_it(mongodb_url): pass",
            "test_it is a unit test and asks for launched_servers: move it out of tests/unit",
        ),
        (
            "import socket\ndef test_it(): socket.create_connection(('127.0.0.1', 1))",
            "a unit test opens no socket (socket.connect): move it out of tests/unit",
        ),
    ],
)
def test_a_unit_test_that_needs_a_server_fails(body: str, refusal: str, tmp_path: Path) -> None:
    sample, output = tmp_path / "test_sample.py", tmp_path / "log"
    sample.write_text(f"import pytest\npytestmark = pytest.mark.unit\n{body}\n")
    with output.open("w") as log:
        runner = start_pytest(sample, log=log.fileno())
        with leashed(runner):
            assert runner.wait(60) != 0
    assert refusal in output.read_text()


def start_pytest(
    *arguments: str | Path, ready: Path | None = None, log: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Run pytest in a process group of its own, with the fixtures and rules of this suite."""
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    return subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "tests.conftest",
                "-p",
                "no:cacheprovider",
            ),
            *("-c", REPOSITORY / "pyproject.toml", "--rootdir", REPOSITORY, *arguments),
        ],
        env=environment | {"READY": str(ready)},
        cwd=REPOSITORY,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
