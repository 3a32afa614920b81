"""Finds and runs the two servers that the sandbox needs: MongoDB and RabbitMQ.

In this order: a URL in the environment, an image that the environment names, an installed binary, a
Docker engine that has the image, the system's package manager. A missing server is reported in one
line with the remedy.
"""

import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sandbox.containers import (
    MONGO_IMAGES,
    RABBIT_IMAGES,
    ContainerMongo,
    ContainerRabbit,
    image_at_hand,
)
from sandbox.errors import ServerMissingError
from sandbox.mongodb import GivenMongo, LocalMongo, MongoServer
from sandbox.packages import install, way_to_root_here
from sandbox.rabbitmq import GivenRabbit, LocalRabbit, RabbitServer

# what the mongod from PyPI links to, and a bare Debian lacks
MONGOD_LIBRARIES = ("libcurl4", "liblzma5", "libssl3")


@dataclass(frozen=True)
class Machine:
    """What a machine has to offer, looked at before anything is decided.

    `way_to_root` is what goes before apt-get (`[]` as root), None where it cannot be used.
    `image_at_hand` answers which of some Docker images is there; asked only when it matters.
    """

    system: str
    processor: str
    mongod: Path | None
    mongod_lacks_libraries: bool
    rabbitmq_server: Path | None
    way_to_root: Sequence[str] | None
    image_at_hand: Callable[[Sequence[str]], str | None]

    @classmethod
    def here(cls) -> "Machine":
        mongod = installed_mongod()
        return cls(
            system=platform.system(),
            processor=platform.machine(),
            mongod=mongod,
            mongod_lacks_libraries=mongod is not None and lacks_libraries(mongod),
            rabbitmq_server=installed_rabbitmq_server(),
            way_to_root=way_to_root_here(),
            image_at_hand=image_at_hand,
        )


@dataclass(frozen=True)
class Given:
    url: str


@dataclass(frozen=True)
class Installed:
    binary: Path


@dataclass(frozen=True)
class Image:
    name: str


@dataclass(frozen=True)
class Packages:
    names: Sequence[str]
    why: str
    way_to_root: Sequence[str]


Source = Given | Installed | Image | Packages


def choose_mongo(environment: Mapping[str, str], machine: Machine) -> Source:
    """Decide where MongoDB comes from; raises ServerMissingError."""
    if url := environment.get("MONGODB_URL"):
        return Given(url)
    if name := environment.get("MONGODB_IMAGE"):
        return named_image(name, "MongoDB", machine)
    if machine.mongod and not machine.mongod_lacks_libraries:
        return Installed(machine.mongod)
    if image := machine.image_at_hand(MONGO_IMAGES):
        return Image(image)
    if machine.mongod and machine.way_to_root is not None:
        return Packages(MONGOD_LIBRARIES, "mongod lacks shared libraries.", machine.way_to_root)
    if machine.mongod:
        raise ServerMissingError(
            f"MongoDB: {machine.mongod} lacks shared libraries; run"
            f" `apt-get install {' '.join(MONGOD_LIBRARIES)}` as root, or set MONGODB_URL."
        )
    if (machine.system, machine.processor) != ("Linux", "x86_64"):
        raise ServerMissingError(
            f"MongoDB: no mongod comes with the environment on {machine.system}"
            f" {machine.processor}; set MONGODB_URL to a replica set, or `docker pull"
            f" {MONGO_IMAGES[0]}` on a running Docker engine."
        )
    raise ServerMissingError(
        "MongoDB: no mongod is installed; `make setup` brings one, or set MONGODB_URL to a replica"
        " set."
    )


def named_image(name: str, server: str, machine: Machine) -> Image:
    """The image that somebody asked for by name; raises ServerMissingError where it is not here."""
    if machine.image_at_hand([name]) is None:
        raise ServerMissingError(
            f"{server}: no Docker engine here has the image {name}; `docker pull {name}`, or build"
            " it with deploy/offline/stand-ins."
        )
    return Image(name)


def choose_rabbit(environment: Mapping[str, str], machine: Machine) -> Source:
    """Decide where RabbitMQ comes from; raises ServerMissingError."""
    if url := environment.get("RABBITMQ_URL"):
        return Given(url)
    if name := environment.get("RABBITMQ_IMAGE"):
        return named_image(name, "RabbitMQ", machine)
    if machine.rabbitmq_server:
        return Installed(machine.rabbitmq_server)
    if image := machine.image_at_hand(RABBIT_IMAGES):
        return Image(image)
    if machine.way_to_root is not None:
        return Packages(["rabbitmq-server"], "RabbitMQ is missing.", machine.way_to_root)
    if machine.system == "Linux":
        raise ServerMissingError(
            "RabbitMQ: not installed, and neither root, sudo nor a Docker engine that has its image"
            " is here; run `make setup` as root, or set RABBITMQ_URL."
        )
    raise ServerMissingError(
        f"RabbitMQ: not installed; on {machine.system} set RABBITMQ_URL, or `docker pull"
        f" {RABBIT_IMAGES[0]}` on a running Docker engine."
    )


def installed_mongod() -> Path | None:
    """Find mongod on PATH, or the one that a development dependency brings (mongod 6.0, SSPL)."""
    if on_path := shutil.which("mongod"):
        return Path(on_path)
    packaged = Path(sysconfig.get_path("purelib"), "fiftyone", "db", "bin", "mongod")
    return packaged if packaged.exists() else None


def installed_rabbitmq_server() -> Path | None:
    """Find the server script that runs as the calling user; /usr/sbin has only Debian's wrapper."""
    scripts = Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server")
    if newest := max(scripts, default=None):
        return newest
    on_path = shutil.which("rabbitmq-server")
    return Path(on_path).resolve() if on_path else None


def lacks_libraries(binary: Path) -> bool:
    """Ask the dynamic linker, which names what it cannot find."""
    linked = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=False)
    return "not found" in linked.stdout


def make_present(environment: Mapping[str, str]) -> None:
    """Install what is missing, all at once and after saying so.

    Raises ServerMissingError and InstallationFailedError.
    """
    machine = Machine.here()
    sources = [choose_mongo(environment, machine), choose_rabbit(environment, machine)]
    if missing := [source for source in sources if isinstance(source, Packages)]:
        names = [name for source in missing for name in source.names]
        install(names, " ".join(source.why for source in missing), missing[0].way_to_root)


def find_mongo(
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    node_count: int = 1,
    extra_arguments: Sequence[str] = (),
) -> MongoServer:
    """Find a MongoDB that is not started yet; its data and secrets live in `folder`."""
    environment = os.environ if environment is None else environment
    match choose_mongo(environment, Machine.here()):
        case Given(url):
            return GivenMongo(url)
        case Installed(binary):
            return LocalMongo(binary, folder / "mongodb", node_count, extra_arguments)
        case Image(name):
            return ContainerMongo(name, folder / "mongodb", extra_arguments)
        case Packages(names, why, way_to_root):
            install(names, why, way_to_root)
            return find_mongo(
                folder, environment, node_count=node_count, extra_arguments=extra_arguments
            )


def find_rabbit(folder: Path, environment: Mapping[str, str] | None = None) -> RabbitServer:
    """Find a RabbitMQ that is not started yet; its data and secrets live in `folder`."""
    environment = os.environ if environment is None else environment
    match choose_rabbit(environment, Machine.here()):
        case Given(url):
            return GivenRabbit(url, environment.get("RABBITMQ_MANAGEMENT_URL"))
        case Installed(binary):
            return LocalRabbit(binary, folder / "rabbitmq")
        case Image(name):
            return ContainerRabbit(name, folder / "rabbitmq")
        case Packages(names, why, way_to_root):
            install(names, why, way_to_root)
            return find_rabbit(folder, environment)


@dataclass(frozen=True)
class Servers:
    mongo: MongoServer
    rabbit: RabbitServer

    def launch(self) -> None:
        self.rabbit.launch()  # the slower one first
        self.mongo.launch()

    def wait_ready(self) -> None:
        self.mongo.wait_ready()
        self.rabbit.wait_ready()

    def stop(self) -> None:
        self.rabbit.stop()
        self.mongo.stop()

    def discard(self) -> None:
        self.rabbit.discard()
        self.mongo.discard()


def find_servers(folder: Path) -> Servers:
    return Servers(find_mongo(folder), find_rabbit(folder))


@contextmanager
def open_servers(folder: Path) -> Iterator[Servers]:
    """Run both servers, started side by side, with data and secrets in `folder`."""
    servers = find_servers(folder)
    try:
        servers.launch()
        servers.wait_ready()
        yield servers
    finally:
        servers.stop()
