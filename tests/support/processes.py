"""Our own processes, as real ones, forked from one that has loaded what they import."""

import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from runtime import clock
from sandbox.server_process import leash, let_go
from sandbox.waiting import wait_until

#: Test-speed hack: loaded once by a server that each of our processes is forked from. Otherwise the
#: imports of every start would take more than half a second of CPU time.
PRELOADED = [
    "consumers.channels.email",
    "consumers.channels.slack",
    "consumers.channels.webhook",
    "consumers.maintenance.dead_letter_consumer",
    "consumers.admin.dead_letters_cli",
    "consumers.maintenance.reconciler",
    "consumers.admin.redrive_cli",
    "consumers.delivery.worker",
    "relay.process",
    "service.app",
    "service.audit",
    "tests.support.processes",
    "typer",
    "uvicorn",
]

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(PRELOADED)


@dataclass
class OurProcess:
    """`python -m <arguments>` with an environment of its own; its output goes to `log`."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    process: multiprocessing.process.BaseProcess = field(init=False)
    _leash: subprocess.Popen[bytes] | None = field(init=False)

    def __post_init__(self) -> None:
        environment = bare_environment() | dict(self.environment)
        self.log.touch()
        self.process = forks.Process(target=become, args=(self.arguments, environment, self.log))
        self.process.start()
        # a killed test runner ends neither the fork server nor its forks, which hold its pipe
        self._leash = leash("kill", "-s", "KILL", "--", str(self.pid), f"-{self.pid}")

    @property
    def name(self) -> str:
        return f"`{' '.join(self.arguments)}`"

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs, negative for a signal."""
        return self.process.exitcode

    @property
    def running(self) -> bool:
        return self.exit_code is None

    def signal(self, number: signal.Signals) -> None:
        if self.running:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.join()
        self._unleash()

    def _unleash(self) -> None:
        if self._leash is not None:
            let_go(self._leash)
            self._leash = None

    def wait_exit(self, deadline_seconds: float = 30) -> int:
        self.process.join(deadline_seconds)
        if self.exit_code is None:
            raise AssertionError(
                f"{self.name} did not exit within {deadline_seconds:g} s; its last lines:\n"
                f"{self.last_lines()}"
            )
        self._unleash()
        return self.exit_code

    def wait_log(self, text: str, *, after: int = 0, deadline_seconds: float = 30) -> int:
        """Wait until `text` is in the output from character `after` on.

        Returns where it ends, to be given as `after` to the next wait.
        """

        def place() -> int:
            found = self.output().find(text, after)
            if found < 0 and not self.running:
                raise AssertionError(
                    f"{self.name} exited with {self.exit_code} before it said {text!r};"
                    f" its last lines:\n{self.last_lines()}"
                )
            return found + len(text) if found >= 0 else 0

        return wait_until(place, f"{self.name} says {text!r}", deadline_seconds=deadline_seconds)

    def state(self) -> str:
        return f"{self.name}, {'running' if self.running else f'exit {self.exit_code}'}"

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def last_lines(self, count: int = 30) -> str:
        return "\n".join(self.output().splitlines()[-count:])

    def end(self) -> None:
        """End it and all that it started, whatever state it is in."""
        group = group_members(self.pid)
        for member in group:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self.kill()
        psutil.wait_procs(group, timeout=5)


def become(arguments: tuple[str, ...], environment: Mapping[str, str], log: Path) -> None:
    """Turn a fork into `python -m <arguments>`, the leader of a group of its own."""
    os.setsid()
    with log.open("ab") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environment)
    # a checkout may hold a `.env` of the developer, which is not for tests
    os.chdir(log.parent)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = list(arguments)
    # what is printed is looked for while the process runs
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    shift_clock(float(environment.get("TEST_CLOCK_AHEAD_SECONDS", "0")))
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def shift_clock(seconds: float) -> None:
    """Let this process' machine be ahead of all others, in the one function that reads its clock.

    A unit test holds the product to that function.
    """
    if seconds:
        clock.machine_time = lambda: datetime.now(UTC) + timedelta(seconds=seconds)


@contextmanager
def leashed(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Kill `process` also when the process that runs the tests is killed."""
    held = leash("kill", "-s", "KILL", str(process.pid))
    try:
        yield
    finally:
        let_go(held)


def group_members(group: int) -> list[psutil.Process]:
    """List the living processes of a process group."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members


def bare_environment() -> dict[str, str]:
    """What a Python process needs, and the driver under test; none of the caller's settings."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "MONGODB_DRIVER")
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        # a test that looks says itself where; all others leave the default ports alone
        "MONITORING_PORT": "0",
    }
