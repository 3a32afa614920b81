"""API keys: their names in the log, weak ones, and the throttling of wrong ones."""

import json

import pytest

from sandbox.mongodb import MongoServer
from sandbox.waiting import wait_until
from tests.conftest import RunProcess
from tests.support.running_service import OLD_BODY, PATH, RunningService, start_service

KEYS = {"chatbot": "5f3c1d7a9b2e4f60", "crm": "a81e6b0d4c9f2735"}

#: The key that every client of the original service uses.
ORIGINAL_KEY = "12345678"


def answer_to(service: RunningService, key: str, **headers: str) -> int:
    with service.client({"X-API-KEY": key, **headers}) as http:
        return http.post(PATH, json=OLD_BODY).status_code


def test_the_name_of_the_key_is_logged_and_never_the_key(
    run_process: RunProcess, mongo_server: MongoServer, database_name: str
) -> None:
    with start_service(
        run_process, mongo_server.url, database_name, api_keys=json.dumps(KEYS)
    ) as service:
        service.wait_ready()
        for key in KEYS.values():
            assert answer_to(service, key) == 202
        wrong = "0123456789-wrong-key"
        assert answer_to(service, wrong) == 401
        wait_until(
            lambda: all(service.calls_logged(caller=name) for name in KEYS), "both are logged"
        )
        (refused,) = wait_until(
            lambda: service.calls_logged(status=401), "the refused call is logged"
        )
        assert "caller" not in refused
        for key in (*KEYS.values(), wrong):
            assert key not in service.process.output()


def test_keys_without_names_are_logged_by_their_number(
    run_process: RunProcess, mongo_server: MongoServer, database_name: str
) -> None:
    keys = ",".join(KEYS.values())
    with start_service(run_process, mongo_server.url, database_name, api_keys=keys) as service:
        service.wait_ready()
        assert answer_to(service, service.keys[1]) == 202
        wait_until(lambda: service.calls_logged(caller="key-2"), "the second key is logged")


def test_clients_of_the_original_service_keep_their_key_where_a_setting_allows_it(
    run_process: RunProcess, mongo_server: MongoServer, database_name: str
) -> None:
    with start_service(
        run_process,
        mongo_server.url,
        database_name,
        api_keys=ORIGINAL_KEY,
        api_allow_weak_keys=True,
    ) as service:
        service.wait_ready()
        link = service.post().json()["link"]
        assert service.http.get(link).json()["status"] == "accepted"
        for key in ("", "1234567", "123456789"):
            assert answer_to(service, key) == 401
        (warning,) = [line for line in service.log() if line["message"] == "service.weak_keys"]
        assert warning["callers"] == ["key-1"]
        assert ORIGINAL_KEY not in service.process.output()


@pytest.fixture
def throttled(
    run_process: RunProcess, mongo_server: MongoServer, database_name: str
) -> RunningService:
    """Three wrong keys a minute; each comes back after 20 seconds."""
    service = start_service(
        run_process, mongo_server.url, database_name, api_wrong_keys_per_minute=3
    )
    service.wait_ready()
    return service


def test_wrong_keys_are_throttled_per_address(throttled: RunningService) -> None:
    attacker, other = {"X-Forwarded-For": "192.0.2.1"}, {"X-Forwarded-For": "192.0.2.2"}
    with throttled as service:
        assert [answer_to(service, f"wrong-{n}", **attacker) for n in range(5)] == [
            *(401, 401, 401, 429, 429)
        ]
        # a right guess gets the same answer as a wrong one, or guessing could go on
        assert answer_to(service, service.keys[0], **attacker) == 429
        assert answer_to(service, service.keys[0], **other) == 202
        assert answer_to(service, "wrong", **other) == 401
        with service.client({"X-API-KEY": "wrong", **attacker}) as http:
            refused = http.get(PATH)
        assert refused.json()["code"] == "too_many_wrong_keys"
        assert 1 <= int(refused.headers["Retry-After"]) <= 20
        logged = [line for line in service.log() if line["message"] == "caller.throttled"]
        assert [line["address"] for line in logged] == ["192.0.2.1"]


def test_a_call_without_a_key_is_not_a_guess(throttled: RunningService) -> None:
    with throttled as service, service.client({}) as http:
        assert {http.get(PATH).status_code for _ in range(20)} == {401}
        assert service.post().status_code == 202


def test_an_address_that_an_untrusted_client_claims_is_not_believed(
    run_process: RunProcess, mongo_server: MongoServer, database_name: str
) -> None:
    with start_service(
        run_process,
        mongo_server.url,
        database_name,
        api_wrong_keys_per_minute=1,
        api_trusted_proxies="192.0.2.0/24",
    ) as service:
        service.wait_ready()
        claimed = [{"X-Forwarded-For": f"198.51.100.{n}"} for n in range(2)]
        assert [answer_to(service, "wrong", **headers) for headers in claimed] == [401, 429]
