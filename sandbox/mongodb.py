"""MongoDB for development and tests: a replica set of our own, or one that was given."""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from sandbox.errors import NotOursError, ServerFailedError
from sandbox.ports import LOOPBACK, free_ports, port_answers, port_is_free
from sandbox.secret_files import remembered, write_secret
from sandbox.server_process import Deadline, ServerProcess

READY_SECONDS = 60
REPLICA_SET = "rs0"
USER = "sandbox"
ALREADY_INITIALIZED = 23
USER_EXISTS = 51003
# One node elects itself at once. Three wait this long for a primary that does not answer.
ELECTION_TIMEOUT_MS = 2000


@dataclass
class MongoServer(ABC):
    """A replica set. `url` names its user and password where it has them, and no database."""

    url: str = field(init=False, repr=False)

    @abstractmethod
    def launch(self) -> None:
        """Start it and return at once."""

    @abstractmethod
    def wait_ready(self) -> None:
        """Return when it has a primary; raises ServerFailedError with its last words."""

    def start(self) -> None:
        self.launch()
        self.wait_ready()

    def restart(self) -> None:
        self.stop()
        self.start()

    @abstractmethod
    def stop(self) -> None:
        """End it in good order; data and ports are kept for the next start."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL."""

    @abstractmethod
    def discard(self) -> None:
        """End it at once; what it holds is not wanted any more."""

    @abstractmethod
    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers."""

    @abstractmethod
    def resume(self) -> None: ...


@dataclass
class LocalMongo(MongoServer):
    """mongod as child processes: a replica set of one node, or of several.

    `nodes` may be hurt one by one. `extra_arguments` go to each mongod, such as `--oplogSize 8`.
    """

    binary: Path
    folder: Path
    node_count: int = 1
    extra_arguments: Sequence[str] = ()
    nodes: list[ServerProcess] = field(init=False)

    def __post_init__(self) -> None:
        kept = remembered(
            self.folder / "settings.json",
            lambda: {
                "ports": free_ports(self.node_count),
                "password": secrets.token_urlsafe(24),
                "key": secrets.token_hex(64),
            },
        )
        self.ports: list[int] = kept["ports"]
        self.password: str = kept["password"]
        self._key_file = self.folder / "replica-set-key"
        write_secret(self._key_file, kept["key"])
        self.url = f"mongodb://{USER}:{self.password}@{hosts(self.ports)}/?replicaSet={REPLICA_SET}"
        self.nodes = [self._node(number, port) for number, port in enumerate(self.ports)]

    def _node(self, number: int, port: int) -> ServerProcess:
        data = self.folder / f"data-{number}"
        data.mkdir(parents=True, exist_ok=True)
        options = [
            *("--dbpath", str(data)),
            *("--port", str(port)),
            *("--bind_ip", LOOPBACK),
            "--nounixsocket",
            *("--replSet", REPLICA_SET),
            # A user and a key cost 50 ms at the first start, and the code under test meets a
            # server that asks who it is, as in production.
            *("--keyFile", str(self._key_file)),
            *("--wiredTigerCacheSizeGB", "0.25"),
            *("--setParameter", "enableTestCommands=1"),
            *("--setParameter", "diagnosticDataCollectionEnabled=false"),
            # A lone primary would wait 15 s for a successor before it obeys SIGTERM.
            *("--setParameter", "shutdownTimeoutMillisForSignaledShutdown=100"),
            # As in compose.yml: what a killed process was writing is locked no longer than this.
            *("--setParameter", "transactionLifetimeLimitSeconds=15"),
            *self.extra_arguments,
        ]
        return ServerProcess(
            f"mongod on port {port}",
            [str(self.binary), *options],
            self.folder / f"mongod-{number}.log",
        )

    def launch(self) -> None:
        for node, port in zip(self.nodes, self.ports, strict=True):
            if not node.running and not port_is_free(port):
                raise ServerFailedError(
                    f"Port {port} of the local MongoDB is taken: end what listens there (another"
                    f" run on the same folder?), or remove {self.folder} to start afresh."
                )
            node.launch()

    def wait_ready(self) -> None:
        deadline = Deadline.after(READY_SECONDS, "MongoDB")
        for node, port in zip(self.nodes, self.ports, strict=True):
            while not port_answers(port):
                deadline.rest(f"port {port} does not answer", node)
        founded = self.folder / "founded"
        if not founded.exists():
            initiate(self.ports)
            make_user(self.ports, self.password)
            founded.touch()
        wait_for_primary(self.url, deadline, *self.nodes)

    def stop(self) -> None:
        for node in self.nodes:
            node.resume()
            node.stop()

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()

    discard = kill

    def pause(self) -> None:
        for node in self.nodes:
            node.pause()

    def resume(self) -> None:
        for node in self.nodes:
            node.resume()


@dataclass
class GivenMongo(MongoServer):
    """An external replica set, given by a URL: used, never started, stopped or damaged."""

    given_url: str = field(repr=False)

    def __post_init__(self) -> None:
        self.url = self.given_url

    def launch(self) -> None:
        """Nothing to start."""

    def wait_ready(self) -> None:
        try:
            with connect(self.url) as replica_set:
                replica_set.admin.command("ping")
        except PyMongoError as error:
            raise ServerFailedError(f"MONGODB_URL leads to no replica set: {error}") from None

    def stop(self) -> None:
        """Not ours to stop."""

    discard = stop

    def kill(self) -> None:
        raise NotOursError("MONGODB_URL")

    pause = resume = kill


def initiate(ports: Sequence[int]) -> None:
    """Make the mongods that listen on `ports` one replica set; does nothing where it is one."""
    config = {
        "_id": REPLICA_SET,
        "members": [
            {"_id": number, "host": f"{LOOPBACK}:{port}"} for number, port in enumerate(ports)
        ],
        "settings": {"electionTimeoutMillis": ELECTION_TIMEOUT_MS},
    }
    with connect(f"mongodb://{LOOPBACK}:{ports[0]}/?directConnection=true") as node:
        try:
            node.admin.command("replSetInitiate", config)
        except OperationFailure as refused:
            if refused.code != ALREADY_INITIALIZED:
                raise


def make_user(ports: Sequence[int], password: str) -> None:
    """Make the first user, which the localhost exception allows."""
    with connect(f"mongodb://{hosts(ports)}/?replicaSet={REPLICA_SET}") as replica_set:
        try:
            replica_set.admin.command("createUser", USER, pwd=password, roles=["root"])
        except OperationFailure as refused:
            if refused.code != USER_EXISTS:
                raise


def wait_for_primary(url: str, deadline: Deadline, *nodes: ServerProcess) -> None:
    with connect(url) as replica_set:
        while True:
            try:
                replica_set.admin.command("ping")
            except PyMongoError as error:
                deadline.rest(error, *nodes)
            else:
                return


def hosts(ports: Sequence[int]) -> str:
    return ",".join(f"{LOOPBACK}:{port}" for port in ports)


def connect(url: str) -> MongoClient[dict[str, object]]:
    return MongoClient(url, serverSelectionTimeoutMS=READY_SECONDS * 1000)
