"""A read of the change stream is given up when its connection is silent, and only then."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from urllib.parse import urlsplit

import pytest
from bson import Timestamp

from relay.checkpoint import Position
from relay.stream import OutboxStream
from runtime import stream_client
from runtime.shutdown import Stop
from runtime.stream_client import READ_SECONDS, StreamClient
from tests.support.links import Link, Mode
from tests.support.outbox_world import OutboxWorld


@contextmanager
def slow(world: OutboxWorld, command: str, milliseconds: int) -> Iterator[None]:
    """The server takes this long to answer the command, as when it scans much of the oplog."""
    data = {
        "failCommands": [command],
        "blockConnection": True,
        "blockTimeMS": milliseconds,
        "appName": "scanning",
    }
    admin = world.client.admin
    admin.command({"configureFailPoint": "failCommand", "mode": "alwaysOn", "data": data})
    try:
        yield
    finally:
        admin.command({"configureFailPoint": "failCommand", "mode": "off"})


def now(world: OutboxWorld) -> Timestamp:
    moment: Timestamp = world.client.admin.command("hello")["operationTime"]
    return moment


@pytest.mark.parametrize("command", ["aggregate", "getMore"])
async def test_a_server_that_scans_for_longer_than_the_deadline_is_waited_for(
    world: OutboxWorld, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(stream_client, "READ_SECONDS", 0.7)
    client = StreamClient(world.mongodb_url, world.database_name, process="scanning")
    stream = OutboxStream(client, "outbox", Position(None, now(world)))
    try:
        [expected] = world.append()
        with slow(world, command, 1000):
            found: list[str] = []
            while not found:
                found = [change.document["_id"] for change in (await stream.read(Stop())).changes]
        assert found == [expected]
        while client.is_extended:
            assert not (await stream.read(Stop())).changes
        [later] = world.append()
        [change] = (await stream.read(Stop())).changes
        assert change.document["_id"] == later
    finally:
        await stream.close()


async def test_a_silent_connection_is_given_up_and_nothing_is_lost_or_repeated(
    world: OutboxWorld,
) -> None:
    address = urlsplit(world.mongodb_url)
    with Link("127.0.0.1", address.port or 0) as link:
        url = link.url(world.mongodb_url, directConnection="true")
        client = StreamClient(url, world.database_name, process="silent")
        stream = OutboxStream(client, "outbox", Position(None, now(world)))
        try:
            first = world.append(3)
            found: list[str] = []
            while len(found) < len(first):
                found += [change.document["_id"] for change in (await stream.read(Stop())).changes]
            link.switch(Mode.SILENT, carrying=b"$changeStream")
            later = world.append(3)
            began_at = monotonic()
            while len(found) < len(first + later):
                found += [change.document["_id"] for change in (await stream.read(Stop())).changes]
            assert monotonic() - began_at < READ_SECONDS + 3
            assert found == first + later
        finally:
            await stream.close()
