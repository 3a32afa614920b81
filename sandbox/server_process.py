"""A local server as a child process that tests may kill or freeze; it never outlives its parent."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sandbox.errors import ServerFailedError

LAST_LINES = 15


def leash(*command: str) -> subprocess.Popen[bytes]:
    """Run `command` when this process ends, however it ends; closing stdin by hand does it too.

    The pipe closes even after SIGKILL. PR_SET_PDEATHSIG is not enough: it fires when the *thread*
    that started the child ends, and Erlang's own children would not get the signal.
    """
    return subprocess.Popen(
        ["sh", "-c", 'read -r _; "$@"', "leash", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def let_go(held: subprocess.Popen[bytes]) -> None:
    """End a leash without running its command."""
    held.kill()
    held.wait()
    if held.stdin is not None:
        held.stdin.close()


@dataclass
class ServerProcess:
    """One process in a process group of its own."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    leash: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.running and self.process else None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def launch(self) -> None:
        """Start the process and return at once; its output is appended to the log."""
        if self.running:
            return
        self._reap()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.leash = leash("kill", "-s", "KILL", "--", f"-{self.process.pid}")

    def stop(self, *, deadline_seconds: float = 30) -> None:
        """Ask with SIGTERM; a process that does not end by the deadline is killed."""
        if self.process is None:
            return
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(deadline_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reap()

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._reap()

    def pause(self) -> None:
        """Freeze it; returns once it is frozen, which a busy process is a moment later only."""
        self.signal(signal.SIGSTOP)
        if self.running and self.process is not None:
            frozen = psutil.Process(self.process.pid)
            while frozen.status() != psutil.STATUS_STOPPED:
                time.sleep(0.001)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        if self.running and self.process is not None:
            os.killpg(self.process.pid, number)

    def check_alive(self) -> None:
        if not self.running:
            self._reap()
            raise ServerFailedError(f"{self.name} ended while starting.\n{self.last_words()}")

    def last_words(self) -> str:
        if not self.log.exists():
            return f"It left no log at {self.log}."
        lines = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        return "\n".join([f"The end of {self.log}:", *lines])

    def _reap(self) -> None:
        if self.process is not None:
            self.process.wait()
            self.process = None
        if self.leash is not None:
            let_go(self.leash)
            self.leash = None


@dataclass(frozen=True)
class Deadline:
    """Until when a server may take to answer."""

    server: str
    at: float

    @classmethod
    def after(cls, seconds: float, server: str) -> "Deadline":
        return cls(server, time.monotonic() + seconds)

    def rest(self, last_seen: object, *processes: ServerProcess) -> None:
        """Wait a moment; raises ServerFailedError past the deadline or when a process ended."""
        for process in processes:
            process.check_alive()
        if time.monotonic() > self.at:
            words = "\n".join(process.last_words() for process in processes)
            raise ServerFailedError(f"{self.server} did not get ready: {last_seen}\n{words}")
        time.sleep(0.02)
