"""`python -m service audit` and `show`: where every request is, and what comes next."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Event
from typing import Any
from uuid import uuid4

import pytest

from assistance.collection import ASSISTANCES, ASSISTANCES_INDEXES, CLOSED_BALANCE
from assistance.request import accept
from assistance.routing import Destination
from outbox.collection import INDEXES, OUTBOX
from runtime.mongo import close, ensure_collection, open_client
from service.audit import balance, balance_since
from tests.conftest import RunProcess
from tests.support.running_service import Written


@pytest.fixture
def written(mongodb_url: str, database_name: str) -> Iterator[Written]:
    written = Written(mongodb_url, database_name)
    with written.client:
        yield written


def write(written: Written, *destinations: str, description: str = "x") -> str:
    """A request as the API writes it."""
    acceptance = accept(
        request_id=str(uuid4()),
        topic="sales",
        description=description,
        destinations=[Destination(name, "slack") for name in destinations or ("slack",)],
        now=datetime.now(UTC),
    )
    with written.client.start_session() as session, session.start_transaction():
        written.database[ASSISTANCES].insert_one(dict(acceptance.request), session=session)
        written.database[OUTBOX].insert_many(acceptance.outbox_documents, session=session)
    return acceptance.request["_id"]


class Command:
    def __init__(self, run_process: RunProcess, written: Written, mongodb_url: str) -> None:
        self._run_process = run_process
        self._environment = {
            "MONGODB_URL": mongodb_url,
            "MONGODB_DATABASE": written.database.name,
        }

    def __call__(self, *arguments: str, exit_code: int = 0) -> str:
        process = self._run_process("service", *arguments, environment=self._environment)
        assert process.wait_exit() == exit_code
        return process.output()


@pytest.fixture
def command(run_process: RunProcess, written: Written, mongodb_url: str) -> Command:
    return Command(run_process, written, mongodb_url)


def test_books_without_a_request_balance(command: Command) -> None:
    assert command("audit") == ("accepted 0 = succeeded 0 + failed 0 + waiting 0, unexplained 0\n")


def test_sound_books_balance_and_say_who_waits_for_what(command: Command, written: Written) -> None:
    for _ in range(3):
        write(written)
    queued = write(written, "slack", "email")
    written.database[OUTBOX].update_many({"key": queued}, {"$set": {"state": "published"}})

    assert command("audit").splitlines() == [
        "waiting, hint to be published: 3",
        "waiting, queued: 1",
        "accepted 4 = succeeded 0 + failed 0 + waiting 4, unexplained 0",
    ]
    assert json.loads(command("audit", "--json")) == {
        "accepted": 4,
        "succeeded": 0,
        "failed": 0,
        "waiting": 4,
        "waiting_for": {"hint to be published": 3, "queued": 1},
        "overdue": 0,
        "unexplained": 0,
        "listed": [],
    }


def test_whatever_does_not_add_up_is_listed_and_the_exit_code_says_so(
    command: Command, written: Written
) -> None:
    write(written)
    half_written = write(written)
    written.database[OUTBOX].delete_many({"key": half_written})
    never_requested = write(written)
    written.database[ASSISTANCES].delete_one({"_id": never_requested})
    untold = write(written)
    written.database[ASSISTANCES].update_one({"_id": untold}, {"$set": {"status": "succeeded"}})

    *listed, last = command("audit", exit_code=1).splitlines()
    assert last == "accepted 3 = succeeded 1 + failed 0 + waiting 2, unexplained 3"
    for request_id, why in (
        (half_written, "the outbox holds numbers none"),
        (never_requested, "the request itself does not exist"),
        (untold, "it is succeeded, but its deliveries (waiting) imply accepted"),
    ):
        assert [line for line in listed if request_id in line and why in line]
    assert json.loads(command("audit", "--json", exit_code=1))["unexplained"] == 3


def test_a_request_that_was_overlooked_is_told_and_the_exit_code_says_so(
    command: Command, written: Written
) -> None:
    overlooked = write(written)
    long_ago = datetime.now(UTC) - timedelta(minutes=2)
    dates = {"deliveries.0.due_at": long_ago, "deliveries.0.hint_until": long_ago}
    written.database[ASSISTANCES].update_one(
        {"_id": overlooked}, {"$set": {**dates, "next_due_at": long_ago}}
    )
    written.database[OUTBOX].update_many({}, {"$set": {"state": "published"}})

    assert "waiting, due: 1" in command("audit")
    overdue_after = ("--overdue-after-seconds", "60")
    assert command("audit", *overdue_after, exit_code=1).splitlines() == [
        "waiting, overdue: 1",
        "overdue 1: check that the reconciler is running",
        "accepted 1 = succeeded 0 + failed 0 + waiting 1, unexplained 0",
    ]
    assert json.loads(command("audit", "--json", *overdue_after, exit_code=1))["overdue"] == 1


def test_events_of_other_writers_are_not_ours_to_balance(
    command: Command, written: Written
) -> None:
    foreign: list[dict[str, Any]] = [
        {"type": "order_placed", "key": "order-1", "routing_key": "orders", "payload": "{}"},
        {"type": "order_placed", "key": write(written), "routing_key": "orders", "payload": "{}"},
        {"type": "order_placed", "routing_key": "orders", "payload": "{}"},
    ]
    written.database[OUTBOX].insert_many(foreign)
    assert command("audit").endswith("waiting 1, unexplained 0\n")


async def test_the_books_balance_at_any_moment_however_busy_the_writers_are(
    written: Written, mongodb_url: str
) -> None:
    write(written)
    client = open_client(mongodb_url, process="test")
    enough = Event()

    def keep_writing() -> None:
        while not enough.is_set():
            write(written, "slack", "email")

    counts: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(keep_writing) for _ in range(4)]
        try:
            while len(counts) < 5 or counts[-1] < 100:
                books = await balance(client[written.database.name])
                assert books.balanced, books.listed
                counts.append(books.accepted)
        finally:
            enough.set()
        for writer in writers:
            writer.result()
    assert counts == sorted(counts)
    await close(client)


def close_long_ago(written: Written, count: int, status: str = "succeeded") -> list[str]:
    """Requests that were closed two days ago, with their facts."""
    long_ago = datetime.now(UTC) - timedelta(days=2)
    ids = [write(written) for _ in range(count)]
    closed = {"status": status, "next_due_at": None, "deliveries.0.state": status, "version": 3}
    dates = {"created_at": long_ago, "updated_at": long_ago}
    written.database[ASSISTANCES].update_many({"_id": {"$in": ids}}, {"$set": closed | dates})
    written.database[OUTBOX].update_many(
        {"key": {"$in": ids}}, {"$set": {"created_at": long_ago, "state": "published"}}
    )
    written.database[OUTBOX].insert_many(
        {
            "type": f"assistance_request_{status}",
            "key": request_id,
            "seq": 3,
            "state": "published",
            "created_at": long_ago,
        }
        for request_id in ids
    )
    return ids


def test_what_an_earlier_audit_checked_is_counted_and_only_a_full_audit_reads_it_again(
    command: Command, written: Written
) -> None:
    tampered, *_ = close_long_ago(written, 3)
    write(written)
    assert command("audit").endswith("succeeded 3 + failed 0 + waiting 1, unexplained 0\n")
    change = {"$set": {"deliveries.0.state": "failed"}}
    written.database[ASSISTANCES].update_one({"_id": tampered}, change)
    write(written)
    assert command("audit").splitlines()[-1] == (
        "accepted 5 = succeeded 3 + failed 0 + waiting 2, unexplained 0"
    )
    said = command("audit", "--full", exit_code=1)
    assert f"unexplained {tampered}: it is succeeded, but its deliveries (failed)" in said
    assert said.endswith("succeeded 3 + failed 0 + waiting 2, unexplained 1\n")


def test_a_stored_balance_that_is_wrong_is_found_by_a_full_audit_and_corrected(
    command: Command, written: Written
) -> None:
    close_long_ago(written, 3)
    command("audit")
    written.database[CLOSED_BALANCE].update_one({}, {"$inc": {"succeeded": 1}})
    said = command("audit", "--full", exit_code=1)
    assert "it has 4 succeeded and 0 failed, but 3 and 0 were counted" in said
    assert command("audit") == ("accepted 3 = succeeded 3 + failed 0 + waiting 0, unexplained 0\n")


def test_a_request_that_was_redriven_since_the_stored_balance_counts_once(
    command: Command, written: Written
) -> None:
    redriven, _ = close_long_ago(written, 2, "failed")
    assert command("audit").endswith("succeeded 0 + failed 2 + waiting 0, unexplained 0\n")
    now = datetime.now(UTC)
    soon = now + timedelta(hours=1)
    events = [
        {"type": "assistance_request_redriven", "seq": 4},
        {"_id": "new hint", "type": "delivery_due", "seq": 5},
    ]
    written.database[OUTBOX].insert_many(
        event | {"key": redriven, "state": "published", "created_at": now} for event in events
    )
    delivery = {"state": "waiting", "due_at": now, "hint_event": "new hint", "hint_until": soon}
    opened = {f"deliveries.0.{name}": value for name, value in delivery.items()}
    request = {"status": "accepted", "version": 5, "updated_at": now, "next_due_at": soon}
    written.database[ASSISTANCES].update_one({"_id": redriven}, {"$set": opened | request})
    for arguments in ((), ("--full",), ()):
        said = command("audit", *arguments)
        assert said.endswith("accepted 2 = succeeded 0 + failed 1 + waiting 1, unexplained 0\n")


def test_events_without_a_request_are_found_without_a_full_audit(
    command: Command, written: Written
) -> None:
    close_long_ago(written, 2)
    command("audit")
    held, published = write(written), write(written)
    written.database[ASSISTANCES].delete_many({"_id": {"$in": [held, published]}})
    written.database[OUTBOX].update_many({"key": held}, {"$set": {"state": "held"}})
    expire_at = datetime.now(UTC) + timedelta(days=7)
    written.database[OUTBOX].update_many(
        {"key": published}, {"$set": {"state": "published", "expire_at": expire_at}}
    )
    said = command("audit", exit_code=1)
    assert {held, published} <= {word.strip(":") for word in said.split()}
    assert said.endswith("accepted 2 = succeeded 2 + failed 0 + waiting 0, unexplained 2\n")


async def test_an_audit_since_the_stored_balance_reads_by_indexes_only(
    written: Written, mongodb_url: str
) -> None:
    close_long_ago(written, 50)
    write(written)
    client = open_client(mongodb_url, process="test")
    database = client[written.database.name]
    await ensure_collection(database, ASSISTANCES, indexes=ASSISTANCES_INDEXES)
    await ensure_collection(database, OUTBOX, indexes=INDEXES)
    await balance(database)
    written.database.command("profile", 2)
    books = await balance_since(database)
    written.database.command("profile", 0)
    assert (books and books.accepted) == 51
    reads = list(
        written.database["system.profile"].find(
            {"ns": {"$regex": "(assistances|outbox)$"}, "op": "query"}
        )
    )
    assert reads
    assert [read for read in reads if "COLLSCAN" in read["planSummary"]] == []
    assert sum(read["docsExamined"] for read in reads) < 20
    await close(client)


async def test_a_full_audit_in_several_parts_has_the_same_books(
    written: Written, mongodb_url: str
) -> None:
    close_long_ago(written, 5)
    write(written)
    lost = write(written)
    written.database[ASSISTANCES].delete_one({"_id": lost})
    client = open_client(mongodb_url, process="test")
    whole = await balance(client[written.database.name])
    assert await balance(client[written.database.name], part_count=2) == whole
    assert (whole.accepted, whole.unexplained) == (6, 1)
    await close(client)


def test_one_request_is_shown_with_what_happened_and_what_comes_next(
    command: Command, written: Written
) -> None:
    request_id = write(written, "slack", "email")
    now = datetime.now(UTC)
    attempts = [
        {
            "number": 1,
            "fence": 1,
            "worker": "w1",
            "started_at": now,
            "ended_at": now + timedelta(seconds=1),
            "calls": 3,
            "verdict": "later",
            "code": "503",
            "excerpt": "try later",
        }
    ]
    due_at = now + timedelta(hours=1)
    written.database[ASSISTANCES].update_one(
        {"_id": request_id},
        {"$set": {"deliveries.0.attempts": attempts, "deliveries.0.due_at": due_at}},
    )
    created, slack, email = written.events(request_id)
    for event in (created, slack):
        published = {"state": "published", "published_at": now}
        written.database[OUTBOX].update_one({"_id": event["_id"]}, {"$set": published})
    held = {"state": "held", "reason": "returned: 312 NO_ROUTE", "retry_at": now, "settled_at": now}
    written.database[OUTBOX].update_one({"_id": email["_id"]}, {"$set": held})

    shown = command("show", request_id)
    head, description, *lines = shown.splitlines()
    assert head == f"{request_id}  sales  accepted"
    assert description == "x"
    for words in (
        ("accepted", "sales", "goes to slack, email"),
        ("appended", "assistance_request_created", "event 1"),
        ("published", "assistance_request_created"),
        ("published", "delivery_due.slack"),
        ("held", "delivery_due.email", "returned: 312 NO_ROUTE; tried again at"),
        ("started", "slack, attempt 1", "by worker w1"),
        ("ended", "slack, attempt 1", "later, 503, after 3 calls, try later"),
        ("next", "slack", "due later"),
        ("next", "email", "hint held"),
    ):
        assert [line for line in lines if all(word in line for word in words)], words

    shown = json.loads(command("show", request_id, "--json"))
    assert (shown["id"], shown["status"], shown["description"]) == (request_id, "accepted", "x")
    (next_of_slack,) = [
        entry
        for entry in shown["timeline"]
        if entry["what"] == "next" and entry["subject"] == "slack"
    ]
    assert datetime.fromisoformat(next_of_slack["at"]) > now


def test_what_strangers_wrote_cannot_touch_the_terminal(command: Command, written: Written) -> None:
    request_id = write(written, description="[red]bold[/] \x1b[2J\x07\u202eevil\r\nend é")
    shown = command("show", request_id)
    assert r"[red]bold[/] \x1b[2J\x07\u202eevil\r\nend é" in shown
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(shown)


def test_an_unknown_id_is_a_clear_error(command: Command) -> None:
    assert command("show", "x\x1b[2J", exit_code=66) == "no request has the id x\\x1b[2J\n"
