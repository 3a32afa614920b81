"""The users of both servers, and what each may do."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from consumers.topology import DEAD_LETTERS_EXCHANGE, DEAD_LETTERS_QUEUE, deliveries_queue

#: The administrator of each server; only the installation step and people use them.
MONGODB_ADMINISTRATOR = "root"
RABBITMQ_ADMINISTRATOR = "operator"

NOTHING = "^$"


@cache
def mongodb_roles() -> Mapping[str, list[dict[str, Any]]]:
    """The grants of each role, by its name, which is the user's name too: see roles.json."""
    roles: dict[str, list[dict[str, Any]]] = json.loads(
        files("installation").joinpath("roles.json").read_text()
    )
    return roles


def privileges(grants: Iterable[Mapping[str, Any]], database: str) -> list[dict[str, Any]]:
    """As `createRole` takes them; a grant without a database is for the product's own."""
    return [
        {
            "resource": {
                "db": grant.get("database", database),
                "collection": grant["collection"],
            },
            "actions": grant["actions"],
        }
        for grant in grants
    ]


@dataclass(frozen=True, slots=True)
class Permissions:
    """Regular expressions of the broker: names that may be configured, written and read."""

    configure: str
    write: str
    read: str


def worker_user(destination: str) -> str:
    return f"worker-{destination}"


def rabbitmq_permissions(
    destinations: Iterable[str], *, events_exchange: str
) -> dict[str, Permissions]:
    """
    Each user's permissions. A worker reaches the queue of its own destination only.

    Consumers declare what they consume whenever they connect: configuring covers the declaration;
    binding a queue needs write on the queue and read on the exchange; naming a dead-letter
    exchange needs read on the queue and write on that exchange.
    """
    dead_letters = {DEAD_LETTERS_EXCHANGE, DEAD_LETTERS_QUEUE}
    users = {
        "relay": Permissions(r"^relay\.lock\.", _exactly(events_exchange), NOTHING),
        "dead-letters": Permissions(*[_exactly(*dead_letters)] * 3),
    }
    for destination in destinations:
        own = {*dead_letters, deliveries_queue(destination)}
        users[worker_user(destination)] = Permissions(
            configure=_exactly(events_exchange, *own),
            write=_exactly(*own),
            read=_exactly(events_exchange, *own),
        )
    return users


def _exactly(*names: str) -> str:
    """A pattern that matches these names and no other."""
    escaped = "|".join(sorted(name.replace(".", r"\.") for name in set(names)))
    return f"^({escaped})$"
