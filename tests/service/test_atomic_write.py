"""A request and its events are written together or not at all, and before the 202 leaves."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import pytest

from tests.conftest import RunProcess
from tests.support.running_service import RunningService, Written, start_service

TRANSIENT = "TransientTransactionError"


@pytest.fixture
def written(mongodb_url: str, database_name: str) -> Iterator[Written]:
    written = Written(mongodb_url, database_name)
    with written.client:
        yield written


@pytest.fixture
def service(
    run_process: RunProcess, mongodb_url: str, database_name: str
) -> Iterator[RunningService]:
    with start_service(run_process, mongodb_url, database_name) as service:
        service.wait_ready()
        yield service


def test_a_request_and_its_events_are_written_together(
    service: RunningService, written: Written
) -> None:
    request_id = service.accept()

    (request,) = written.requests()
    assert request["_id"] == request_id
    assert request["status"] == "accepted"
    assert request["version"] == 2
    assert [event["type"] for event in written.events(request_id)] == [
        "assistance_request_created",
        "delivery_due",
    ]


def test_a_refused_commit_leaves_nothing_and_is_no_202(
    service: RunningService, written: Written
) -> None:
    with written.failing("commitTransaction", errorCode=8000):
        assert service.post().status_code == 500

    assert (written.requests(), written.events()) == ([], [])
    service.accept()


def test_a_commit_that_is_refused_again_and_again_is_answered_503_in_time(
    service: RunningService, written: Written
) -> None:
    started = monotonic()
    with written.failing("commitTransaction", errorCode=251, errorLabels=[TRANSIENT]):
        answer = service.post()

    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    assert monotonic() - started < 3
    assert (written.requests(), written.events()) == ([], [])


def test_a_restarted_transaction_writes_everything_once(
    service: RunningService, written: Written
) -> None:
    with written.failing(
        "commitTransaction", mode={"times": 2}, errorCode=251, errorLabels=[TRANSIENT]
    ):
        request_id = service.accept()

    assert [request["_id"] for request in written.requests()] == [request_id]
    assert [event["seq"] for event in written.events()] == [1, 2]


def test_a_commit_whose_answer_says_unknown_left_all_or_nothing(
    service: RunningService, written: Written
) -> None:
    not_replicated = {"code": 64, "errmsg": "waiting for replication timed out"}
    with written.failing("commitTransaction", writeConcernError=not_replicated):
        answer = service.post()

    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    assert "as a whole or not at all" in answer.json()["detail"]
    assert len(written.requests()) == 1
    assert len(written.events()) == 2


def test_a_commit_that_never_arrived_left_nothing(
    service: RunningService, written: Written
) -> None:
    with written.failing("commitTransaction", closeConnection=True):
        answer = service.post()

    assert answer.status_code == 503
    assert "as a whole or not at all" in answer.json()["detail"]
    assert (written.requests(), written.events()) == ([], [])
    service.accept()


def test_a_request_whose_events_cannot_be_written_is_not_written_either(
    service: RunningService, written: Written
) -> None:
    outbox = f"{written.database.name}.outbox"
    with written.failing("insert", namespace=outbox, errorCode=8000):
        assert service.post().status_code == 500

    assert (written.requests(), written.events()) == ([], [])


def test_the_202_waits_for_the_commit(service: RunningService, written: Written) -> None:
    with ThreadPoolExecutor() as pool, written.hanging("hangBeforeCommitingTxn") as hanging:
        answer = pool.submit(service.post)
        hanging.wait_entered()
        assert not answer.done()
        assert written.requests() == []
        hanging.let_go()
        assert answer.result().status_code == 202

    assert len(written.requests()) == 1


def test_the_202_waits_for_the_majority(service: RunningService, written: Written) -> None:
    with (
        ThreadPoolExecutor() as pool,
        written.hanging("hangBeforeWaitingForWriteConcern") as hanging,
    ):
        answer = pool.submit(service.post)
        hanging.wait_entered()
        assert len(written.requests()) == 1, "it is committed here, and waits for the majority"
        assert not answer.done()
        hanging.let_go()
        assert answer.result().status_code == 202


def test_many_clients_at_once_get_a_request_each(service: RunningService, written: Written) -> None:
    with ThreadPoolExecutor(20) as pool:
        ids = list(pool.map(lambda _: service.accept(), range(100)))

    assert len(set(ids)) == 100
    assert {request["_id"] for request in written.requests()} == set(ids)
    assert [(event["key"], event["seq"]) for event in written.events()] == [
        (request_id, seq) for request_id in sorted(ids) for seq in (1, 2)
    ]
