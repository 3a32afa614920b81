"""The HTTP contract: what existing clients rely on, and what was added to it."""

import json
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from sandbox.mongodb import MongoServer
from sandbox.waiting import wait_until
from tests.support.processes import OurProcess
from tests.support.running_service import (
    OLD_BODY,
    PATH,
    RunningService,
    Written,
    service_environment,
)

BODY_LIMIT_BYTES = 16 * 1024


@pytest.fixture(scope="module")
def written(mongo_server: MongoServer) -> Iterator[Written]:
    written = Written(mongo_server.url, f"test_{uuid4().hex}")
    with written.client:
        yield written
        written.client.drop_database(written.database)


@pytest.fixture(scope="module")
def service(
    mongo_server: MongoServer, written: Written, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    # the tests send more wrong keys than the default allows
    environment = service_environment(
        mongo_server.url, written.database.name, api_wrong_keys_per_minute=6000
    )
    log = tmp_path_factory.mktemp("service") / "service.log"
    process = OurProcess(("service", "run"), environment, log)
    try:
        with RunningService(process, environment) as service:
            service.wait_ready()
            yield service
    finally:
        process.end()


def assert_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Fits RFC 9457 and the first contract alike."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == status
    assert problem["code"] == code
    assert problem["message"] == problem["detail"]
    assert problem["message"]
    assert problem["title"] == answer.reason_phrase
    assert problem["type"].endswith(f":{code}")
    assert problem["instance"] == answer.request.url.raw_path.decode().partition("?")[0]
    return problem


def test_a_client_of_the_first_service_works_unchanged(service: RunningService) -> None:
    accepted = service.http.post(PATH, json=OLD_BODY)

    assert accepted.status_code == 202
    assert accepted.headers["Content-Type"] == "application/json"
    answer = accepted.json()
    request_id = answer["id"]
    assert answer == {
        "id": str(UUID(request_id)),
        "status": "accepted",
        "link": f"/api/assistances/{request_id}",
    }

    found = service.http.get(answer["link"])
    assert found.status_code == 200
    assert found.json().items() >= {"id": request_id, **OLD_BODY, "status": "accepted"}.items()


def test_the_additions_stand_beside_the_old_members(service: RunningService) -> None:
    accepted = service.post()
    location = accepted.headers["Location"]
    assert location == accepted.json()["link"]

    found = service.http.get(location).json()
    dates = [found.pop("created_at"), found.pop("updated_at")]
    (delivery,) = found.pop("deliveries")
    assert dates[0] == dates[1] == delivery.pop("next_attempt_at")
    assert dates[0].endswith("Z")
    assert found == {
        "id": accepted.json()["id"],
        **OLD_BODY,
        "status": "accepted",
        "channels": ["slack"],
        "attempts": 0,
        "failure": None,
    }
    assert delivery == {
        "destination": "slack",
        "channel": "slack",
        "state": "waiting",
        "attempts": 0,
        "failure": None,
    }


def test_a_request_shows_its_outcome_and_hides_internals(
    service: RunningService, written: Written
) -> None:
    request_id = service.accept()
    moment = datetime(2026, 11, 23, 10, 15, 30, tzinfo=UTC)
    attempt = {
        "number": 1,
        "fence": 1,
        "worker": "host-of-ours/4711",
        "started_at": moment,
        "ended_at": moment,
        "verdict": "never",
        "code": "404",
        "excerpt": "no_service: what the third party said",
    }
    failed = {"destination": "slack", "channel": "slack", "state": "failed", "attempts": [attempt]}
    lost = [{**attempt, "verdict": "later", "code": "connect_refused"}] * 8
    unanswered = {**failed, "destination": "mail", "channel": "email", "attempts": lost}
    asked = {**failed, "destination": "ops", "state": "needs_decision"}
    rest = {"fence": 1, "due_at": moment, "lease_until": None, "hint_event": "", "hints": 1}
    deliveries = [
        {**rest, "hint_until": moment, "idempotency_key": "a-secret-of-ours", **delivery}
        for delivery in (failed, unanswered, asked)
    ]
    written.database["assistances"].update_one(
        {"_id": request_id}, {"$set": {"status": "failed", "deliveries": deliveries}}
    )

    found = service.http.get(f"{PATH}/{request_id}")
    shown = found.json()
    assert (shown["status"], shown["channels"], shown["attempts"]) == (
        "failed",
        ["email", "slack"],
        10,
    )
    assert shown["failure"] == {
        "destination": "slack",
        "reason": "permanent",
        "code": "404",
        "message": "slack refused it for good (404)",
    }
    assert [delivery["state"] for delivery in shown["deliveries"]] == [
        *("failed", "failed", "needs_decision")
    ]
    assert [delivery["next_attempt_at"] for delivery in shown["deliveries"]] == [None] * 3
    assert shown["deliveries"][0]["failure"] == shown["failure"]
    assert shown["deliveries"][1]["failure"] == {
        "destination": "mail",
        "reason": "attempts_used_up",
        "code": "connect_refused",
        "message": "mail did not take it in 8 attempts (connect_refused)",
    }
    assert shown["deliveries"][2]["failure"] is None

    timeline = service.http.get(f"{PATH}/{request_id}/timeline")
    assert timeline.status_code == 200
    assert (timeline.json()["id"], timeline.json()["status"]) == (request_id, "failed")
    entries = timeline.json()["entries"]
    # the attempts come behind what caused them, although their times are earlier
    whats = [entry["what"] for entry in entries]
    assert whats[:3] == ["accepted", "appended", "appended"]
    assert whats[-3:] == ["started", "ended", "next"]
    first = {"subject": "slack, attempt 1", "at": "2026-11-23T10:15:30Z"}
    assert {**first, "what": "started", "detail": ""} in entries
    assert {**first, "what": "ended", "detail": "never, 404"} in entries
    listed = service.http.get(PATH, params={"status": "failed"})
    assert shown in listed.json()["items"]
    for answer in (found, timeline, listed):
        for untold in ("host-of-ours", "third party said", "a-secret-of-ours"):
            assert untold not in answer.text
    assert OLD_BODY["description"] not in timeline.text


@pytest.mark.parametrize("topic", ["sales", "pricing"])
@pytest.mark.parametrize("length", [1, 300])
def test_each_topic_and_length_of_the_contract_is_accepted(
    service: RunningService, topic: str, length: int
) -> None:
    # characters, not bytes
    description = "é" * (length - 1) + "🙂"
    request_id = service.accept({"topic": topic, "description": description})
    assert service.http.get(f"{PATH}/{request_id}").json()["description"] == description


def test_unknown_members_are_ignored(service: RunningService) -> None:
    service.accept({**OLD_BODY, "priority": "high", "id": "mine", "status": "succeeded"})


def test_json_that_does_not_say_so_is_read(service: RunningService) -> None:
    answer = service.http.post(PATH, content=json.dumps(OLD_BODY))
    assert "Content-Type" not in answer.request.headers
    assert answer.status_code == 202


ENUM = {
    "path": "body.topic",
    "code": "enum",
    "message": "Input should be 'sales' or 'pricing'",
}


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        ({"description": "x"}, [("body.topic", "missing")]),
        ({"topic": "sales"}, [("body.description", "missing")]),
        ({}, [("body.topic", "missing"), ("body.description", "missing")]),
        ({"topic": "Sales", "description": "x"}, [("body.topic", "enum")]),
        ({"topic": None, "description": "x"}, [("body.topic", "enum")]),
        ({"topic": ["sales"], "description": "x"}, [("body.topic", "enum")]),
        ({"topic": "sales", "description": ""}, [("body.description", "string_too_short")]),
        ({"topic": "sales", "description": "x" * 301}, [("body.description", "string_too_long")]),
        ({"topic": "sales", "description": 5}, [("body.description", "string_type")]),
        ({"topic": "sales", "description": None}, [("body.description", "string_type")]),
        ({"topic": "sales", "description": " \t\n\u2003"}, [("body.description", "blank")]),
        ([], [("body", "model_attributes_type")]),
        ("sales", [("body", "model_attributes_type")]),
        (None, [("body", "missing")]),
    ],
)
def test_a_validation_error_says_where_and_why(
    service: RunningService, body: object, errors: list[tuple[str, str]]
) -> None:
    problem = assert_problem(service.post(body), 400, "invalid_request")
    assert [(error["path"], error["code"]) for error in problem["errors"]] == errors
    assert all(error["message"] for error in problem["errors"])


def test_text_that_cannot_be_stored_is_refused(service: RunningService) -> None:
    # JSON can name half a character; UTF-8, and so MongoDB, cannot
    body = r'{"topic": "sales", "description": "half \ud83d"}'
    answer = service.http.post(PATH, content=body, headers={"Content-Type": "application/json"})
    problem = assert_problem(answer, 400, "invalid_request")
    assert [error["path"] for error in problem["errors"]] == ["body.description"]


def test_a_wrong_topic_is_answered_to_the_letter(service: RunningService) -> None:
    problem = service.post({"topic": "support", "description": "x"}).json()
    assert problem["code"] == "invalid_request"
    assert problem["errors"] == [ENUM]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"topic": "sales", "description": "x"',
        b"\xff\xfe",
        b'{"topic": "sales", "description": "\xff"}',
        b"[" * 10_000,
        b"9" * 10_000,
        b"topic=sales&description=x",
    ],
    ids=["empty", "brace", "cut", "utf-16", "latin-1", "deep", "large number", "form"],
)
def test_a_body_that_is_no_json_object_is_refused(service: RunningService, body: bytes) -> None:
    answer = service.http.post(PATH, content=body, headers={"Content-Type": "application/json"})
    problem = assert_problem(answer, 400, "invalid_request")
    assert [error["path"] for error in problem["errors"]] == ["body"]


def test_a_form_is_refused(service: RunningService) -> None:
    assert_problem(service.http.post(PATH, data=OLD_BODY), 415, "unsupported_media_type")


def test_an_unknown_request_is_not_found(service: RunningService) -> None:
    for path in (f"{PATH}/{uuid4()}", f"{PATH}/{uuid4()}/timeline"):
        problem = assert_problem(service.http.get(path), 404, "request_not_found")
        assert "errors" not in problem


@pytest.mark.parametrize("request_id", ["1", "not-a-uuid", "%00", "0f5e2f6c-8f0c"])
def test_an_id_that_is_none_is_refused(service: RunningService, request_id: str) -> None:
    for path in (f"{PATH}/{request_id}", f"{PATH}/{request_id}/timeline"):
        problem = assert_problem(service.http.get(path), 400, "invalid_request")
        assert [(error["path"], error["code"]) for error in problem["errors"]] == [
            ("path.id", "uuid_parsing")
        ]


def test_an_id_is_found_however_it_is_written(service: RunningService) -> None:
    request_id = service.accept()
    for written_as in (request_id.upper(), request_id.replace("-", "")):
        assert service.http.get(f"{PATH}/{written_as}").json()["id"] == request_id


def test_each_configured_key_opens(service: RunningService) -> None:
    for key in service.keys:
        with service.client({"X-API-KEY": key}) as http:
            assert http.post(PATH, json=OLD_BODY).status_code == 202


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", PATH),
        ("GET", f"{PATH}/not-a-uuid"),
        ("GET", f"{PATH}/not-a-uuid/timeline"),
        ("GET", f"{PATH}?limit=0"),
    ],
)
def test_a_call_without_a_valid_key_learns_nothing(
    service: RunningService, method: str, path: str
) -> None:
    good = service.keys[0]
    bad_keys = [
        "",
        "wrong",
        good[:-1],
        good + "x",
        good.upper() + "A",
        "ключ",
        ",".join(service.keys),
    ]
    refused: list[dict[bytes, bytes]] = [{}, *({b"X-API-KEY": key.encode()} for key in bad_keys)]
    with service.client({}) as http:
        for headers in refused:
            # an unauthenticated caller must not learn what else is wrong with the call
            answer = http.request(method, path, headers=headers, content="{")
            assert_problem(answer, 401, "unauthorized")
            assert answer.headers["WWW-Authenticate"]


def test_an_unknown_path_and_a_wrong_method_are_problems_too(service: RunningService) -> None:
    assert_problem(service.http.get("/nowhere/at%20all"), 404, "not_found")
    refused = service.http.delete(PATH)
    assert_problem(refused, 405, "method_not_allowed")
    assert refused.headers["Allow"] == "GET, HEAD, POST"


def test_a_body_up_to_the_limit_is_read(service: RunningService) -> None:
    body = json.dumps(OLD_BODY).encode()
    padded = body + b" " * (BODY_LIMIT_BYTES - len(body))
    headers = {"Content-Type": "application/json"}
    assert service.http.post(PATH, content=padded, headers=headers).status_code == 202
    too_large = service.http.post(PATH, content=padded + b" ", headers=headers)
    assert_problem(too_large, 413, "body_too_large")


def test_a_body_that_does_not_say_how_long_it_is_is_cut_off(service: RunningService) -> None:
    """The server closes the connection instead of reading on."""
    host, _, port = service.url.removeprefix("http://").partition(":")
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nX-API-KEY: {service.keys[0]}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + chunk * 17)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"application/problem+json" in answer


def test_a_defect_of_ours_tells_nothing_of_itself(
    service: RunningService, written: Written
) -> None:
    description = "confidential 7d1c"
    with written.failing("insert", errorCode=8000):
        answer = service.post({"topic": "sales", "description": description})
    assert_problem(answer, 500, "internal_error")
    assert "Mongo" not in answer.text
    assert "8000" not in answer.text

    def defects() -> list[dict[str, Any]]:
        return [line for line in service.log() if "stack" in line]

    wait_until(defects, "the defect is logged")
    (defect,) = defects()
    assert defect["error"] == "OperationFailure"
    assert defect["code"] == 8000
    assert "store.py" in defect["stack"]
    assert description not in service.process.output()


def test_every_call_is_one_line_in_the_log(service: RunningService) -> None:
    request_id = service.accept()
    service.http.get(f"{PATH}/{request_id}")

    wait_until(
        lambda: len(service.calls_logged(request_id=request_id)) == 2, "both calls are logged"
    )
    posted, read = service.calls_logged(request_id=request_id)
    assert (posted["method"], posted["route"], posted["status"]) == ("POST", PATH, 202)
    assert (read["method"], read["route"], read["status"]) == ("GET", f"{PATH}/{{id}}", 200)
    assert posted["duration_ms"] > 0


def test_neither_what_people_write_nor_a_key_is_ever_logged(service: RunningService) -> None:
    request_id = service.accept({"topic": "sales", "description": "the secret word: abracadabra"})
    service.post({"topic": "abracadabra", "description": "abracadabra " * 50})
    service.http.get(f"/abracadabra/{request_id}")
    with service.client({"X-API-KEY": "abracadabra-abracadabra"}) as http:
        http.post(PATH, json=OLD_BODY)

    wait_until(lambda: service.calls_logged(status=401), "the last call is logged")
    assert "abracadabra" not in service.process.output()
    assert not [key for key in service.keys if key in service.process.output()]


def test_the_documentation_is_open_and_complete(service: RunningService) -> None:
    with service.client({}) as http:
        assert "swagger" in http.get("/docs").text
        document = http.get("/openapi.json").json()

    post, find = document["paths"][PATH]["post"], document["paths"][PATH]["get"]
    get = document["paths"][f"{PATH}/{{id}}"]["get"]
    timeline = document["paths"][f"{PATH}/{{id}}/timeline"]["get"]
    of_all = {"400", "401", "429", "500", "503", "default"}
    assert set(post["responses"]) == {"202", "408", "409", "413", "415", "422", *of_all}
    assert set(find["responses"]) == {"200", *of_all}
    assert set(get["responses"]) == set(timeline["responses"]) == {"200", "404", *of_all}
    for operation in (post, find, get, timeline):
        (scheme,) = operation["security"][0]
        assert document["components"]["securitySchemes"][scheme] == {
            "type": "apiKey",
            "in": "header",
            "name": "X-API-KEY",
        }
        for status in set(operation["responses"]) - {"200", "202", "default"}:
            (media_type,) = operation["responses"][status]["content"]
            assert media_type == "application/problem+json"
            example = operation["responses"][status]["content"][media_type]["example"]
            assert example["status"] == int(status)
    assert "Retry-After" in post["responses"]["503"]["headers"]
    assert "Retry-After" in post["responses"]["409"]["headers"]
    assert set(post["responses"]["202"]["headers"]) == {"Location", "Idempotent-Replayed"}
    (key,) = [each for each in post["parameters"] if each["name"] == "Idempotency-Key"]
    assert (key["in"], key["required"]) == ("header", False)
    assert {each["name"] for each in find["parameters"]} == {
        *("status", "topic", "created_from", "created_to", "limit", "cursor")
    }
    for schema in document["components"]["schemas"].values():
        for name, each in schema.get("properties", {}).items():
            known = "$ref" in each or "items" in each or schema["title"] == "Problem"
            assert known or {"examples", "const"} & each.keys(), (schema["title"], name)
    new = document["components"]["schemas"]["NewAssistance"]["properties"]
    assert new["topic"]["enum"] == ["sales", "pricing"]
    assert new["description"]["maxLength"] == 300
    assert new["description"]["examples"]


def test_every_reference_in_the_documentation_leads_somewhere(service: RunningService) -> None:
    text = service.http.get("/openapi.json").text
    document = json.loads(text)
    references = {part.split('"')[0] for part in text.split('"$ref":"')[1:]}
    assert references
    for reference in references:
        place = document
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]


def test_probes_need_no_key(service: RunningService) -> None:
    with service.client({}) as http:
        assert http.get("/livez").json() == {"status": "alive"}
        assert http.get("/readyz").json() == {"status": "ready"}
