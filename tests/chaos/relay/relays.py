"""Three relays of one group as real processes; who of them leads is what they say themselves."""

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.waiting import wait_until
from tests.support.processes import OurProcess

RELAYS_COUNT = 3
LEADING, STANDING_BY = "relay.leading", "relay.standing_by"
WORDS_OF_A_ROLE = {LEADING, STANDING_BY, "relay.stopped_leading", "relay.interrupted"}
DEADLINE_SECONDS = 60.0
EXIT_DEADLINE_SECONDS = 30.0


@dataclass
class Relay:
    """A process, and what it has said so far. frozen: by SIGSTOP, so it takes no part."""

    process: OurProcess
    role: str = ""
    frozen: bool = False
    epochs: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    _read_bytes: int = 0

    def listen(self) -> None:
        with self.process.log.open("rb") as log:
            log.seek(self._read_bytes)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self._read_bytes += len(line)
                self._hear(line)

    def _hear(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            self.said.append(line.decode(errors="replace").strip())
            return
        message = entry["message"]
        if message in WORDS_OF_A_ROLE:
            self.role = message
        if message == LEADING:
            self.epochs.append(entry["epoch"])
        self.said.append(f"{message} {entry.get('reason', '')}".strip())


class Relays:
    """`command` starts one, as `python -m <command>`."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        self._command = tuple(command)
        self._environment = environment
        self._folder = folder
        self._living: list[Relay] = []
        self._ended: list[Relay] = []
        self.faults: list[str] = []

    def fill_up(self) -> None:
        """Start as many as are missing."""
        while len(self._living) < RELAYS_COUNT:
            number = len(self._living) + len(self._ended) + 1
            log = self._folder / f"relay-{number:04}.log"
            self._living.append(Relay(OurProcess(self._command, self._environment, log)))

    def leader(self) -> Relay:
        """The one that leads, or will in a moment."""
        wait_until(
            lambda: any(self._leading()),
            f"a relay leads; {self.roles()}",
            deadline_seconds=DEADLINE_SECONDS,
        )
        return next(self._leading())

    def standby(self) -> Relay:
        leader = self.leader()
        return next(relay for relay in self._living if relay is not leader)

    def kill(self, relay: Relay) -> None:
        relay.process.kill()
        self._bury(relay)

    def kill_all(self) -> None:
        for relay in list(self._living):
            self.kill(relay)

    def stop(self, relay: Relay) -> None:
        relay.process.signal(signal.SIGTERM)
        code = relay.process.wait_exit(EXIT_DEADLINE_SECONDS)
        if code != 0:
            self.faults.append(f"a relay that was sent SIGTERM exited with {code}")
        self._bury(relay)

    def stop_all(self) -> None:
        for relay in list(self._living):
            self.stop(relay)

    def freeze(self, *relays: Relay) -> None:
        for relay in relays:
            relay.process.signal(signal.SIGSTOP)
            relay.frozen = True

    def freeze_all(self) -> None:
        self.freeze(*self._living)

    def thaw(self) -> None:
        for relay in self._living:
            relay.process.signal(signal.SIGCONT)
            relay.frozen = False

    def wait_one_leads(self) -> None:
        """One leads and the others stand by."""

        def settled() -> bool:
            roles = sorted(relay.role for relay in self._listen())
            return roles == [LEADING, *[STANDING_BY] * (RELAYS_COUNT - 1)]

        try:
            wait_until(settled, "one leads", deadline_seconds=DEADLINE_SECONDS)
        except AssertionError:
            self.faults.append(f"after {DEADLINE_SECONDS:g} s not one leader: {self.roles()}")

    def roles(self) -> list[str]:
        return [relay.role or "silent" for relay in self._listen()]

    def epochs(self) -> list[int]:
        """All epochs that were ever led."""
        return [epoch for relay in self._everybody() for epoch in relay.epochs]

    def count_said(self, words: str) -> int:
        return sum(line.startswith(words) for relay in self._everybody() for line in relay.said)

    def check(self) -> list[str]:
        """What went wrong with the processes themselves; each fault is returned once."""
        faults, self.faults = self.faults, []
        for relay in list(self._living):
            if not relay.process.running:
                code = relay.process.exit_code
                last = relay.process.last_lines(3)
                faults.append(f"a relay ended by itself with {code}: {last}")
                self._bury(relay)
        epochs = self.epochs()
        if len(set(epochs)) < len(epochs):
            faults.append(f"an epoch was led twice: {sorted(epochs)}")
        return faults

    def end(self) -> None:
        for relay in self._living:
            relay.process.end()

    def _bury(self, relay: Relay) -> None:
        relay.listen()
        self._living.remove(relay)
        self._ended.append(relay)

    def _listen(self) -> list[Relay]:
        for relay in self._living:
            relay.listen()
        return self._living

    def _leading(self) -> Iterator[Relay]:
        return (relay for relay in self._listen() if relay.role == LEADING and not relay.frozen)

    def _everybody(self) -> list[Relay]:
        return [*self._ended, *self._listen()]
