"""
After a known loss on the broker: a new hint for every open delivery, once and at a rate.

The reconciler would find them all in time, but it trusts each hint for up to an hour. Deliveries
that a worker has claimed, that are not due yet, whose newest hint is not published yet, or whose
destination is unavailable are left alone: their hints were not lost.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pymongo.errors import DuplicateKeyError

from assistance.collection import ASSISTANCES
from assistance.delivery import is_open
from assistance.request import Request
from assistance.waiting import Reason, why_not_resent
from consumers.admin.pace import Pace
from consumers.database import server_time
from consumers.delivery.hints import DueDelivery, Hints, Step
from consumers.delivery.updates import NOW
from runtime import clock
from runtime.mongo import Database, retry_while_unavailable
from runtime.operations import OPERATIONS, NothingToDo, Operator, operation
from runtime.shutdown import Stop

RESEND = "resend"

LEASE_MS = 60_000

#: Requests read at once.
PART_COUNT = 100

TICK_SECONDS = 0.05

#: A command ends when its user is refused; a process would wait for the right.
retry = partial(retry_while_unavailable, waits_for_rights=False)

#: Results of an open delivery beside the reasons for which it is left alone.
SENT = "sent"
OVERTAKEN = "changed meanwhile"


@dataclass(frozen=True, slots=True)
class ResendOptions:
    """
    destinations: only these; all if empty.
    unavailable: finds those that are suspended or whose circuit breaker is open.
    """

    destinations: Collection[str]
    rate_per_second: float
    unavailable: Callable[[], Awaitable[Collection[str]]]


async def resend(
    database: Database, options: ResendOptions, operator: Operator, stop: Stop
) -> dict[str, int]:
    """
    Returns the number of open deliveries per result, which is recorded as well.

    A stop ends it early. Raises NothingToDo while another resend runs.
    """
    operation_id = await _begin(database, options, operator)
    answers: Counter[str] = Counter()
    pace = Pace(options.rate_per_second)
    try:
        ids = await retry(partial(_open_ids, database), stop)
        for start in range(0, len(ids), PART_COUNT):
            part = ids[start : start + PART_COUNT]
            look = partial(_look, database, part, options)
            for request, undecided in await retry(look, stop):
                answers += Counter(answer.value for answer in undecided.values() if answer)
                to_send = [name for name, answer in undecided.items() if answer is None]
                while not stop.requested and not pace.take(1):
                    await stop.rest(TICK_SECONDS)
                if stop.requested:
                    return dict(answers)
                answers += await _send(database, request, to_send, stop)
            await _renew(database, operation_id)
    finally:
        await _end(database, operation_id, answers)
    return dict(answers)


async def _open_ids(database: Database) -> list[str]:
    """The requests with an open delivery, in the order of their index."""
    dated = {"next_due_at": {"$type": "date"}}
    cursor = database[ASSISTANCES].find(dated, {"_id": True}, sort=[("next_due_at", 1)])
    return [request["_id"] async for request in cursor]


async def _look(
    database: Database, ids: Sequence[str], options: ResendOptions
) -> list[tuple[Request, Mapping[str, Reason | None]]]:
    """Each request with its open deliveries, and why they are left alone, if they are."""
    requests: list[Request] = await (
        database[ASSISTANCES].find({"_id": {"$in": list(ids)}}, {"description": False}).to_list()
    )
    chosen = {
        request["_id"]: [
            delivery
            for delivery in request["deliveries"]
            if is_open(delivery)
            and (not options.destinations or delivery["destination"] in options.destinations)
        ]
        for request in requests
    }
    hints = [delivery["hint_event"] for some in chosen.values() for delivery in some]
    unsettled = await Hints(database).unsettled(hints)
    unavailable, now = await options.unavailable(), await server_time(database)
    return [
        (
            request,
            {
                delivery["destination"]: why_not_resent(
                    delivery, now=now, unavailable=unavailable, unsettled=unsettled
                )
                for delivery in chosen[request["_id"]]
            },
        )
        for request in requests
        if chosen[request["_id"]]
    ]


async def _send(
    database: Database, request: Request, destinations: Collection[str], stop: Stop
) -> Counter[str]:
    """One by one: each new hint increments the version that the next one relies on."""
    answers: Counter[str] = Counter()
    hints, version = Hints(database), request["version"]
    for delivery in request["deliveries"]:
        if delivery["destination"] in destinations:
            due = DueDelivery(request["_id"], version, delivery, Step.SEND, request.get("trace"))
            now = await retry(partial(server_time, database), stop)
            sent = await retry(partial(hints.send, due, now), stop)
            version += sent is not None
            answers[SENT if sent else OVERTAKEN] += 1
    return answers


async def _begin(database: Database, options: ResendOptions, operator: Operator) -> str:
    operations = database[OPERATIONS]
    given_up = {"what": RESEND, "open": True, "$expr": {"$lte": ["$lease_until", NOW]}}
    await operations.update_one(
        given_up, {"$set": {"result": "its command was lost"}, "$unset": {"open": True}}
    )
    asked = operation(
        RESEND,
        operator,
        destinations=sorted(options.destinations),
        rate_per_second=options.rate_per_second,
        open=True,
        lease_until=None,
    )
    try:
        await operations.insert_one(asked)
    except DuplicateKeyError:
        other: dict[str, Any] = await operations.find_one({"what": RESEND, "open": True}) or {}
        who = other.get("who", "another operator")
        raise NothingToDo(f"a resend started by {who} is running; nothing was sent") from None
    operation_id: str = asked["_id"]
    await _renew(database, operation_id)
    return operation_id


async def _renew(database: Database, operation_id: str) -> None:
    lease_until = {"$add": [NOW, LEASE_MS]}
    await database[OPERATIONS].update_one(
        {"_id": operation_id, "open": True}, [{"$set": {"lease_until": lease_until}}]
    )


async def _end(database: Database, operation_id: str, answers: Mapping[str, int]) -> None:
    done = {"result": dict(answers), "carried_out_at": clock.now()}
    await database[OPERATIONS].update_one(
        {"_id": operation_id}, {"$set": done, "$unset": {"open": True}}
    )
