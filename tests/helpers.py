"""What tests share: waiting for facts, and our own processes as real subprocesses."""

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil

Seen = TypeVar("Seen")

FIRST_REST_SECONDS = 0.01
LONGEST_REST_SECONDS = 0.2


def wait_until(predicate: Callable[[], Seen], what: str, *, deadline_seconds: float = 30) -> Seen:
    """Return the first true value of `predicate`.

    Raises AssertionError past the deadline, saying what was awaited and what was last seen.
    """
    end = time.monotonic() + deadline_seconds
    rest_seconds = FIRST_REST_SECONDS
    while not (seen := predicate()):
        if time.monotonic() > end:
            raise AssertionError(_unseen(what, deadline_seconds, seen))
        time.sleep(rest_seconds)
        rest_seconds = min(rest_seconds * 1.5, LONGEST_REST_SECONDS)
    return seen


async def wait_until_async(
    predicate: Callable[[], Awaitable[Seen] | Seen], what: str, *, deadline_seconds: float = 30
) -> Seen:
    """Do the same without holding up the event loop; `predicate` may be a coroutine function."""
    end = time.monotonic() + deadline_seconds
    rest_seconds = FIRST_REST_SECONDS
    while True:
        answer = predicate()
        seen = await answer if inspect.isawaitable(answer) else answer
        if seen:
            return seen
        if time.monotonic() > end:
            raise AssertionError(_unseen(what, deadline_seconds, seen))
        await asyncio.sleep(rest_seconds)
        rest_seconds = min(rest_seconds * 1.5, LONGEST_REST_SECONDS)


def _unseen(what: str, deadline_seconds: float, seen: object) -> str:
    return f"waited {deadline_seconds:g} s in vain until {what}; last seen: {seen!r}"


@dataclass
class OurProcess:
    """`python -m <arguments>` with an environment of its own; its output goes to `log`."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.arguments],
                env=bare_environment() | dict(self.environment),
                # a checkout may hold a `.env`, which is somebody's and not the test's
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def name(self) -> str:
        return f"`{' '.join(self.arguments)}`"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def wait_exit(self, deadline_seconds: float = 30) -> int:
        """Return the exit code, negative for a signal."""
        try:
            return self.process.wait(deadline_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"waited {deadline_seconds:g} s in vain until {self.name} exits; its last lines:\n"
                f"{self.last_lines()}"
            ) from None

    def wait_log(self, text: str, *, after: int = 0, deadline_seconds: float = 30) -> int:
        """Wait until `text` is in the output from character `after` on.

        Returns where it ends, to be given as `after` to the next wait.
        """

        def place() -> int:
            found = self.output().find(text, after)
            if found < 0 and not self.running:
                raise AssertionError(
                    f"{self.name} exited with {self.process.returncode} before it said {text!r};"
                    f" its last lines:\n{self.last_lines()}"
                )
            return found + len(text) if found >= 0 else 0

        return wait_until(place, f"{self.name} says {text!r}", deadline_seconds=deadline_seconds)

    def state(self) -> str:
        return f"{self.name}, {'running' if self.running else f'exit {self.process.returncode}'}"

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def last_lines(self, count: int = 30) -> str:
        return "\n".join(self.output().splitlines()[-count:])

    def end(self) -> None:
        """End it and all that it started, whatever state it is in."""
        group = group_members(self.pid)
        if group:
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(group, timeout=5)


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
    """Give what a Python process needs, and none of the settings of whoever runs the tests."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV")
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "PYTHONUNBUFFERED": "1",
        # a test that looks says itself where; all others leave the default ports alone
        "MONITORING_PORT": "0",
    }
