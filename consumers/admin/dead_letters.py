"""Dead letters as operators handle them: listed by group or filter, and discarded."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, NamedTuple

from assistance.collection import ASSISTANCES, DEAD_LETTERS
from assistance.dead_letter import (
    FINAL,
    FROM_DELIVERY,
    UNDECIDED,
    DeadLetter,
    Decision,
    DecisionRecord,
)
from assistance.delivery import Delivery
from assistance.request import Request, delivery_to
from runtime import clock
from runtime.mongo import Database, Session, aggregate, in_transaction
from runtime.operations import (
    OPERATION_ITEMS,
    OPERATIONS,
    NothingToDo,
    Operator,
    operation,
)

#: Letters discarded in one transaction.
DISCARD_COUNT = 500

#: Stands in a group's name for a field that the letter lacks; a garbage message has no destination.
NOTHING = "-"


class Group(NamedTuple):
    """Letters with the same cause. reason: the class of failure, e.g. `permanent` or `rejected`."""

    destination: str | None
    reason: str | None
    code: str | None

    @classmethod
    def of(cls, letter: DeadLetter) -> "Group":
        return cls(letter["destination"], letter.get("reason"), letter.get("code"))

    def __str__(self) -> str:
        return "/".join(part or NOTHING for part in self)


def parse_group(text: str) -> Group:
    """Parses `slack/permanent/404`. Raises ValueError, which names the expected form."""
    parts = text.split("/", 2)
    if len(parts) != len(Group._fields):
        raise ValueError("a group is DESTINATION/REASON/CODE, as `dead-letters list` shows it")
    return Group(*(None if part == NOTHING else part for part in parts))


@dataclass(frozen=True, slots=True)
class Selection:
    """
    Which letters are selected: those that match, of the undecided ones.

    ids: of letters or of requests; selected whatever was decided about them.
    since, until: when a letter was last seen.
    decided: whether decided letters are selected too.
    """

    ids: tuple[str, ...] = ()
    group: Group | None = None
    destination: str | None = None
    code: str | None = None
    reason: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    decided: bool = False

    @property
    def is_empty(self) -> bool:
        return not self.as_document()

    def as_document(self) -> dict[str, Any]:
        """The selection as it is recorded with the operation."""
        given = {name: value for name, value in asdict(self).items() if value}
        if self.group is not None:
            given["group"] = str(self.group)
        return given

    def query(self) -> dict[str, Any]:
        query: dict[str, Any] = {}
        if self.ids:
            ids = list(self.ids)
            of_request = {"request_id": {"$in": ids}, "origin": FROM_DELIVERY}
            query["$or"] = [{"_id": {"$in": ids}}, of_request]
        elif not self.decided:
            query["decision"] = {"$in": list(UNDECIDED)}
        if self.group is not None:
            query |= self.group._asdict()
        named = {"destination": self.destination, "code": self.code, "reason": self.reason}
        query |= {name: value for name, value in named.items() if value is not None}
        seen = {"$gte": self.since, "$lte": self.until}
        if seen := {operator: moment for operator, moment in seen.items() if moment is not None}:
            query["last_seen_at"] = seen
        return query


@dataclass(frozen=True, slots=True)
class GroupOfLetters:
    group: Group
    count: int
    first_seen_at: datetime
    last_seen_at: datetime
    sample: str


async def groups(database: Database, selection: Selection) -> list[GroupOfLetters]:
    """Largest group first; `sample` is the ID of the letter seen last."""
    together = {name: f"${name}" for name in Group._fields}
    pipeline: list[dict[str, Any]] = [
        {"$match": selection.query()},
        {
            "$group": {
                "_id": together,
                "count": {"$sum": 1},
                "first": {"$min": "$first_seen_at"},
                "last": {"$max": {"at": "$last_seen_at", "id": "$_id"}},
            }
        },
        {"$sort": {"count": -1, "_id": 1}},
    ]
    return [
        GroupOfLetters(
            group=Group(*(found["_id"].get(name) for name in Group._fields)),
            count=found["count"],
            first_seen_at=found["first"],
            last_seen_at=found["last"]["at"],
            sample=found["last"]["id"],
        )
        async for found in aggregate(database[DEAD_LETTERS], pipeline)
    ]


async def letters(
    database: Database, selection: Selection, *, limit: int | None = None
) -> list[DeadLetter]:
    """
    Without their bodies, in the order in which they were last seen.

    Raises NothingToDo, naming every ID without a letter.
    """
    cursor = database[DEAD_LETTERS].find(
        selection.query(), {"body": False}, sort=[("last_seen_at", 1), ("_id", 1)]
    )
    found: list[DeadLetter] = await cursor.to_list(limit)
    known = {value for letter in found for value in (letter["_id"], letter.get("request_id"))}
    missing = [id for id in selection.ids if id not in known]
    if missing and limit is None:
        raise NothingToDo(f"no such dead letter: {', '.join(missing)}; nothing was changed")
    return found


async def find(database: Database, letter_id: str) -> tuple[DeadLetter, Delivery | None]:
    """A letter, and its delivery if it has one. Raises NothingToDo."""
    letter: DeadLetter | None = await database[DEAD_LETTERS].find_one({"_id": letter_id})
    if letter is None:
        raise NothingToDo(f"there is no dead letter {letter_id!r}")
    request: Request | None = await database[ASSISTANCES].find_one(
        {"_id": letter["request_id"]}, {"description": False}
    )
    destination = letter["destination"]
    return letter, delivery_to(request, destination) if request and destination else None


async def discard(
    database: Database, selection: Selection, operator: Operator
) -> tuple[str, dict[str, str]]:
    """
    Give letters up: they are kept with the decision, and no longer listed or redriven.

    Returns the operation's ID and the result per letter. Raises NothingToDo.
    """
    found = await letters(database, selection)
    if not found:
        raise NothingToDo("no dead letter matches; nothing was changed")
    if all(letter.get("decision") in FINAL for letter in found):
        decisions = Counter(letter["decision"] for letter in found)
        named = ", ".join(f"{decision} {count}" for decision, count in decisions.items())
        raise NothingToDo(f"already decided: {named}; nothing was changed")
    asked = operation("discard_letters", operator, selection=selection.as_document())
    await database[OPERATIONS].insert_one(asked)
    results: dict[str, str] = {}
    for some in _in_parts(found, DISCARD_COUNT):
        results |= await _discard_some(database, some, asked)
    done = {"carried_out_at": clock.now(), "result": _counted(results.values())}
    await database[OPERATIONS].update_one({"_id": asked["_id"]}, {"$set": done})
    return asked["_id"], results


async def _discard_some(
    database: Database, some: Sequence[DeadLetter], asked: Mapping[str, Any]
) -> dict[str, str]:
    ids = {"$in": [letter["_id"] for letter in some]}
    may_be = {"_id": ids, "decision": {"$nin": list(FINAL)}}
    decided = decide(Decision.DISCARDED, asked)

    async def write(session: Session) -> dict[str, str]:
        collection = database[DEAD_LETTERS]
        cursor = collection.find(may_be, {"_id": True}, session=session)
        discarded = {letter["_id"] async for letter in cursor}
        await collection.update_many(may_be, decided, session=session)
        results = {
            letter["_id"]: "discarded"
            if letter["_id"] in discarded
            else f"skipped: {letter.get('decision') or 'changed meanwhile'}"
            for letter in some
        }
        items = [
            {"_id": f"{asked['_id']}/{id}", "operation": asked["_id"], "letter": id, "state": state}
            for id, state in results.items()
        ]
        await database[OPERATION_ITEMS].insert_many(items, session=session)
        return results

    return await in_transaction(database.client, write)


def decide(decision: Decision, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The update of a letter that sets the decision and appends it to the letter's history."""
    record: DecisionRecord = {
        "decision": decision.value,
        "at": clock.now(),
        "who": asked["who"],
        "why": asked["why"],
        "operation": asked["_id"],
    }
    return {"$set": {"decision": decision.value}, "$push": {"decisions": record}}


def _counted(results: Iterable[str]) -> dict[str, int]:
    counts = {"discarded": 0, "skipped": 0}
    for result in results:
        counts[result.partition(":")[0]] += 1
    return counts


def _in_parts(found: Sequence[DeadLetter], count: int) -> Iterable[Sequence[DeadLetter]]:
    return (found[start : start + count] for start in range(0, len(found), count))
