"""
RabbitMQ: users, permissions, exchanges, queues and bindings.

Users and permissions go through the management API, the only way that RabbitMQ offers from another
machine; exchanges, queues and bindings are declared over AMQP by the code that the consumers use.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from time import monotonic
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

import httpx

from consumers.topology import DEAD_LETTERS_QUEUE, declare_deliveries, deliveries_queue
from installation.settings import BrokerSettings
from installation.users import Permissions, rabbitmq_permissions
from runtime.rabbit import AmqpChannel, BrokerGone, BrokerRefused, connect
from runtime.retry import growing_delays
from runtime.settings import split_amqp_urls

#: The oldest line that the tests run on.
OLDEST_SERVER = (3, 10)

#: How long the broker may take to answer.
PATIENCE_SECONDS = 120.0
ANSWER_SECONDS = 30.0


async def install(settings: BrokerSettings, passwords: Mapping[str, str]) -> list[str]:
    """
    Make the broker what the processes need; what is there now, one line a thing.

    passwords: of each user of `permissions_of`. Raises BrokerError.
    """
    permissions, virtual_host = permissions_of(settings), virtual_host_of(settings)
    async with _management(settings) as api:
        await _wait_until_it_answers(api)
        path = quote(virtual_host, safe="")
        if (await _request(api, "GET", f"vhosts/{path}", allowed=(404,))) is None:
            await _request(api, "PUT", f"vhosts/{path}", {})
        for user, permission in permissions.items():
            # a password that is put again ends no connection
            await _request(api, "PUT", f"users/{user}", {"password": passwords[user], "tags": ""})
            await _request(api, "PUT", f"permissions/{path}/{user}", asdict(permission))
    async with _channel(settings) as channel:
        for destination in settings.destinations:
            await declare_deliveries(
                channel,
                destination,
                events_exchange=settings.events_exchange,
                delivery_limit=settings.delivery_limit,
            )
    queues = [DEAD_LETTERS_QUEUE, *map(deliveries_queue, settings.destinations)]
    return [f"users {', '.join(permissions)}", f"queues {', '.join(queues)}"]


async def differences(settings: BrokerSettings, passwords: Mapping[str, str]) -> list[str]:
    """What differs from what `install` makes, one line a thing. Raises BrokerError."""
    found = []
    path = quote(virtual_host_of(settings), safe="")
    async with _management(settings) as api:
        await _wait_until_it_answers(api)
        for user, permission in permissions_of(settings).items():
            granted = await _request(api, "GET", f"permissions/{path}/{user}", allowed=(404,))
            if granted is None or _permissions(granted) != permission:
                found.append(f"RabbitMQ: user {user} has other permissions, or is missing")
        queues = [DEAD_LETTERS_QUEUE, *map(deliveries_queue, settings.destinations)]
        found += [
            f"RabbitMQ: queue {queue} is missing"
            for queue in queues
            if await _request(api, "GET", f"queues/{path}/{queue}", allowed=(404,)) is None
        ]
    for user, password in passwords.items():
        url = _first_url(settings)
        address = url.netloc.rpartition("@")[2]
        as_user = url._replace(netloc=f"{user}:{quote(password, safe='')}@{address}")
        try:
            connection = await connect(as_user.geturl(), name="installation", heartbeat_seconds=10)
        except BrokerRefused:
            found.append(f"RabbitMQ: user {user} is refused with its password")
        else:
            await connection.close()
    return found


def permissions_of(settings: BrokerSettings) -> dict[str, Permissions]:
    return rabbitmq_permissions(settings.destinations, events_exchange=settings.events_exchange)


def virtual_host_of(settings: BrokerSettings) -> str:
    return unquote(_first_url(settings).path.removeprefix("/")) or "/"


def _first_url(settings: BrokerSettings) -> SplitResult:
    """Of several nodes of one cluster."""
    return urlsplit(split_amqp_urls(settings.rabbitmq_url.get_secret_value())[0])


def _permissions(answer: Any) -> Permissions:
    return Permissions(answer["configure"], answer["write"], answer["read"])


@asynccontextmanager
async def _management(settings: BrokerSettings) -> AsyncIterator[httpx.AsyncClient]:
    url = urlsplit(settings.rabbitmq_management_url.get_secret_value())
    address = url.netloc.rpartition("@")[2]
    async with httpx.AsyncClient(
        base_url=f"{url.scheme}://{address}{url.path.rstrip('/')}/api/",
        auth=(unquote(url.username or ""), unquote(url.password or "")),
        timeout=ANSWER_SECONDS,
        trust_env=False,
    ) as client:
        yield client


async def _wait_until_it_answers(api: httpx.AsyncClient) -> None:
    """Raises BrokerGone once the patience is over, and BrokerRefused for a server too old."""
    delays, give_up_at = growing_delays(), monotonic() + PATIENCE_SECONDS
    while True:
        try:
            overview: Any = await _request(api, "GET", "overview")
        except BrokerGone:
            if monotonic() > give_up_at:
                raise
            await asyncio.sleep(next(delays))
        else:
            break
    version = str(overview["rabbitmq_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SERVER:
        oldest = ".".join(map(str, OLDEST_SERVER))
        raise BrokerRefused(f"RabbitMQ is {version}; {oldest} or newer is needed")


async def _request(
    api: httpx.AsyncClient,
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    allowed: tuple[int, ...] = (),
) -> Any:
    """The answer's body; None where its status is one of `allowed`, or where it has none."""
    try:
        answer = await api.request(method, path, json=body)
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise BrokerGone(
            f"the management API at {api.base_url} does not answer: {reason}"
        ) from error
    if answer.status_code in allowed:
        return None
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise BrokerRefused(
            "RabbitMQ refuses the user or password in RABBITMQ_MANAGEMENT_URL: correct them, or "
            "give the user the tag `administrator`"
        )
    if answer.is_server_error:
        raise BrokerGone(f"the management API answers {answer.status_code} to {method} {path}")
    if not answer.is_success:
        raise BrokerRefused(f"RabbitMQ refuses {method} {path}: {answer.status_code} {answer.text}")
    return answer.json() if answer.content else None


@asynccontextmanager
async def _channel(settings: BrokerSettings) -> AsyncIterator[AmqpChannel]:
    connection = await connect(
        settings.rabbitmq_url.get_secret_value(),
        name="installation",
        heartbeat_seconds=settings.rabbitmq_heartbeat_seconds,
    )
    try:
        yield await connection.open_channel()
    finally:
        await connection.close()
