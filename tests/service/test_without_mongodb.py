"""MongoDB away, frozen or unsuitable: the API says so in time, lives on, and recovers."""

import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from uuid import uuid4

import httpx
import pytest

from sandbox.mongodb import MongoServer
from sandbox.ports import free_ports
from sandbox.servers import installed_mongod
from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.processes import leashed
from tests.support.running_service import OLD_BODY, PATH, RunningService, start_service

ANSWER_LIMIT_SECONDS = 3.0


@pytest.fixture
def service(run_process: RunProcess, own_mongo_server: MongoServer) -> Iterator[RunningService]:
    with start_service(run_process, own_mongo_server.url, "assistance") as service:
        service.wait_ready()
        yield service


def assert_unavailable(answer: httpx.Response) -> None:
    assert answer.status_code == 503, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.json()["code"] == "unavailable"
    assert "MongoDB" in answer.json()["message"]
    assert answer.elapsed.total_seconds() < ANSWER_LIMIT_SECONDS


def assert_everything_waits_for_mongodb(service: RunningService) -> None:
    with ThreadPoolExecutor() as pool:
        posts = [pool.submit(service.post) for _ in range(20)]
        read = pool.submit(service.http.get, f"{PATH}/{uuid4()}")
        listed = pool.submit(service.http.get, PATH)
        way = pool.submit(service.http.get, f"{PATH}/{uuid4()}/timeline")
        key = {"Idempotency-Key": str(uuid4())}
        once = pool.submit(service.http.post, PATH, json=OLD_BODY, headers=key)
        ready = pool.submit(service.http.get, "/readyz")
        alive = pool.submit(service.http.get, "/livez")
        for answer in (*posts, read, listed, way, once, ready):
            assert_unavailable(answer.result())
        assert alive.result().status_code == 200


def test_a_frozen_mongodb_is_answered_503_in_time_and_the_api_recovers(
    service: RunningService, own_mongo_server: MongoServer
) -> None:
    service.accept()
    own_mongo_server.pause()
    assert_everything_waits_for_mongodb(service)
    assert_everything_waits_for_mongodb(service)

    own_mongo_server.resume()
    service.wait_ready()
    service.accept()


def test_a_mongodb_that_is_away_is_answered_503_in_time_and_the_api_recovers(
    service: RunningService, own_mongo_server: MongoServer
) -> None:
    service.accept()
    own_mongo_server.kill()
    assert_everything_waits_for_mongodb(service)

    own_mongo_server.start()
    service.wait_ready()
    service.accept()


def test_the_api_starts_without_mongodb_and_is_ready_once_it_comes(
    run_process: RunProcess, own_mongo_server: MongoServer
) -> None:
    own_mongo_server.stop()
    with start_service(run_process, own_mongo_server.url, "assistance") as service:
        service.wait_alive()
        assert_everything_waits_for_mongodb(service)

        own_mongo_server.start()
        service.wait_ready(deadline_seconds=30)
        service.accept()


def test_the_api_stops_in_time_while_mongodb_is_frozen(
    service: RunningService, own_mongo_server: MongoServer
) -> None:
    service.accept()
    own_mongo_server.pause()
    assert_unavailable(service.post())
    started = monotonic()
    service.process.signal(signal.SIGTERM)
    assert service.process.wait_exit() == 0
    assert monotonic() - started < 10


def test_a_mongodb_without_a_replica_set_is_named_with_its_cure(
    run_process: RunProcess, tmp_path: Path
) -> None:
    with standalone_mongod(tmp_path) as url:
        service = start_service(run_process, url, "assistance")
        assert service.process.wait_exit() == 78
    assert "without a replica set" in service.process.output()
    assert "--replSet" in service.process.output()


def test_a_wrong_password_is_named_with_its_cure(run_process: RunProcess, mongodb_url: str) -> None:
    host = mongodb_url.rpartition("@")[2]
    service = start_service(run_process, f"mongodb://root:not-this-one@{host}", "assistance")
    assert service.process.wait_exit() == 77
    assert "refuses the user or password in MONGODB_URL" in service.process.output()
    assert "not-this-one" not in service.process.output()


@contextmanager
def standalone_mongod(folder: Path) -> Iterator[str]:
    binary = installed_mongod()
    assert binary is not None, "a mongod binary is needed for this test"
    port = free_ports(1)[0]
    log = folder / "mongod.log"
    process = subprocess.Popen(
        [
            binary,
            "--dbpath",
            folder,
            "--port",
            str(port),
            "--bind_ip",
            "127.0.0.1",
            "--nounixsocket",
            "--logpath",
            log,
        ]
    )
    try:
        with leashed(process):
            wait_until(
                lambda: log.exists() and "Waiting for connections" in log.read_text(),
                "mongod listens",
                deadline_seconds=30,
            )
            yield f"mongodb://127.0.0.1:{port}/"
    finally:
        process.kill()
        process.wait()
