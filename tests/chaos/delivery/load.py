"""Requests as the service writes them, until the round is over."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from assistance.collection import ASSISTANCES
from outbox.collection import OUTBOX
from tests.chaos.common.load import running
from tests.support.deliveries import Deliveries, new_request

WRITERS_COUNT = 2
PAUSE_SECONDS = 0.5
ERROR_PAUSE_SECONDS = 0.2

#: Of each writer in turn: one channel, the other, both.
WAYS = (("slack",), ("email",), ("slack", "email"))


@contextmanager
def load(deliveries: Deliveries, requests_count: int) -> Iterator[None]:
    """
    Accept this many at once, and further ones at a steady pace until the block ends.

    The results of commits are ignored: the ledger shows afterwards what was accepted.
    """
    over = threading.Event()

    def write(number: int) -> None:
        for turn in itertools.count(number):
            if over.is_set():
                return
            try:
                accept(deliveries, WAYS[turn % len(WAYS)])
            except PyMongoError:
                over.wait(ERROR_PAUSE_SECONDS)
            if turn - number >= requests_count // WRITERS_COUNT:
                over.wait(PAUSE_SECONDS)

    with running([partial(write, number) for number in range(WRITERS_COUNT)], over):
        yield


def accept(deliveries: Deliveries, destinations: tuple[str, ...]) -> str:
    """One transaction, as in the service; returns the request's id. Raises PyMongoError."""
    acceptance = new_request("A request under fire", destinations=destinations)
    client: MongoClient[dict[str, object]] = deliveries.client
    with client.start_session() as session, session.start_transaction():
        database = deliveries.database
        database[OUTBOX].insert_many(acceptance.outbox_documents, session=session)
        database[ASSISTANCES].insert_one(dict(acceptance.request), session=session)
    request_id: str = acceptance.request["_id"]
    return request_id


def now() -> datetime:
    return datetime.now(UTC)
