"""SIGTERM: what was asked is answered, and the process ends in order."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.running_service import RunningService, Written, start_service


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_api_ends_at_once(service: RunningService, number: signal.Signals) -> None:
    service.process.signal(number)
    assert service.process.wait_exit(5) == 0


def test_a_request_in_mid_write_is_answered_before_the_end(
    service: RunningService, written: Written
) -> None:
    with ThreadPoolExecutor() as pool, written.hanging("hangBeforeCommitingTxn") as hanging:
        answer = pool.submit(service.post)
        hanging.wait_entered()
        service.process.signal(signal.SIGTERM)
        wait_until(lambda: refuses_callers(service), "the API takes no new callers")
        assert not answer.done()
        hanging.let_go()
        assert answer.result().status_code == 202

    assert service.process.wait_exit() == 0
    (request,) = written.requests()
    assert request["_id"] == answer.result().json()["id"]


def test_a_stop_does_not_wait_for_mongodb_to_finish_what_prepares_it(
    run_process: RunProcess, mongodb_url: str, database_name: str, written: Written
) -> None:
    with (
        written.failing("createIndexes", blockConnection=True, blockTimeMS=12_000),
        start_service(
            run_process, mongodb_url, database_name, shutdown_grace_seconds=1
        ) as unprepared,
    ):
        unprepared.wait_alive()
        wait_until(written.database.list_collection_names, "it has begun to prepare")
        unprepared.process.signal(signal.SIGTERM)
        assert unprepared.process.wait_exit(8) == 0


def test_a_burst_that_is_cut_off_lost_nothing_that_was_accepted(
    service: RunningService, written: Written
) -> None:
    def post(_: int) -> str | None:
        try:
            return service.accept()
        except httpx.TransportError:
            return None

    with ThreadPoolExecutor(10) as pool:
        answers = pool.map(post, range(400))
        wait_until(lambda: len(written.requests()) > 20, "the burst has begun")
        service.process.signal(signal.SIGTERM)
        accepted = {request_id for request_id in answers if request_id}

    assert service.process.wait_exit() == 0
    assert 0 < len(accepted) < 400
    assert accepted <= {request["_id"] for request in written.requests()}


def refuses_callers(service: RunningService) -> bool:
    try:
        httpx.get(f"{service.url}/livez", trust_env=False)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        return False  # taken in at the last moment, and put out again
    return False
