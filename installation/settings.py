"""The settings of the installation step's commands."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, SecretStr

from assistance.routing import RoutingTable
from consumers.settings import TopologySettings
from runtime.settings import MongoSettings, SettingsTable


def _split(text: object) -> object:
    if isinstance(text, str):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


Addresses = Annotated[tuple[str, ...], BeforeValidator(_split), Field(min_length=1)]


class SecretsFolder(SettingsTable):
    secrets_folder: Path | None = Field(
        default=None,
        description="the folder in which `installation secrets` keeps the passwords of all users; "
        "a password that is not set is read from there",
    )


class ReplicaSetSettings(SettingsTable):
    mongodb_members: Addresses = Field(
        default=("mongodb:27017",),
        description="host:port of each member of the replica set, as every client resolves it",
    )
    mongodb_replica_set: str = Field(
        default="rs0", min_length=1, description="the name that mongod's --replSet gives"
    )


class BrokerAddress(SettingsTable):
    rabbitmq_address: str = Field(
        default="rabbitmq:5672", min_length=1, description="host:port of the broker"
    )
    rabbitmq_management_address: str = Field(
        default="rabbitmq:15672",
        min_length=1,
        description="host:port of the broker's management API",
    )


class SecretsSettings(ReplicaSetSettings, BrokerAddress, SettingsTable, RoutingTable):
    """`installation secrets`."""

    provided_secrets_folder: Path | None = Field(
        default=None,
        description="a folder with one file for each secret that is provided, named like the "
        "variable in lower case with hyphens",
    )
    mongodb_user_id: int = Field(
        default=999, ge=0, description="the user of mongod, which reads the replica set's key"
    )
    rabbitmq_user_id: int = Field(
        default=999, ge=0, description="the user of the broker, which reads its first user"
    )
    process_user_id: int = Field(
        default=10001, ge=0, description="the user of the processes, which read their URLs"
    )


class DatabaseSettings(MongoSettings, SecretsFolder, ReplicaSetSettings):
    """`installation mongodb`; MONGODB_URL is the administrator's."""


class BrokerSettings(TopologySettings, SecretsFolder):
    """`installation rabbitmq`; RABBITMQ_URL is the administrator's."""

    rabbitmq_management_url: SecretStr = Field(
        description="the broker's management API: http://operator:password@host:15672"
    )


class CheckSettings(DatabaseSettings, BrokerSettings):
    """`installation check`."""


class MissingPasswords(Exception):
    """names: the variables of the passwords that are neither set nor in the folder."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


def variable_of(server: str, user: str) -> str:
    """`RABBITMQ_WORKER_SLACK_PASSWORD` for the broker's user `worker-slack`."""
    return f"{server}_{user}_password".upper().replace("-", "_")


def file_of(variable: str) -> str:
    """`rabbitmq-worker-slack-password`: a secret's file in the folder."""
    return variable.lower().replace("_", "-")


def find_secret(variable: str, folder: Path | None) -> str | None:
    """A secret from its variable, the file that `<variable>_FILE` names, or the folder."""
    if value := os.environ.get(variable):
        return value
    path = os.environ.get(f"{variable}_FILE")
    if path is None and folder is not None and (folder / file_of(variable)).exists():
        path = str(folder / file_of(variable))
    return Path(path).read_text().strip() or None if path else None


def find_passwords(server: str, users: list[str], folder: Path | None) -> dict[str, str]:
    """Each user's password. Raises OSError, and MissingPasswords, which names all of them."""
    found = {user: find_secret(variable_of(server, user), folder) for user in users}
    if missing := [variable_of(server, user) for user, password in found.items() if not password]:
        raise MissingPasswords(missing)
    return {user: password for user, password in found.items() if password}
