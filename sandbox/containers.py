"""The two servers as containers, on a machine with a Docker engine that already has the images."""

import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker  # type: ignore[import-untyped]
from docker.errors import DockerException  # type: ignore[import-untyped]
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

from sandbox.mongodb import READY_SECONDS, REPLICA_SET, MongoServer, initiate, wait_for_primary
from sandbox.ports import LOOPBACK, free_ports, port_answers
from sandbox.rabbitmq import MANAGEMENT_PORT, USER, RabbitServer
from sandbox.secret_files import remembered
from sandbox.server_process import Deadline, leash, let_go

MONGO_IMAGES = ("mongo:8", "mongo:7")
RABBIT_IMAGES = ("rabbitmq:4-management",)
AMQP_PORT = 5672

REMOVE = """
import sys, docker
docker.from_env().containers.get(sys.argv[1]).remove(force=True, v=True)
"""


def image_at_hand(names: Sequence[str]) -> str | None:
    """Find the first of some images that a running Docker engine has; nothing is ever pulled."""
    try:
        client = docker.from_env(timeout=5)
    except DockerException:
        return None
    try:
        at_hand = {tag for image in client.images.list() for tag in image.tags}
    except DockerException:
        return None
    finally:
        client.close()
    return next((name for name in names if name in at_hand), None)


class HeldContainer:
    """A container that is removed, with its data, when this process ends, however it ends.

    testcontainers has a container of its own for that duty; its image may not be at hand, and it
    listens on every address.
    """

    def __init__(self, image: str, ports: dict[int, int]) -> None:
        testcontainers_config.ryuk_disabled = True
        self.definition = DockerContainer(image)
        # with_bind_ports cannot say which address of the host
        published: Any = self.definition.ports
        for inside, outside in ports.items():
            published[f"{inside}/tcp"] = (LOOPBACK, outside)
        self._container: Any = None

    def start(self) -> None:
        if self._container is None:
            self._container = self.definition.start().get_wrapped_container()
            self._leash = leash(sys.executable, "-c", REMOVE, str(self._container.id))
        else:
            self._container.start()

    def stop(self) -> None:
        if self._container is not None:
            self._container.stop()

    def kill(self) -> None:
        self._container.kill()

    def discard(self) -> None:
        if self._container is not None:
            self._container.remove(force=True, v=True)
            let_go(self._leash)
            self._container = None

    def pause(self) -> None:
        self._container.pause()

    def resume(self) -> None:
        self._container.unpause()


@dataclass
class ContainerMongo(MongoServer):
    """A one-node replica set in a container; without users, as only loopback reaches it."""

    image: str
    folder: Path
    extra_arguments: Sequence[str] = ()
    container: HeldContainer = field(init=False)

    def __post_init__(self) -> None:
        kept = remembered(self.folder / "settings.json", lambda: {"ports": free_ports(1)})
        self.port: int = kept["ports"][0]
        self.url = f"mongodb://{LOOPBACK}:{self.port}/?replicaSet={REPLICA_SET}"
        # The same port inside as outside: the member's address must be true on both sides.
        self.container = HeldContainer(self.image, {self.port: self.port})
        self.container.definition.with_command(
            [
                *("mongod", "--bind_ip_all", "--port", str(self.port), "--replSet", REPLICA_SET),
                *("--setParameter", "enableTestCommands=1"),
                *self.extra_arguments,
            ]
        )

    def launch(self) -> None:
        self.container.start()

    def wait_ready(self) -> None:
        deadline = Deadline.after(READY_SECONDS, f"MongoDB in {self.image}")
        while not port_answers(self.port):
            deadline.rest(f"port {self.port} does not answer")
        initiate([self.port])
        wait_for_primary(self.url, deadline)

    def stop(self) -> None:
        self.container.stop()

    def kill(self) -> None:
        self.container.kill()

    def discard(self) -> None:
        self.container.discard()

    def pause(self) -> None:
        self.container.pause()

    def resume(self) -> None:
        self.container.resume()


@dataclass
class ContainerRabbit(RabbitServer):
    image: str
    folder: Path
    container: HeldContainer = field(init=False)

    def __post_init__(self) -> None:
        kept = remembered(
            self.folder / "settings.json",
            lambda: {"ports": free_ports(2), "password": secrets.token_urlsafe(24)},
        )
        self.amqp_port, management_port = kept["ports"]
        self.url = f"amqp://{USER}:{kept['password']}@{LOOPBACK}:{self.amqp_port}/"
        self.management_url = f"http://{LOOPBACK}:{management_port}"
        ports = {AMQP_PORT: self.amqp_port, MANAGEMENT_PORT: management_port}
        self.container = HeldContainer(self.image, ports)
        self.container.definition.with_envs(
            RABBITMQ_DEFAULT_USER=USER, RABBITMQ_DEFAULT_PASS=kept["password"]
        )

    def launch(self) -> None:
        self.container.start()

    def wait_ready(self) -> None:
        deadline = Deadline.after(READY_SECONDS, f"RabbitMQ in {self.image}")
        while not (port_answers(self.amqp_port) and self.management_answers()):
            deadline.rest("the management API does not answer")

    def stop(self) -> None:
        self.container.stop()

    def kill(self) -> None:
        self.container.kill()

    def discard(self) -> None:
        self.container.discard()
