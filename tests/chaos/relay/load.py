"""Writers that commit, conflict and give up, until the round is over."""

import itertools
import random
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

from pymongo.errors import PyMongoError

from tests.chaos.common.load import running
from tests.chaos.relay.plan import Round
from tests.support.outbox_world import OutboxWorld

WRITERS_COUNT = 4
ENTITIES = "entities"
BURST_KEYS_COUNT = 150
PAUSE_SECONDS = 0.005
ERROR_PAUSE_SECONDS = 0.1


class GivenUp(Exception):
    """This transaction is aborted on purpose: its events must never be seen."""


def id_prefix(number: int) -> str:
    return f"{number:05}-"


@contextmanager
def load(world: OutboxWorld, round_: Round) -> Iterator[None]:
    """
    Transactions on keys of each writer's own and on shared ones, and one burst.

    The results of commits are ignored: the outbox shows afterwards what was committed.
    """
    over = threading.Event()

    def write(number: int) -> None:
        draw = random.Random(f"{round_.number}/writer/{number}")
        for turn in itertools.count():
            if over.is_set():
                return
            keys = [f"own-{number}-{turn % 3}", f"shared-{draw.randrange(5)}"]
            try:
                _change(world, round_.number, keys[: draw.randint(1, 2)], abort=turn % 6 == 0)
            except (PyMongoError, GivenUp):
                over.wait(ERROR_PAUSE_SECONDS)
            over.wait(PAUSE_SECONDS)

    def burst() -> None:
        documents = [
            _event(round_.number, f"burst-{round_.number}-{n % BURST_KEYS_COUNT}", n)
            for n in range(1, round_.burst_count + 1)
        ]
        with suppress(PyMongoError):
            world.outbox.insert_many(documents)

    with running([*(partial(write, number) for number in range(WRITERS_COUNT)), burst], over):
        yield


def _change(world: OutboxWorld, number: int, keys: list[str], *, abort: bool) -> None:
    with world.client.start_session() as session, session.start_transaction():
        for key in keys:
            entity: Any = world.database[ENTITIES].find_one_and_update(
                {"_id": key},
                {"$inc": {"version": 1}},
                upsert=True,
                return_document=True,
                session=session,
            )
            world.outbox.insert_one(_event(number, key, entity["version"]), session=session)
        if abort:
            raise GivenUp


def _event(number: int, key: str, seq: int) -> dict[str, Any]:
    return {
        "_id": f"{id_prefix(number)}{uuid.uuid4()}",
        "type": "tested",
        "key": key,
        "seq": seq,
        "routing_key": "r.a",
        "payload": "x" * 300,
        "created_at": datetime.now(UTC),
    }
