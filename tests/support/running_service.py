"""The API as a real process, and MongoDB beside it: what the service's tests share."""

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import httpx
from pymongo import MongoClient

from assistance.collection import ASSISTANCES
from outbox.collection import OUTBOX
from sandbox.ports import free_ports
from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.processes import OurProcess

PATH = "/api/assistances"

#: What a client of the first service sent.
OLD_BODY = {"topic": "sales", "description": "I would like to know more about the prices"}

Document = dict[str, Any]


def service_environment(mongodb_url: str, database_name: str, **settings: object) -> dict[str, str]:
    names = {
        "mongodb_url": mongodb_url,
        "mongodb_database": database_name,
        "api_keys": f"{secrets.token_hex(16)},{secrets.token_hex(16)}",
        "api_port": free_ports(1)[0],
        "log_format": "json",
        "log_level": "debug",
        **settings,
    }
    return {name.upper(): str(value) for name, value in names.items()}


class RunningService:
    """`http` sends a good key along with every call."""

    def __init__(self, process: OurProcess, environment: Mapping[str, str]) -> None:
        self.process = process
        self.keys = environment["API_KEYS"].split(",")
        self.url = f"http://127.0.0.1:{environment['API_PORT']}"
        self.http = self.client({"X-API-KEY": self.keys[0]})

    def client(self, headers: Mapping[str, str]) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=headers, timeout=15, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def post(self, body: object = OLD_BODY) -> httpx.Response:
        return self.http.post(PATH, json=body)

    def accept(self, body: object = OLD_BODY) -> str:
        answer = self.post(body)
        assert answer.status_code == 202, answer.text
        request_id: str = answer.json()["id"]
        return request_id

    def wait_alive(self) -> None:
        wait_until(lambda: self._answers("/livez", 200), "the API listens", deadline_seconds=20)

    def wait_ready(self, deadline_seconds: float = 20) -> None:
        what = "the API is ready"
        wait_until(lambda: self._answers("/readyz", 200), what, deadline_seconds=deadline_seconds)

    def _answers(self, path: str, status: int) -> bool:
        assert self.process.running, self.process.last_lines()
        try:
            return self.http.get(path).status_code == status
        except httpx.TransportError:
            return False

    def log(self) -> list[Document]:
        """Every whole line it has logged so far."""
        whole, _, _ = self.process.output().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def calls_logged(self, **fields: object) -> list[Document]:
        return [
            line
            for line in self.log()
            if "route" in line and all(line.get(name) == value for name, value in fields.items())
        ]


def start_service(
    run_process: RunProcess, mongodb_url: str, database_name: str, **settings: object
) -> RunningService:
    environment = service_environment(mongodb_url, database_name, **settings)
    return RunningService(run_process("service", "run", environment=environment), environment)


class Written:
    """What MongoDB holds, asked with a driver of our own, whether or not a majority has it."""

    def __init__(self, mongodb_url: str, database_name: str) -> None:
        self.client = MongoClient[Document](mongodb_url, tz_aware=True, w="majority")
        self.database = self.client[database_name]

    def requests(self) -> list[Document]:
        return list(self.database[ASSISTANCES].find())

    def events(self, request_id: str | None = None) -> list[Document]:
        query = {} if request_id is None else {"key": request_id}
        return list(self.database[OUTBOX].find(query).sort([("key", 1), ("seq", 1)]))

    @contextmanager
    def failing(self, *commands: str, mode: object = "alwaysOn", **how: object) -> Iterator[None]:
        """
        These commands of the service fail; everybody else's go on.

        https://github.com/mongodb/mongo/wiki/The-%22failCommand%22-fail-point
        """
        with self._fail_point(
            "failCommand", mode, failCommands=list(commands), appName="service", **how
        ):
            yield

    @contextmanager
    def hanging(self, where: str) -> Iterator["Hanging"]:
        """Every operation that reaches this place in the server hangs there."""
        with self._fail_point(where, "alwaysOn") as entered_before:
            yield Hanging(self.client, where, entered_before)

    @contextmanager
    def _fail_point(self, name: str, mode: object, **data: object) -> Iterator[int]:
        on = {"configureFailPoint": name, "mode": mode, "data": data}
        entered_before: int = self.client.admin.command(on)["count"]
        try:
            yield entered_before
        finally:
            switch_off(self.client, name)
            # a transaction whose commit never arrived would hold its locks for a minute
            self.client.admin.command({"killAllSessions": []})


@dataclass(frozen=True, slots=True)
class Hanging:
    client: MongoClient[Document]
    where: str
    entered_before: int

    def wait_entered(self) -> None:
        """Return once an operation has reached the place."""
        self.client.admin.command(
            {
                "waitForFailPoint": self.where,
                "timesEntered": self.entered_before + 1,
                "maxTimeMS": 10_000,
            }
        )

    def let_go(self) -> None:
        switch_off(self.client, self.where)


def switch_off(client: MongoClient[Document], fail_point: str) -> None:
    client.admin.command({"configureFailPoint": fail_point, "mode": "off"})
