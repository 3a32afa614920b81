"""Every process between the outbox and the third parties; the workers are mortal."""

import json
import os
import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sandbox.waiting import wait_until
from tests.chaos.delivery.mortal import ARRIVALS, DEATHS, ORDERS
from tests.chaos.delivery.plan import WORKERS, Order
from tests.chaos.delivery.verdict import Death
from tests.support.processes import OurProcess

DEADLINE_SECONDS = 60.0
COMMAND_SECONDS = 60.0

RELAY, RECONCILER, DEAD_LETTERS = "relay", "reconciler", "dead-letters"

#: What no process may say, whatever is done to it.
ALARMS = (
    "Traceback",
    "message.not_handled",
    "channel.broken",
    "delivery.refused_by_mongodb",
    "message.refused",
)


@dataclass
class MortalWorker:
    destination: str
    folder: Path
    fault: str
    environment: Mapping[str, str]
    process: OurProcess = field(init=False)
    _orders_count: int = 0
    _earlier_deaths_count: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.start()

    def start(self) -> None:
        command = ("tests.chaos.delivery.mortal", str(self.folder), self.fault)
        log = self.folder.with_suffix(".log")
        self.process = OurProcess((*command, "run", self.destination), self.environment, log)

    def order(self, order: Order) -> None:
        self._orders_count += 1
        with (self.folder / ORDERS).open("a") as orders:
            orders.write(f"{json.dumps(asdict(order))}\n")

    @property
    def is_to_die(self) -> bool:
        return len(_lines(self.folder / DEATHS)) < self._orders_count

    def begin_round(self) -> None:
        self._earlier_deaths_count = len(_lines(self.folder / DEATHS))

    def deaths(self) -> list[Death]:
        """Those of this round."""
        recorded = map(json.loads, _lines(self.folder / DEATHS)[self._earlier_deaths_count :])
        return [
            Death(self.destination, one["point"], one["calling"], one["in_hand"])
            for one in recorded
        ]

    def arrivals(self) -> Counter[str]:
        return Counter(_lines(self.folder / ARRIVALS))

    def freeze(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)


class DeliveryProcesses:
    """
    worker_faults: deliberate ones, by worker.
    faults: what went wrong with the processes themselves.
    """

    def __init__(
        self, environment: Mapping[str, str], folder: Path, worker_faults: Mapping[str, str] = {}
    ) -> None:
        self.environment = environment
        self.folder = folder
        self.faults: list[str] = []
        self._read_characters: Counter[str] = Counter()
        self.members = {name: self._begin(name) for name in (RELAY, RECONCILER, DEAD_LETTERS)}
        self.workers = {
            name: MortalWorker(name, folder / name, worker_faults.get(name, "none"), environment)
            for name in WORKERS
        }
        self._wait_receiving()

    def _wait_receiving(self) -> None:
        """A process that was only just started does not know yet how to stop."""
        for worker in self.workers.values():
            worker.process.wait_log("queue.receiving", deadline_seconds=DEADLINE_SECONDS)

    def _begin(self, name: str) -> OurProcess:
        command = (RELAY, "run") if name == RELAY else ("consumers", "run", name)
        return OurProcess(command, self.environment, self.folder / f"{name}.log")

    def run_command(self, *arguments: str) -> OurProcess:
        """`python -m …` to its end."""
        process = OurProcess(arguments, self.environment, self.folder / "commands.log")
        if process.wait_exit(COMMAND_SECONDS) != 0:
            self.faults.append(f"{process.name} failed: {process.last_lines(3)}")
        return process

    def kill(self, name: str) -> None:
        self.members[name].kill()
        self.members[name] = self._begin(name)

    def stop_workers(self) -> None:
        self._stop([worker.process for worker in self.workers.values()])

    def start_workers(self) -> None:
        for worker in self.workers.values():
            worker.start()

    def stop_all(self) -> None:
        self._stop(list(self._by_name().values()))

    def _stop(self, processes: list[OurProcess]) -> None:
        for process in processes:
            process.signal(signal.SIGTERM)
        for process in processes:
            if (code := process.wait_exit(DEADLINE_SECONDS)) != 0:
                self.faults.append(f"{process.name} exits with {code}: {process.last_lines(3)}")

    def wait_all_struck(self) -> None:
        """Until every worker that was ordered to die has died."""
        try:
            wait_until(
                lambda: not any(worker.is_to_die for worker in self.workers.values()),
                "every worker has died where it was ordered to",
                deadline_seconds=DEADLINE_SECONDS,
            )
        except AssertionError as missed:
            self.faults.append(str(missed))

    def begin_round(self) -> None:
        for worker in self.workers.values():
            worker.begin_round()

    def deaths(self) -> list[Death]:
        """Those of this round."""
        return [death for worker in self.workers.values() for death in worker.deaths()]

    def arrivals(self) -> Counter[str]:
        return sum((worker.arrivals() for worker in self.workers.values()), Counter[str]())

    def check(self) -> list[str]:
        """What went wrong with the processes since the last time."""
        faults, self.faults = self.faults, []
        for name, process in self._by_name().items():
            if not process.running:
                code = process.exit_code
                faults.append(f"{name} ended by itself with {code}: {process.last_lines(3)}")
            said = process.output()[self._read_characters[name] :]
            self._read_characters[name] += len(said)
            faults += [
                f"{name} said: {line}"
                for line in said.splitlines()
                if any(alarm in line for alarm in ALARMS)
            ]
        return faults

    def end(self) -> None:
        for process in self._by_name().values():
            process.end()

    def _by_name(self) -> dict[str, OurProcess]:
        return {
            **self.members,
            **{name: worker.process for name, worker in self.workers.items()},
        }


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
