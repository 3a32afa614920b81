import json
import signal
import smtplib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from email.message import EmailMessage
from typing import Any

import httpx
import pytest

from sandbox.waiting import wait_until
from tests.support.processes import leashed
from tests.support.third_parties import ThirdParties, read_addresses

DEADLINE_SECONDS = 5


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=DEADLINE_SECONDS, trust_env=False) as client:
        yield client


def post_to_slack(
    http: httpx.Client, url: str, request_id: str = "r-1", text: str = "hello", **options: Any
) -> httpx.Response:
    headers = {"X-Request-ID": request_id, "Idempotency-Key": f"{request_id}:sales"}
    return http.post(url, json={"text": text}, headers=headers, **options)


def a_mail(request_id: str = "r-1", text: str = "Grüße\n") -> EmailMessage:
    mail = EmailMessage()
    mail["Subject"] = "Prices, please: ½ a dozen"
    mail["From"] = "Assistance <assistance@example.com>"
    mail["To"] = "pricing@example.com"
    mail["Date"] = "Mon, 23 Nov 2026 10:00:00 +0000"
    mail["Message-ID"] = f"<{request_id}@example.com>"
    mail["X-Request-ID"] = request_id
    mail.set_content(text)
    return mail


def send_mail(
    parties: ThirdParties, mail: EmailMessage | None = None, timeout_seconds: float = 5
) -> None:
    with smtplib.SMTP(
        parties.smtp_host, parties.smtp_port, local_hostname="localhost", timeout=timeout_seconds
    ) as smtp:
        smtp.send_message(mail or a_mail())


def answers(parties: ThirdParties, kind: str) -> list[tuple[bool, str]]:
    return [(call["accepted"], call["answer"]) for call in parties.calls(kind)]


def test_slack_takes_an_incoming_webhook_and_says_ok(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    answer = post_to_slack(http, third_parties.slack_url, text="<b>half</b> a dozen & more")

    assert (answer.status_code, answer.text) == (200, "ok")
    (receipt,) = third_parties.received("slack")
    assert receipt["text"] == "<b>half</b> a dozen & more"
    assert receipt["destination"] == "T000/B000"
    assert receipt["request_id"] == "r-1"
    assert receipt["idempotency_key"] == "r-1:sales"
    assert not receipt["repeat"]


@pytest.mark.parametrize(
    ("path", "body", "refusal"),
    [
        ("/services/X1/B000/token", b'{"text": "hi"}', "404 no_team"),
        ("/services/T000/X1/token", b'{"text": "hi"}', "404 no_service"),
        ("/services/T000/B000/revoked", b'{"text": "hi"}', "403 invalid_token"),
        ("/services/T000/B000/token", b"{", "400 invalid_payload"),
        ("/services/T000/B000/token", b"[]", "400 invalid_payload"),
        ("/services/T000/B000/token", b'"\\ud800"', "400 invalid_payload"),
        ("/services/T000/B000/token", b"{}", "400 no_text"),
        ("/services/T000/B000/token", b'{"text": 7}', "400 no_text"),
    ],
)
def test_slack_refuses_a_wrong_incoming_webhook_by_name(
    third_parties: ThirdParties, http: httpx.Client, path: str, body: bytes, refusal: str
) -> None:
    answer = http.post(httpx.URL(third_parties.slack_url).join(path), content=body)

    assert f"{answer.status_code} {answer.text}" == refusal
    assert answers(third_parties, "slack") == [(False, refusal)]


def test_slack_takes_a_posted_message(third_parties: ThirdParties, http: httpx.Client) -> None:
    answer = http.post(
        third_parties.slack_api_url,
        json={"channel": "C123", "text": "hello"},
        headers={"Authorization": "Bearer xoxb-planted", "X-Request-ID": "r-1"},
    ).json()

    assert answer["ok"]
    assert answer["channel"] == "C123"
    assert answer["message"]["text"] == "hello"
    (receipt,) = third_parties.received("slack")
    assert receipt["destination"] == "C123"
    assert "xoxb-planted" not in json.dumps(receipt)


@pytest.mark.parametrize(
    ("bearer", "body", "error"),
    [
        ("", b'{"channel": "C1", "text": "hi"}', "not_authed"),
        ("Bearer revoked-1", b'{"channel": "C1", "text": "hi"}', "invalid_auth"),
        ("Bearer good", b"nonsense", "invalid_json"),
        ("Bearer good", b'{"text": "hi"}', "channel_not_found"),
        ("Bearer good", b'{"channel": "C1"}', "no_text"),
    ],
)
def test_slack_says_ok_false_to_a_wrong_message(
    third_parties: ThirdParties, http: httpx.Client, bearer: str, body: bytes, error: str
) -> None:
    answer = http.post(third_parties.slack_api_url, content=body, headers={"Authorization": bearer})

    assert (answer.status_code, answer.json()) == (200, {"ok": False, "error": error})
    assert third_parties.totals("slack")["refused"] == 1


def test_a_webhook_is_kept_with_its_headers_and_body(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    answer = http.post(
        f"{third_parties.webhooks_url}orders", content=b'{"a": 1}', headers={"Webhook-Id": "m-1"}
    )

    assert answer.status_code == 204
    (receipt,) = third_parties.received("webhook")
    assert receipt["destination"] == "orders"
    assert receipt["body"] == '{"a": 1}'
    assert ["webhook-id", "m-1"] in receipt["headers"]


def test_a_mail_is_kept_decoded_with_its_envelope(third_parties: ThirdParties) -> None:
    send_mail(third_parties)

    (receipt,) = third_parties.received("email")
    assert receipt["envelope_from"] == "assistance@example.com"
    assert receipt["envelope_to"] == ["pricing@example.com"]
    assert receipt["subject"] == "Prices, please: ½ a dozen"
    assert receipt["from"] == "Assistance <assistance@example.com>"
    assert receipt["to"] == "pricing@example.com"
    assert receipt["date"] == "Mon, 23 Nov 2026 10:00:00 +0000"
    assert receipt["message_id"] == "<r-1@example.com>"
    assert receipt["request_id"] == "r-1"
    assert receipt["body"].strip() == "Grüße"


def test_a_second_message_for_the_same_request_and_destination_is_a_repeat(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    other_service = third_parties.slack_url.replace("B000", "B001")
    post_to_slack(http, third_parties.slack_url, "r-1")
    post_to_slack(http, other_service, "r-1")
    post_to_slack(http, third_parties.slack_url, "r-2")
    post_to_slack(http, third_parties.slack_url, "r-1")

    assert [receipt["repeat"] for receipt in third_parties.received("slack")] == [
        False,
        False,
        False,
        True,
    ]
    assert third_parties.totals("slack") == {
        "received": 4,
        "distinct": 3,
        "repeated": 1,
        "refused": 0,
    }


def test_messages_without_a_request_id_are_never_taken_for_repeats(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    for _ in range(2):
        http.post(third_parties.slack_url, json={"text": "hello"}).raise_for_status()

    assert third_parties.totals("slack")["distinct"] == 2


def test_a_call_that_was_refused_makes_no_repeat_of_the_next(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    third_parties.misbehave("slack", "status", code=500, times=1)
    assert post_to_slack(http, third_parties.slack_url).status_code == 500
    assert post_to_slack(http, third_parties.slack_url).status_code == 200

    assert third_parties.totals("slack") == {
        "received": 1,
        "distinct": 1,
        "repeated": 0,
        "refused": 1,
    }


def test_the_inbox_shows_the_newest_first_and_can_be_filtered(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    for request_id in ("r-1", "r-2", "r-3"):
        post_to_slack(http, third_parties.slack_url, request_id)
    send_mail(third_parties)

    def shown(**filters: Any) -> list[str]:
        receipts = third_parties.http.get("inbox", params=filters).json()["receipts"]
        return [f"{receipt['kind']} {receipt['request_id']}" for receipt in receipts]

    assert shown() == ["email r-1", "slack r-3", "slack r-2", "slack r-1"]
    assert shown(kind="slack", limit=2) == ["slack r-3", "slack r-2"]
    assert shown(request_id="r-1") == ["email r-1", "slack r-1"]
    assert shown(accepted=False) == []


def test_a_cleared_inbox_forgets_receipts_counts_and_repeats(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    post_to_slack(http, third_parties.slack_url)
    third_parties.clear()
    post_to_slack(http, third_parties.slack_url)

    (receipt,) = third_parties.received("slack")
    assert (receipt["number"], receipt["repeat"]) == (1, False)


def test_repeats_are_told_from_first_deliveries_among_thousands_at_once(
    third_parties: ThirdParties,
) -> None:
    def post_many(share: range) -> None:
        with httpx.Client(trust_env=False) as http:
            for number in share:
                post_to_slack(http, third_parties.slack_url, f"r-{number}").raise_for_status()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(post_many, [range(600), range(400, 1_000)]))

    assert third_parties.totals("slack") == {
        "received": 1_200,
        "distinct": 1_000,
        "repeated": 200,
        "refused": 0,
    }


@pytest.mark.parametrize("retry_after", [7, "Wed, 25 Nov 2026 07:28:00 GMT", "soon"])
def test_slack_answers_the_status_it_was_told_to(
    third_parties: ThirdParties, http: httpx.Client, retry_after: int | str
) -> None:
    third_parties.misbehave(
        "slack", "status", code=429, retry_after=retry_after, body="rate_limited"
    )
    answer = post_to_slack(http, third_parties.slack_url)

    assert (answer.status_code, answer.text) == (429, "rate_limited")
    assert answer.headers["Retry-After"] == str(retry_after)
    assert answers(third_parties, "slack") == [(False, "429 on request")]


def test_slack_answers_ok_false_when_told_to(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    third_parties.misbehave("slack", "ok_false", error="channel_is_archived")
    answer = post_to_slack(http, third_parties.slack_url)

    assert answer.status_code == 200
    assert answer.json() == {"ok": False, "error": "channel_is_archived"}
    assert third_parties.received("slack") == []


def test_misbehaviour_ends_after_the_times_asked_for(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    third_parties.misbehave("slack", "status", code=503, times=2)

    codes = [post_to_slack(http, third_parties.slack_url).status_code for _ in range(3)]

    assert codes == [503, 503, 200]
    assert third_parties.http.get("misbehave").json() == {"active": []}


def test_misbehaviour_without_times_lasts_until_told_to_behave(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    third_parties.misbehave("slack", "status", code=503)
    codes = [post_to_slack(http, third_parties.slack_url).status_code for _ in range(3)]
    assert codes == [503, 503, 503]
    assert third_parties.http.get("misbehave").json() == {
        "active": [{"kind": "slack", "mode": "status", "code": 503, "used": 3}]
    }

    third_parties.behave()
    assert post_to_slack(http, third_parties.slack_url).status_code == 200


def test_one_misbehaving_party_leaves_the_others_alone(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    third_parties.misbehave("slack", "refuse")
    third_parties.misbehave("email", "hang")

    assert http.post(f"{third_parties.webhooks_url}orders", content=b"x").status_code == 204


@pytest.mark.parametrize("kind", ["slack", "webhook"])
def test_a_hanging_party_never_answers_and_keeps_nothing(
    third_parties: ThirdParties, http: httpx.Client, kind: str
) -> None:
    third_parties.misbehave(kind, "hang")
    url = third_parties.slack_url if kind == "slack" else f"{third_parties.webhooks_url}orders"

    with pytest.raises(httpx.ReadTimeout):
        post_to_slack(http, url, timeout=0.2)

    assert answers(third_parties, kind) == [(False, "no answer")]


def test_whom_a_hanging_slack_holds_is_let_go_without_an_answer(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    third_parties.misbehave("slack", "hang")
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(post_to_slack, http, third_parties.slack_url)
        wait_until(lambda: third_parties.calls("slack"), "the call has arrived")
        third_parties.behave()

        assert isinstance(held.exception(DEADLINE_SECONDS), httpx.TransportError)


def test_a_slow_slack_keeps_the_message_at_once_and_answers_later(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    third_parties.misbehave("slack", "slow", delay_seconds=0.3)

    answer = post_to_slack(http, third_parties.slack_url)
    assert answer.text == "ok"
    assert answer.elapsed.total_seconds() >= 0.3

    third_parties.misbehave("slack", "slow", delay_seconds=60)
    with pytest.raises(httpx.ReadTimeout):
        post_to_slack(http, third_parties.slack_url, "r-2", timeout=0.2)
    assert [receipt["request_id"] for receipt in third_parties.received("slack")] == ["r-1", "r-2"]


def test_a_resetting_slack_cuts_the_connection_and_keeps_nothing(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    third_parties.misbehave("slack", "reset", times=1)
    with pytest.raises(httpx.ReadError):
        post_to_slack(http, third_parties.slack_url)

    assert answers(third_parties, "slack") == [(False, "connection reset")]
    assert post_to_slack(http, third_parties.slack_url).text == "ok"


def test_a_lost_answer_leaves_the_message_with_slack(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    third_parties.misbehave("slack", "accept_then_fail", times=1)
    with pytest.raises(httpx.ReadError):
        post_to_slack(http, third_parties.slack_url)
    post_to_slack(http, third_parties.slack_url).raise_for_status()

    assert answers(third_parties, "slack") == [(True, "200 ok, answer lost"), (True, "200 ok")]
    assert third_parties.totals("slack")["repeated"] == 1


def test_a_refusing_slack_accepts_no_connection_and_cuts_the_open_ones(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    post_to_slack(http, third_parties.slack_url, "kept alive").raise_for_status()
    third_parties.misbehave("slack", "refuse")

    with pytest.raises(httpx.TransportError):
        post_to_slack(http, third_parties.slack_url)
    for _ in range(3):
        with pytest.raises(httpx.ConnectError):
            post_to_slack(http, third_parties.slack_url)

    third_parties.behave()
    assert post_to_slack(http, third_parties.slack_url).text == "ok"


def test_the_port_of_a_refusing_slack_stays_reserved(
    third_parties: ThirdParties,
) -> None:
    third_parties.misbehave("slack", "refuse")
    port = httpx.URL(third_parties.slack_url).port
    assert port is not None

    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", port))


def test_a_new_misbehaviour_takes_the_place_of_the_old_one(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    third_parties.misbehave("slack", "refuse")
    third_parties.misbehave("slack", "status", code=500)

    assert post_to_slack(http, third_parties.slack_url).status_code == 500


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({}, "Field required"),
        ({"kind": "pigeon", "mode": "hang"}, "'slack', 'email' or 'webhook'"),
        ({"kind": "slack", "mode": "dance"}, "'status', 'ok_false'"),
        ({"kind": "email", "mode": "ok_false"}, "email knows no mode ok_false"),
        ({"kind": "slack", "mode": "status"}, "status needs code"),
        ({"kind": "slack", "mode": "status", "code": 200}, "greater than or equal to 300"),
        ({"kind": "email", "mode": "status", "code": 354}, "400 to 599"),
        ({"kind": "slack", "mode": "slow"}, "slow needs delay_seconds"),
        ({"kind": "slack", "mode": "hang", "code": 500}, "slack hang takes no code"),
        ({"kind": "slack", "mode": "hang", "stage": "RCPT"}, "slack hang takes no stage"),
        ({"kind": "slack", "mode": "hang", "times": 0}, "greater than 0"),
        ({"kind": "slack", "mode": "refuse", "times": 2}, "refuse takes no times"),
        ({"kind": "slack", "mode": "hang", "colour": "red"}, "Extra inputs"),
        ({"kind": "slack", "mode": "status", "code": 429, "retry_after": "1\r\nX: y"}, "pattern"),
    ],
)
def test_an_invalid_misbehaviour_is_refused_with_its_reason(
    third_parties: ThirdParties, body: dict[str, Any], complaint: str
) -> None:
    answer = third_parties.http.post("misbehave", json=body)

    assert answer.status_code == 422
    assert complaint in " ".join(problem["msg"] for problem in answer.json()["detail"])
    assert third_parties.http.get("misbehave").json() == {"active": []}


@pytest.mark.parametrize("query", [{"kind": "pigeon"}, {"limit": 0}, {"limit": 10_001}])
def test_an_inbox_filter_that_makes_no_sense_is_refused(
    third_parties: ThirdParties, query: dict[str, Any]
) -> None:
    assert third_parties.http.get("inbox", params=query).status_code == 422


def test_a_body_too_large_to_keep_is_refused(
    third_parties: ThirdParties, http: httpx.Client
) -> None:
    answer = http.post(third_parties.slack_url, content=b" " * 300_000)

    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("stage", "code", "failure"),
    [
        ("connect", 421, smtplib.SMTPConnectError),
        ("connect", 554, smtplib.SMTPConnectError),
        ("MAIL", 421, smtplib.SMTPSenderRefused),
        ("MAIL", 451, smtplib.SMTPSenderRefused),
        ("RCPT", 450, smtplib.SMTPRecipientsRefused),
        ("RCPT", 550, smtplib.SMTPRecipientsRefused),
        ("DATA", 451, smtplib.SMTPDataError),
        ("DATA", 550, smtplib.SMTPDataError),
    ],
)
def test_the_mail_server_refuses_at_the_stage_it_was_told_to(
    third_parties: ThirdParties, stage: str, code: int, failure: type[Exception]
) -> None:
    third_parties.misbehave("email", "status", stage=stage, code=code, body="not now", times=1)

    with pytest.raises(failure) as refusal:
        send_mail(third_parties)

    assert str(code) in str(refusal.value)
    assert "not now" in str(refusal.value)
    assert answers(third_parties, "email") == [(False, f"{code} at {stage}")]
    send_mail(third_parties)
    assert third_parties.totals("email")["distinct"] == 1


@pytest.mark.parametrize("stage", ["connect", "MAIL", "RCPT", "DATA"])
def test_the_mail_server_hangs_at_the_stage_it_was_told_to(
    third_parties: ThirdParties, stage: str
) -> None:
    third_parties.misbehave("email", "hang", stage=stage)

    with pytest.raises(smtplib.SMTPServerDisconnected, match="timed out"):
        send_mail(third_parties, timeout_seconds=0.2)

    assert answers(third_parties, "email") == [(False, f"no answer at {stage}")]


@pytest.mark.parametrize("stage", ["connect", "MAIL", "RCPT", "DATA"])
def test_the_mail_server_drops_the_connection_at_the_stage_it_was_told_to(
    third_parties: ThirdParties, stage: str
) -> None:
    third_parties.misbehave("email", "reset", stage=stage, times=1)

    with pytest.raises((smtplib.SMTPServerDisconnected, ConnectionResetError)):
        send_mail(third_parties)

    assert answers(third_parties, "email") == [(False, f"connection reset at {stage}")]
    send_mail(third_parties)
    assert third_parties.totals("email")["distinct"] == 1


@pytest.mark.parametrize("stage", ["connect", "MAIL", "RCPT", "DATA"])
def test_a_slow_mail_server_takes_its_time_and_delivers(
    third_parties: ThirdParties, stage: str
) -> None:
    third_parties.misbehave("email", "slow", stage=stage, delay_seconds=0.2, times=1)

    began = time.monotonic()
    send_mail(third_parties)

    assert time.monotonic() - began >= 0.2
    assert third_parties.totals("email")["received"] == 1


def test_a_mail_whose_answer_is_lost_stays_in_the_mailbox(third_parties: ThirdParties) -> None:
    third_parties.misbehave("email", "accept_then_fail", times=1)

    with pytest.raises((smtplib.SMTPServerDisconnected, ConnectionResetError)):
        send_mail(third_parties)
    send_mail(third_parties)

    assert answers(third_parties, "email") == [(True, "250 OK, answer lost"), (True, "250 OK")]
    assert third_parties.totals("email")["repeated"] == 1


def test_a_refusing_mail_server_accepts_no_connection(third_parties: ThirdParties) -> None:
    third_parties.misbehave("email", "refuse")
    with pytest.raises(ConnectionRefusedError):
        send_mail(third_parties)

    third_parties.behave()
    send_mail(third_parties)
    assert third_parties.totals("email")["received"] == 1


def test_a_mail_of_raw_bytes_is_kept_and_shown(third_parties: ThirdParties) -> None:
    raw = b"Subject: caf\xe9\r\nContent-Type: text/plain; charset=nonsense\r\n\r\n\xff\xfe\r\n"
    with smtplib.SMTP(
        third_parties.smtp_host, third_parties.smtp_port, local_hostname="localhost"
    ) as smtp:
        smtp.sendmail("a@example.com", ["b@example.com"], raw)

    (receipt,) = third_parties.received("email")
    assert receipt["request_id"] is None
    assert receipt["subject"] == "caf\ufffd"
    assert receipt["body"].strip() == "\ufffd\ufffd"


def test_the_page_carries_all_it_needs(third_parties: ThirdParties) -> None:
    page = third_parties.http.get("")

    assert page.headers["content-type"].startswith("text/html")
    assert "://" not in page.text
    assert "innerHTML" not in page.text


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_ends_within_a_second_though_callers_hang(asked: signal.Signals) -> None:
    command = [sys.executable, "-m", "sandbox.third_parties"]
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process,
        leashed(process),
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        parties = ThirdParties(read_addresses(process.stdout.readline()))
        with parties.http, ThreadPoolExecutor(2) as pool, httpx.Client(trust_env=False) as http:
            assert parties.http.get("livez").json()["status"] == "ok"
            parties.misbehave("slack", "hang")
            parties.misbehave("email", "hang")
            held: list[Future[Any]] = [
                pool.submit(post_to_slack, http, parties.slack_url),
                pool.submit(send_mail, parties),
            ]
            wait_until(lambda: parties.calls("slack") and parties.calls("email"), "both calls hang")
            process.send_signal(asked)

            assert process.wait(1) == 0
            assert process.stderr.read() == ""
            assert all(call.exception(DEADLINE_SECONDS) for call in held)


def test_a_port_that_is_taken_is_named_at_the_start(third_parties: ThirdParties) -> None:
    started = subprocess.run(
        [
            sys.executable,
            "-m",
            "sandbox.third_parties",
            "--smtp-port",
            str(third_parties.smtp_port),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )

    assert started.returncode == 1
    assert f"127.0.0.1:{third_parties.smtp_port}" in started.stderr
    assert "Traceback" not in started.stderr
