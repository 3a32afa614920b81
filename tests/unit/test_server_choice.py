"""How the sandbox chooses servers: a given URL, an installed binary, an image or packages."""

from pathlib import Path

import pytest

from sandbox.errors import NotOursError, ServerMissingError
from sandbox.mongodb import GivenMongo
from sandbox.packages import way_to_root
from sandbox.rabbitmq import GivenRabbit
from sandbox.servers import (
    Given,
    Image,
    Installed,
    Machine,
    Packages,
    choose_mongo,
    choose_rabbit,
    find_mongo,
    find_rabbit,
)

HERE = Path("/somewhere/bin")


def machine(**has: object) -> Machine:
    """A Linux machine with nothing, and what the test gives it."""
    nothing: dict[str, object] = {
        "system": "Linux",
        "processor": "x86_64",
        "mongod": None,
        "mongod_lacks_libraries": False,
        "rabbitmq_server": None,
        "way_to_root": None,
        "image_at_hand": lambda names: None,  # noqa: ARG005
    }
    return Machine(**(nothing | has))  # type: ignore[arg-type]


def test_a_url_in_the_environment_wins_over_everything(tmp_path: Path) -> None:
    given = {"MONGODB_URL": "mongodb://db.example/", "RABBITMQ_URL": "amqp://a:b@mq.example:5672/"}
    rich = machine(mongod=HERE, rabbitmq_server=HERE, way_to_root=[])
    assert choose_mongo(given, rich) == Given("mongodb://db.example/")
    assert choose_rabbit(given, rich) == Given("amqp://a:b@mq.example:5672/")
    assert isinstance(find_mongo(tmp_path, given), GivenMongo)
    rabbit = find_rabbit(tmp_path, given)
    assert isinstance(rabbit, GivenRabbit)
    assert rabbit.management_url == "http://mq.example:15672"


def test_a_given_server_is_not_ours_to_hurt(tmp_path: Path) -> None:
    with pytest.raises(NotOursError, match="RABBITMQ_URL"):
        find_rabbit(tmp_path, {"RABBITMQ_URL": "amqp://a:b@mq.example/"}).kill()


def test_an_installed_binary_wins_over_docker() -> None:
    rich = machine(mongod=HERE, rabbitmq_server=HERE, image_at_hand=lambda names: names[0])
    assert choose_mongo({}, rich) == Installed(HERE)
    assert choose_rabbit({}, rich) == Installed(HERE)


def test_an_image_that_is_named_wins_over_an_installed_binary() -> None:
    rich = machine(mongod=HERE, rabbitmq_server=HERE, image_at_hand=lambda names: names[0])
    named = {"MONGODB_IMAGE": "mongo:8.0", "RABBITMQ_IMAGE": "rabbitmq:4.3-management"}
    assert choose_mongo(named, rich) == Image("mongo:8.0")
    assert choose_rabbit(named, rich) == Image("rabbitmq:4.3-management")


def test_an_image_that_is_named_and_not_at_hand_is_never_replaced_by_another_server() -> None:
    with pytest.raises(ServerMissingError, match="no Docker engine here has the image mongo:8"):
        choose_mongo({"MONGODB_IMAGE": "mongo:8.0"}, machine(mongod=HERE))


def test_docker_wins_over_installing() -> None:
    docker = machine(way_to_root=[], image_at_hand=lambda names: names[0])
    assert choose_mongo({}, docker) == Image("mongo:8")
    assert choose_rabbit({}, docker) == Image("rabbitmq:4-management")


def test_root_and_sudo_install_what_is_missing() -> None:
    assert choose_rabbit({}, machine(way_to_root=[])) == Packages(
        ["rabbitmq-server"], "RabbitMQ is missing.", []
    )
    bare = machine(mongod=HERE, mongod_lacks_libraries=True, way_to_root=["sudo"])
    assert choose_mongo({}, bare) == Packages(
        ("libcurl4", "liblzma5", "libssl3"), "mongod lacks shared libraries.", ["sudo"]
    )


@pytest.mark.parametrize(
    ("user", "apt_get", "sudo", "unattended", "way"),
    [
        (0, True, False, False, []),
        (0, False, True, False, None),
        (1000, True, True, False, ["sudo"]),
        (1000, True, True, True, ["sudo", "-n"]),
        (1000, True, False, False, None),
    ],
)
def test_only_root_and_sudo_may_install(
    user: int, apt_get: bool, sudo: bool, unattended: bool, way: list[str] | None
) -> None:
    found = way_to_root(effective_user_id=user, apt_get=apt_get, sudo=sudo, unattended=unattended)
    assert found == way


@pytest.mark.parametrize(
    ("choose", "lacking", "cure"),
    [
        (choose_rabbit, machine(), "run `make setup` as root, or set RABBITMQ_URL"),
        (choose_rabbit, machine(system="Darwin"), "on Darwin set RABBITMQ_URL"),
        (choose_mongo, machine(), "`make setup` brings one"),
        (choose_mongo, machine(processor="aarch64"), "on Linux aarch64; set MONGODB_URL"),
        (choose_mongo, machine(mongod=HERE, mongod_lacks_libraries=True), "apt-get install libc"),
    ],
)
def test_what_cannot_be_had_is_one_line_with_the_cure(
    choose: object, lacking: Machine, cure: str
) -> None:
    with pytest.raises(ServerMissingError) as missing:
        choose({}, lacking)  # type: ignore[operator]
    message = str(missing.value)
    assert "\n" not in message
    assert cure in message
