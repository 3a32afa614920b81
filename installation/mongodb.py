"""MongoDB: the replica set, roles, users, collections, indexes and validators."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from pymongo.errors import OperationFailure

from assistance.collection import (
    ASSISTANCES,
    ASSISTANCES_INDEXES,
    ASSISTANCES_VALIDATOR,
    CLOSED_BALANCE,
    DEAD_LETTERS,
    DEAD_LETTERS_INDEXES,
    DESTINATIONS,
    IDEMPOTENCY_KEYS,
    IDEMPOTENCY_KEYS_INDEXES,
)
from installation.settings import DatabaseSettings, ReplicaSetSettings
from installation.users import MONGODB_ADMINISTRATOR, mongodb_roles, privileges
from outbox.collection import INDEXES, OUTBOX
from relay.checkpoint import CHECKPOINTS
from relay.journal import JOURNAL
from runtime import operations
from runtime.mongo import (
    AUTHENTICATION_FAILED,
    UNAUTHORIZED,
    Client,
    Database,
    UnsuitableServer,
    check_server,
    close,
    ensure_collection,
    open_client,
    ping,
    retry_while_unavailable,
)
from runtime.operations import OPERATION_ITEMS, OPERATIONS
from runtime.retry import growing_delays

#: https://www.mongodb.com/docs/manual/reference/error-codes/
ALREADY_INITIALIZED = 23

#: How long the server may take to answer, and then to elect a primary.
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Structure:
    collection: str
    indexes: Sequence[Mapping[str, Any]] = ()
    validator: Mapping[str, Any] | None = None


STRUCTURES = (
    Structure(OUTBOX, INDEXES),
    Structure(ASSISTANCES, ASSISTANCES_INDEXES, ASSISTANCES_VALIDATOR),
    Structure(IDEMPOTENCY_KEYS, IDEMPOTENCY_KEYS_INDEXES),
    Structure(DEAD_LETTERS, DEAD_LETTERS_INDEXES),
    Structure(OPERATIONS, operations.INDEXES),
    Structure(OPERATION_ITEMS, operations.ITEMS_INDEXES),
    Structure(DESTINATIONS),
    Structure(CLOSED_BALANCE),
    Structure(CHECKPOINTS),
    Structure(JOURNAL),
)


async def install(settings: DatabaseSettings, passwords: Mapping[str, str]) -> list[str]:
    """
    Make MongoDB what the processes need; what was done, one line a thing.

    passwords: of each role's user. Raises UnsuitableServer, or PyMongoError.
    """
    url = settings.mongodb_url.get_secret_value()
    done = []
    async with _opened(_without_credentials(url)) as anonymous:
        await _wait_until_it_answers(anonymous)
        if not await _is_known(url):
            await _create_administrator(settings, anonymous, _password_in(url))
            created = f"replica set {settings.mongodb_replica_set}, user {MONGODB_ADMINISTRATOR}"
            done.append(f"{created} (created)")
    async with _opened(url) as client:
        if await _initiate(client, settings):
            done.append(f"replica set {settings.mongodb_replica_set} (created)")
        await _wait_for_primary(client)
        await check_server(client)
        database = client[settings.mongodb_database]
        for structure in STRUCTURES:
            await ensure_collection(
                database,
                structure.collection,
                indexes=structure.indexes,
                validator=structure.validator,
            )
        for role, grants in mongodb_roles().items():
            await _ensure_role(client, role, privileges(grants, settings.mongodb_database))
            await _ensure_user(client, role, passwords[role])
    names = ", ".join(structure.collection for structure in STRUCTURES)
    return [*done, f"users {', '.join(mongodb_roles())}", f"collections {names}"]


async def differences(settings: DatabaseSettings, passwords: Mapping[str, str]) -> list[str]:
    """What differs from what `install` makes, one line a thing. Raises PyMongoError."""
    found = []
    url = settings.mongodb_url.get_secret_value()
    async with _opened(url) as client:
        await check_server(client)
        database = client[settings.mongodb_database]
        for structure in STRUCTURES:
            found += await _differences_of(database, structure)
        for role, grants in mongodb_roles().items():
            granted = await _granted(client, role)
            if granted != _as_set(privileges(grants, settings.mongodb_database)):
                found.append(f"MongoDB: role {role} grants something else, or is missing")
    for user, password in passwords.items():
        if not await _is_known(_with_credentials(url, user, password)):
            found.append(f"MongoDB: user {user} is refused with its password")
    return found


@asynccontextmanager
async def _opened(url: str) -> AsyncIterator[Client]:
    client = open_client(url, process="installation")
    try:
        yield client
    finally:
        await close(client)


async def _wait_until_it_answers(client: Client) -> None:
    await retry_while_unavailable(
        lambda: ping(client),
        try_seconds=None,
        patience_seconds=PATIENCE_SECONDS,
        waits_for_rights=False,
        on_unavailable=lambda _: None,  # a server that is still starting is nothing to log
    )


async def _wait_for_primary(client: Client) -> None:
    delays, give_up_at = growing_delays(), monotonic() + PATIENCE_SECONDS
    while not (await client.admin.command("hello")).get("isWritablePrimary"):
        if monotonic() > give_up_at:
            raise UnsuitableServer(
                f"MongoDB did not become primary within {PATIENCE_SECONDS:g} s: check that the "
                "addresses in MONGODB_MEMBERS lead to its members, or run this on the primary"
            )
        await asyncio.sleep(next(delays))


async def _is_known(url: str) -> bool:
    """Whether the server accepts the user and password in the URL."""
    async with _opened(url) as client:
        try:
            await client.admin.command("connectionStatus")
        except OperationFailure as error:
            if error.code == AUTHENTICATION_FAILED:
                return False
            raise
    return True


async def _create_administrator(
    settings: DatabaseSettings, anonymous: Client, password: str
) -> None:
    """MongoDB allows it without a user only while there is none, and only over loopback."""
    try:
        await _initiate(anonymous, settings)
        await _wait_for_primary(anonymous)
        await anonymous.admin.command(
            "createUser", MONGODB_ADMINISTRATOR, pwd=password, roles=["root"]
        )
    except OperationFailure as error:
        if error.code not in {UNAUTHORIZED, AUTHENTICATION_FAILED}:
            raise
        raise UnsuitableServer(
            f"MongoDB refuses the user {MONGODB_ADMINISTRATOR!r} in MONGODB_URL, and does not let "
            "this step create it: correct the password, or, when there is no user yet, run this "
            "step where it reaches mongod at 127.0.0.1"
        ) from error


async def _initiate(client: Client, settings: ReplicaSetSettings) -> bool:
    """Whether the replica set was initiated now."""
    members = [
        {"_id": number, "host": host} for number, host in enumerate(settings.mongodb_members)
    ]
    hello = await client.admin.command("hello")
    if "setName" in hello:
        return False
    if not hello.get("isreplicaset"):
        raise UnsuitableServer(
            f"MongoDB runs without a replica set: start it with --replSet "
            f"{settings.mongodb_replica_set}"
        )
    try:
        await client.admin.command(
            "replSetInitiate", {"_id": settings.mongodb_replica_set, "members": members}
        )
    except OperationFailure as error:
        if error.code != ALREADY_INITIALIZED:
            raise
        return False
    return True


async def _ensure_role(client: Client, role: str, wanted: list[dict[str, Any]]) -> None:
    granted = await _granted(client, role)
    if granted is None:
        await client.admin.command("createRole", role, privileges=wanted, roles=[])
    elif granted != _as_set(wanted):
        await client.admin.command("updateRole", role, privileges=wanted, roles=[])


async def _granted(client: Client, role: str) -> set[tuple[str, str, frozenset[str]]] | None:
    found = await client.admin.command("rolesInfo", role, showPrivileges=True)
    return _as_set(found["roles"][0]["privileges"]) if found["roles"] else None


def _as_set(granted: Sequence[Mapping[str, Any]]) -> set[tuple[str, str, frozenset[str]]]:
    """In no order: the server keeps none."""
    return {
        (
            privilege["resource"]["db"],
            privilege["resource"]["collection"],
            frozenset(privilege["actions"]),
        )
        for privilege in granted
    }


async def _ensure_user(client: Client, user: str, password: str) -> None:
    found = await client.admin.command("usersInfo", user)
    command = "updateUser" if found["users"] else "createUser"
    await client.admin.command(command, user, pwd=password, roles=[user])


async def _differences_of(database: Database, structure: Structure) -> list[str]:
    name = structure.collection
    found = await database.command({"listCollections": 1, "filter": {"name": name}})
    existing = found["cursor"]["firstBatch"]
    if not existing:
        return [f"MongoDB: collection {name} is missing"]
    differing = []
    if existing[0]["options"].get("validator") != structure.validator:
        differing.append(f"MongoDB: the validator of {name} differs")
    indexes = (await database.command({"listIndexes": name}))["cursor"]["firstBatch"]
    present = {index["name"]: {k: v for k, v in index.items() if k != "v"} for index in indexes}
    for index in structure.indexes:
        if index["name"] not in present:
            differing.append(f"MongoDB: index {index['name']} of {name} is missing")
        elif present[index["name"]] != index:
            differing.append(f"MongoDB: index {index['name']} of {name} differs")
    return differing


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _with_credentials(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    hosts = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{user}:{quote(password, safe='')}@{hosts}").geturl()


def _password_in(url: str) -> str:
    return unquote(urlsplit(url).password or "")
