"""`Idempotency-Key`: however often a call is sent, and whatever dies, one request is made."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import uuid4

import httpx
import pytest

from assistance.collection import ASSISTANCES, IDEMPOTENCY_KEYS
from outbox.collection import OUTBOX
from sandbox.mongodb import MongoServer
from sandbox.ports import free_ports
from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.processes import OurProcess
from tests.support.running_service import (
    OLD_BODY,
    PATH,
    RunningService,
    Written,
    service_environment,
)

WINDOW_SECONDS = 3600
OTHER_BODY = {**OLD_BODY, "description": "something else"}


@pytest.fixture(scope="module")
def environment(mongo_server: MongoServer) -> dict[str, str]:
    return service_environment(
        mongo_server.url, f"test_{uuid4().hex}", idempotency_window_seconds=WINDOW_SECONDS
    )


@pytest.fixture(scope="module")
def service(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    log = tmp_path_factory.mktemp("service") / "service.log"
    process = OurProcess(("service", "run"), environment, log)
    try:
        with RunningService(process, environment) as service:
            service.wait_ready()
            yield service
    finally:
        process.end()


@pytest.fixture(scope="module")
def database(mongo_server: MongoServer, environment: dict[str, str]) -> Iterator[Written]:
    written = Written(mongo_server.url, environment["MONGODB_DATABASE"])
    with written.client:
        yield written
        written.client.drop_database(written.database)


@pytest.fixture
def written(database: Written) -> Iterator[Written]:
    """Empty again after each test."""
    yield database
    for collection in (ASSISTANCES, OUTBOX, IDEMPOTENCY_KEYS):
        database.database[collection].delete_many({})


def post(service: RunningService, key: str, body: object = OLD_BODY) -> httpx.Response:
    return service.http.post(PATH, json=body, headers={"Idempotency-Key": key})


def assert_refused(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["code"] == code


def test_the_same_call_is_answered_as_it_was_the_first_time(
    service: RunningService, written: Written
) -> None:
    key = str(uuid4())
    refused = post(service, key, {"topic": "sales", "description": ""})
    assert_refused(refused, 400, "invalid_request")

    first = post(service, key)
    assert first.status_code == 202
    assert "Idempotent-Replayed" not in first.headers
    request_id = first.json()["id"]
    written.database["assistances"].update_one(
        {"_id": request_id}, {"$set": {"status": "succeeded"}}
    )

    written_otherwise = json.dumps({**dict(reversed(OLD_BODY.items())), "unknown": 1}, indent=4)
    for text in (json.dumps(OLD_BODY), written_otherwise):
        again = service.http.post(PATH, content=text, headers={"Idempotency-Key": key})
        assert again.status_code == 202
        assert again.json() == first.json()
        assert again.headers["Location"] == first.headers["Location"]
        assert again.headers["Idempotent-Replayed"] == "true"
    for body in (OTHER_BODY, {**OLD_BODY, "topic": "pricing"}):
        assert_refused(post(service, key, body), 422, "idempotency_key_reused")
    assert [request["_id"] for request in written.requests()] == [request_id]
    assert len(written.events()) == 2

    replays = service.calls_logged(replayed=True, status=202)
    assert [line["request_id"] for line in replays] == [request_id, request_id]


def test_a_key_belongs_to_its_caller_and_no_secret_is_kept(
    service: RunningService, written: Written
) -> None:
    key = str(uuid4())
    ids = set()
    for caller in service.keys:
        with service.client({"X-API-KEY": caller, "Idempotency-Key": key}) as http:
            answer = http.post(PATH, json=OLD_BODY)
            assert answer.status_code == 202
            ids.add(answer.json()["id"])
    assert {request["_id"] for request in written.requests()} == ids
    assert len(ids) == 2

    receipts = list(written.database[IDEMPOTENCY_KEYS].find())
    assert {receipt["request_id"] for receipt in receipts} == ids
    for secret in (key, OLD_BODY["description"], *service.keys):
        assert secret not in str(receipts)
        assert secret not in service.process.output()
    for receipt in receipts:
        assert receipt["expire_at"] - receipt["created_at"] == timedelta(seconds=WINDOW_SECONDS)
    expiry = written.database[IDEMPOTENCY_KEYS].index_information()["expiry"]
    assert (expiry["key"], expiry["expireAfterSeconds"]) == ([("expire_at", 1)], 0)


def test_calls_at_once_make_one_request(service: RunningService, written: Written) -> None:
    for _ in range(3):
        key = str(uuid4())
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda key: post(service, key), [key] * 12))
        accepted = [answer for answer in answers if answer.status_code == 202]
        assert accepted
        for answer in answers:
            if answer not in accepted:
                assert_refused(answer, 409, "request_in_progress")
                assert int(answer.headers["Retry-After"]) > 0
        assert {answer.json()["id"] for answer in accepted} == {post(service, key).json()["id"]}
    assert len(written.requests()) == 3
    assert len(written.events()) == 6


def test_a_call_that_is_still_being_answered_is_not_answered_twice(
    service: RunningService, written: Written
) -> None:
    key = str(uuid4())
    with ThreadPoolExecutor() as pool, written.hanging("hangBeforeCommitingTxn") as hanging:
        first = pool.submit(post, service, key)
        hanging.wait_entered()
        second = post(service, key)
        assert_refused(second, 409, "request_in_progress")
        assert int(second.headers["Retry-After"]) > 0
        hanging.let_go()
        assert first.result().status_code == 202
    assert post(service, key).json() == first.result().json()


@pytest.mark.parametrize(
    "failure",
    [
        {"writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}},
        {"closeConnection": True},
    ],
    ids=["committed", "never arrived"],
)
def test_asking_again_after_an_unknown_commit_makes_one_request(
    service: RunningService, written: Written, failure: dict[str, object]
) -> None:
    key = str(uuid4())
    with written.failing("commitTransaction", **failure):
        unknown = post(service, key)
    assert unknown.status_code == 503
    assert "Idempotency-Key" in unknown.json()["message"]

    again = post(service, key)
    assert again.status_code == 202
    assert [request["_id"] for request in written.requests()] == [again.json()["id"]]
    assert len(written.events()) == 2


def test_a_key_outlives_the_process_however_that_ends(
    service: RunningService,
    written: Written,
    run_process: RunProcess,
    environment: dict[str, str],
) -> None:
    second_environment = {**environment, "API_PORT": str(free_ports(1)[0])}
    answered, unanswered = str(uuid4()), str(uuid4())
    process: OurProcess = run_process("service", "run", environment=second_environment)
    with RunningService(process, second_environment) as killed:
        killed.wait_ready()
        first = post(killed, answered).json()
        with ThreadPoolExecutor() as pool, written.hanging("hangBeforeCommitingTxn") as hanging:
            lost = pool.submit(post, killed, unanswered)
            hanging.wait_entered()
            process.kill()
            hanging.let_go()
            assert isinstance(lost.exception(), httpx.TransportError)

    assert post(service, answered).json() == first
    second = wait_until(
        lambda: _accepted(post(service, unanswered)), "it is accepted", deadline_seconds=30
    )
    assert {request["_id"] for request in written.requests()} == {first["id"], second}


def _accepted(answer: httpx.Response) -> str | None:
    return answer.json()["id"] if answer.status_code == 202 else None


def test_a_key_that_is_none_is_refused(service: RunningService, written: Written) -> None:
    for keys, code in (
        ([b""], "string_too_short"),
        ([b"x" * 256], "string_too_long"),
        (["schlüssel".encode()], "string_pattern_mismatch"),
        ([b"one", b"two"], "repeated"),
    ):
        headers = [(b"Idempotency-Key", key) for key in keys]
        answer = service.http.post(PATH, json=OLD_BODY, headers=headers)
        assert_refused(answer, 400, "invalid_request")
        (error,) = answer.json()["errors"]
        assert (error["path"], error["code"]) == ("header.Idempotency-Key", code)
    assert written.requests() == []

    for key in ("x" * 255, '"8e03978e 40d5"'):
        assert post(service, key).status_code == 202
