"""
Random secrets, made once and kept; each reader gets a folder with what it needs and nothing else.

    <root>/installation/   every password, one file each; read by the installation step only
    <root>/<reader>/       what one server or process reads, such as relay/mongodb-url

A secret that is given (`NAME`, or `NAME_FILE`) replaces the one that is kept.
"""

import base64
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from installation.settings import SecretsSettings, file_of, find_secret, variable_of
from installation.users import (
    MONGODB_ADMINISTRATOR,
    RABBITMQ_ADMINISTRATOR,
    mongodb_roles,
    worker_user,
)

KEPT = "installation"

#: mongod accepts keys of 6 to 1024 base64 characters.
KEY_BYTES = 756


@dataclass(frozen=True, slots=True)
class SecretFile:
    """owner: the number of the only user that may read it."""

    reader: str
    name: str
    content: str
    owner: int


def make_password() -> str:
    # letters and digits only: it becomes part of a URL
    return secrets.token_hex(24)


def make_replica_set_key() -> str:
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def makers(settings: SecretsSettings) -> dict[str, Callable[[], str]]:
    """How each secret is made, by its variable."""
    mongodb = [MONGODB_ADMINISTRATOR, *mongodb_roles()]
    rabbitmq = [RABBITMQ_ADMINISTRATOR, *broker_users(settings)]
    return {
        "MONGODB_REPLICA_SET_KEY": make_replica_set_key,
        "API_KEYS": make_password,
        **{variable_of("mongodb", user): make_password for user in mongodb},
        **{variable_of("rabbitmq", user): make_password for user in rabbitmq},
    }


def broker_users(settings: SecretsSettings) -> list[str]:
    return ["relay", "dead-letters", *map(worker_user, settings.destinations)]


def keep_secrets(settings: SecretsSettings, folder: Path, *, generate: bool) -> dict[str, str]:
    """
    Every secret by its variable: as provided, as kept from before, or made now.

    generate: without it, all of them must be provided.

    Raises OSError and MissingSecrets.
    """
    values: dict[str, str] = {}
    missing: list[str] = []
    for variable, make in makers(settings).items():
        value = find_secret(variable, settings.provided_secrets_folder)
        if value is None and generate:
            kept = folder / file_of(variable)
            value = kept.read_text() if kept.exists() else make()
        if value is None:
            missing.append(variable)
        else:
            values[variable] = value
    if missing:
        raise MissingSecrets(missing)
    return values


class MissingSecrets(Exception):
    """variables: those that were not provided, while none may be generated."""

    def __init__(self, variables: list[str]) -> None:
        super().__init__(", ".join(variables))
        self.variables = variables


def secret_files(settings: SecretsSettings, values: Mapping[str, str]) -> Iterator[SecretFile]:
    process = settings.process_user_id
    for variable, value in values.items():
        yield SecretFile(KEPT, file_of(variable), value, process)
    yield SecretFile(
        "mongodb", "replica-set.key", values["MONGODB_REPLICA_SET_KEY"], settings.mongodb_user_id
    )
    yield SecretFile(
        "rabbitmq",
        "definitions.json",
        first_user(values[variable_of("rabbitmq", RABBITMQ_ADMINISTRATOR)]),
        settings.rabbitmq_user_id,
    )

    def database(reader: str, user: str) -> SecretFile:
        password = values[variable_of("mongodb", user)]
        url = (
            f"mongodb://{user}:{quote(password, safe='')}@{','.join(settings.mongodb_members)}/"
            f"?replicaSet={settings.mongodb_replica_set}"
        )
        return SecretFile(reader, "mongodb-url", url, process)

    def broker(reader: str, user: str) -> SecretFile:
        password = quote(values[variable_of("rabbitmq", user)], safe="")
        url = f"amqp://{user}:{password}@{settings.rabbitmq_address}/"
        return SecretFile(reader, "rabbitmq-url", url, process)

    root = quote(values[variable_of("mongodb", MONGODB_ADMINISTRATOR)], safe="")
    operator = quote(values[variable_of("rabbitmq", RABBITMQ_ADMINISTRATOR)], safe="")
    yield SecretFile(
        KEPT,
        "mongodb-url",
        # the step shares mongod's network: only from there may the first user be created
        f"mongodb://{MONGODB_ADMINISTRATOR}:{root}@127.0.0.1:27017/?directConnection=true",
        process,
    )
    yield SecretFile(
        KEPT,
        "mongodb-network-url",
        f"mongodb://{MONGODB_ADMINISTRATOR}:{root}@{','.join(settings.mongodb_members)}/"
        f"?replicaSet={settings.mongodb_replica_set}",
        process,
    )
    yield broker(KEPT, RABBITMQ_ADMINISTRATOR)
    yield SecretFile(
        KEPT,
        "rabbitmq-management-url",
        f"http://{RABBITMQ_ADMINISTRATOR}:{operator}@{settings.rabbitmq_management_address}",
        process,
    )
    yield database("service", "service")
    yield SecretFile("service", "api-keys", values["API_KEYS"], process)
    yield database("relay", "relay")
    yield broker("relay", "relay")
    yield database("reconciler", "consumers")
    yield database("dead-letters", "consumers")
    yield broker("dead-letters", "dead-letters")
    for destination in settings.destinations:
        yield database(destination, "consumers")
        yield broker(destination, worker_user(destination))


def first_user(password: str) -> str:
    """
    The definitions that the broker loads at boot: its administrator, by hash.

    The hash is salted from the password itself, so that the same password gives the same file:
    https://www.rabbitmq.com/docs/passwords#computing-password-hash
    """
    salt = hashlib.sha256(b"salt" + password.encode()).digest()[:4]
    hashed = base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()
    definitions = {
        "vhosts": [{"name": "/"}],
        "users": [
            {
                "name": RABBITMQ_ADMINISTRATOR,
                "password_hash": hashed,
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": ["administrator"],
            }
        ],
        "permissions": [
            {
                "user": RABBITMQ_ADMINISTRATOR,
                "vhost": "/",
                "configure": ".*",
                "write": ".*",
                "read": ".*",
            }
        ],
    }
    return json.dumps(definitions, indent=2)


def write_secret_file(root: Path, file: SecretFile) -> bool:
    """
    Write the file whole, readable by its owner only; False where it is as it should be.

    Raises OSError. Only root can give a file to another user; without root it stays ours.
    """
    folder = root / file.reader
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file.name
    if path.exists() and path.read_text() == file.content:
        return False
    new = folder / f".{file.name}.new"
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(file.content)
        opened.flush()
        os.fsync(descriptor)
        if os.geteuid() == 0:
            os.fchown(descriptor, file.owner, file.owner)
    new.replace(path)
    return True
