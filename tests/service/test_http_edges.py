"""What proxies, probes and careless or hostile clients send: served, or refused in time."""

import gzip
import json
from collections.abc import Iterator
from contextlib import ExitStack
from uuid import uuid4

import httpx
import pytest

from sandbox.mongodb import MongoServer
from tests.support.processes import OurProcess
from tests.support.raw_http import RawConnection, raw_connection
from tests.support.running_service import OLD_BODY, PATH, RunningService, service_environment

RECEIVE_DEADLINE_SECONDS = 1.0
MAX_CONNECTIONS = 20

BODY = json.dumps(OLD_BODY).encode()


@pytest.fixture(scope="module")
def service(
    mongo_server: MongoServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    environment = service_environment(
        mongo_server.url,
        f"test_{uuid4().hex}",
        api_receive_deadline_seconds=RECEIVE_DEADLINE_SECONDS,
        api_max_connections=MAX_CONNECTIONS,
    )
    log = tmp_path_factory.mktemp("service") / "service.log"
    process = OurProcess(("service", "run"), environment, log)
    try:
        with RunningService(process, environment) as service:
            service.wait_ready()
            yield service
    finally:
        process.end()


@pytest.fixture
def connection(service: RunningService) -> Iterator[RawConnection]:
    with raw_connection(service.url) as connection:
        yield connection


def head(service: RunningService, target: str, *lines: str, method: str = "POST") -> bytes:
    """With a valid key."""
    given = (f"{method} {target} HTTP/1.1", "Host: api.example.org", *lines)
    return "\r\n".join((*given, f"X-API-KEY: {service.keys[0]}", "", "")).encode()


def test_half_sent_heads_neither_stay_open_nor_keep_calls_out(service: RunningService) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(raw_connection(service.url)) for _ in range(100)]
        for connection in slow:
            connection.send(b"POST /api/assistances HTTP/1.1\r\nX-Slow: ")
        with service.client({"X-API-KEY": service.keys[0]}) as http:
            assert http.get("/livez").status_code == 200
            assert http.post(PATH, json=OLD_BODY).status_code == 202
        # on a slow machine the deadline comes before a new connection
        ends = [connection.until_closed().partition(b"\r\n")[0] for connection in slow]
        assert set(ends) <= {b"", b"HTTP/1.1 408 Request Timeout"}
        assert ends[-1]


def test_a_body_that_does_not_arrive_in_time_is_answered_408(
    service: RunningService, connection: RawConnection
) -> None:
    connection.send(head(service, PATH, "Content-Length: 100") + b'{"topic"')
    answer = connection.answer()
    assert (answer.status, json.loads(answer.body)["code"]) == (408, "request_timeout")
    assert answer.headers["connection"] == "close"
    connection.wait_closed()


@pytest.mark.parametrize(
    ("framing", "status"),
    [
        ("Transfer-Encoding: chunked", 401),
        ("Content-Length: 2000", 401),
        ("Content-Length: 200000000", 413),
    ],
)
def test_a_body_is_not_read_after_its_refusal(
    service: RunningService, connection: RawConnection, framing: str, status: int
) -> None:
    _ = service
    connection.send(f"POST {PATH} HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode())
    answer = connection.answer()
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    connection.wait_closed()


def test_a_length_beside_a_transfer_encoding_is_refused(
    service: RunningService, connection: RawConnection
) -> None:
    lines = (f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked")
    chunk = f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"
    connection.send(head(service, PATH, *lines) + chunk)
    answer = connection.answer()
    assert (answer.status, json.loads(answer.body)["code"]) == (400, "malformed_request")
    assert answer.headers["content-type"] == "application/problem+json"
    connection.wait_closed()


def test_a_trailing_slash_is_served_and_never_redirected(service: RunningService) -> None:
    accepted = service.http.post(f"{PATH}/", json=OLD_BODY)
    assert accepted.status_code == 202
    link = accepted.json()["link"]
    for path in (f"{link}/", f"{link}/timeline/", f"{PATH}/", "/livez/", "/docs/"):
        assert service.http.get(path).status_code == 200, path
    with service.client({}) as stranger:
        for path in (f"{PATH}/", f"{link}/"):
            refused = stranger.get(path)
            assert refused.status_code == 401
            assert "Location" not in refused.headers


@pytest.mark.parametrize("scheme", ["http", "HTTPS"])
def test_an_absolute_target_is_served(
    service: RunningService, connection: RawConnection, scheme: str
) -> None:
    target = f"{scheme}://api.example.org{PATH}"
    connection.send(head(service, target, f"Content-Length: {len(BODY)}") + BODY)
    answer = connection.answer()
    assert answer.status == 202
    assert answer.headers["location"].startswith(f"{PATH}/")


def test_head_is_answered_as_get_without_the_body(service: RunningService) -> None:
    link = service.post().json()["link"]
    for path in ("/livez", "/readyz", "/docs", "/openapi.json", PATH, link, f"{link}/timeline"):
        answer, full = service.http.head(path), service.http.get(path)
        assert (answer.status_code, answer.content) == (200, b""), path
        assert answer.headers["Content-Length"] == full.headers["Content-Length"]
    assert service.calls_logged(method="HEAD", route=PATH, status=200)
    with service.client({}) as stranger:
        assert stranger.head(PATH).status_code == 401
        assert stranger.head("/livez").status_code == 200


def problem_of(service: RunningService, content: bytes, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = service.http.post(PATH, content=content, headers=names)
    assert answer.headers["Content-Type"] == "application/problem+json"
    return answer


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "application/xml", "json", "a; b=\x7f"],
)
def test_a_wrong_content_type_is_named(service: RunningService, content_type: str) -> None:
    answer = problem_of(service, BODY, Content_Type=content_type)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert "Content-Type" in answer.json()["message"]
    assert answer.headers["Accept"] == "application/json"


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/a+json",
    ],
)
def test_json_is_read_however_its_type_is_written(
    service: RunningService, content_type: str
) -> None:
    headers = {"Content-Type": content_type, "Content-Encoding": "identity"}
    assert service.http.post(PATH, content=BODY, headers=headers).status_code == 202


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
def test_an_encoded_body_is_refused_by_its_header(service: RunningService, encoding: str) -> None:
    answer = problem_of(
        service,
        gzip.compress(BODY),
        Content_Type="application/json",
        Content_Encoding=encoding,
    )
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert "Content-Encoding" in answer.json()["message"]
    assert answer.headers["Accept-Encoding"] == "identity"


def test_the_key_is_checked_before_the_type_of_the_body(service: RunningService) -> None:
    with service.client({}) as stranger:
        headers = {"Content-Type": "text/plain", "Content-Encoding": "gzip"}
        assert stranger.post(PATH, content=BODY, headers=headers).status_code == 401


def test_every_answer_forbids_sniffing_and_storing(service: RunningService) -> None:
    http = service.http
    answers = [
        http.get("/livez"),
        http.get("/readyz"),
        http.get("/docs"),
        http.get("/openapi.json"),
        http.get(PATH),
        http.post(PATH, json=OLD_BODY),
        http.post(PATH, json={}),
        http.post(PATH, content=b" " * 20_000),
        http.delete(PATH),
        http.get("/nowhere"),
        httpx.get(f"{service.url}{PATH}", trust_env=False),
    ]
    assert {answer.status_code for answer in answers} == {200, 202, 400, 401, 404, 405, 413}
    for answer in answers:
        assert answer.headers.get_list("X-Content-Type-Options") == ["nosniff"]
        assert answer.headers.get_list("Cache-Control") == ["no-store"]
