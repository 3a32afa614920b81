"""The Slack message composed for a request, and the verdict on each response."""

import re
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger
from pydantic import SecretStr, ValidationError

from assistance.verdict import Done, Later, Never, Unknown, Verdict
from consumers.channels.http import read_answer, retry_after_seconds
from consumers.channels.slack import SlackSettings, escape, judge, payload
from tests.support.outbound import NOW, outbound_message

SECRET = "services/T000/B000/hush"


def ask(status: int, body: bytes | str, *, by_webhook: bool = True, **headers: str) -> Verdict:
    raw = body.encode() if isinstance(body, str) else body
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = read_answer(status, httpx.Headers(named), raw, secrets=[SECRET], now=NOW)
    return judge(answer, by_webhook=by_webhook)


@given(st.text(max_size=500))
def test_no_text_holds_anything_that_slack_would_act_on(text: str) -> None:
    escaped = escape(text)
    assert not re.search(r"[<>]", escaped)
    assert not re.search(r"&(?!(amp|lt|gt);)", escaped)
    assert not re.search(r"(?<!\w)@(channel|here|everyone|group)\b", escaped, re.IGNORECASE)


@given(st.text(max_size=500))
def test_people_read_in_slack_what_was_written(text: str) -> None:
    shown = escape(text).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert shown.replace("@\u2060", "@") == text.replace("@\u2060", "@")


@pytest.mark.parametrize(
    "shout", ["<!here>", "<!channel|all>", "<@U012AB3CD>", "<!subteam^S1>", "@channel", "@Everyone"]
)
def test_a_mention_in_a_description_notifies_no_one(shout: str) -> None:
    sent = payload(outbound_message(f"please {shout} look"))
    assert shout not in sent["text"]
    assert (sent["link_names"], sent["parse"], sent["mrkdwn"]) == (False, "none", False)


def test_an_address_stays_as_it_was_written() -> None:
    assert escape("write to bob@here.example or eve@channel.example") == (
        "write to bob@here.example or eve@channel.example"
    )


def test_a_text_beyond_all_reason_is_cut() -> None:
    assert len(escape("x" * 100_000)) == 3000


def test_a_repeat_says_that_it_may_be_one() -> None:
    assert "may be a repeat" in payload(outbound_message(may_be_repeat=True))["text"]
    assert "may be a repeat" not in payload(outbound_message())["text"]


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, "ok", Done),
        (200, '{"ok":true}', Done),
        (200, '{"ok":false,"error":"ratelimited"}', Later),
        (200, '{"ok":false,"error":"internal_error"}', Later),
        (200, '{"ok":false,"error":"a_word_of_next_year"}', Later),
        (200, '{"ok":false}', Later),
        (200, '{"ok":false,"error":"invalid_auth"}', Later),
        (200, '{"ok":false,"error":"token_revoked"}', Later),
        (200, '{"ok":false,"error":"channel_not_found"}', Later),
        (200, '{"ok":false,"error":"no_service"}', Later),
        (200, '{"ok":false,"error":"msg_too_long"}', Never),
        (200, '{"ok":false,"error":"no_text"}', Never),
        (200, "<html>log in to the hotel's network</html>", Unknown),
        (200, "", Done),
        (204, "", Done),
        (200, '{"success":true}', Done),
        (302, "", Later),
        (400, "invalid_payload", Never),
        (400, "", Never),
        (400, "invalid_token", Later),
        (401, "", Later),
        (403, "action_prohibited", Later),
        (403, "invalid_token", Later),
        (404, "no_service", Later),
        (404, "", Later),
        (410, "channel_is_archived", Later),
        (410, "", Later),
        (413, "", Never),
        (408, "", Later),
        (425, "", Later),
        (429, "", Later),
        (500, "rollup_error", Later),
        (503, "", Later),
    ],
)
def test_every_answer_has_one_meaning(status: int, body: str, expected: type) -> None:
    assert type(ask(status, body)) is expected


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (404, "no_service", "no_service"),
        (404, "<html>her name</html>", "404"),
        (410, "", "410"),
        (200, '{"ok":false,"error":"token_revoked"}', "token_revoked"),
    ],
)
def test_a_webhook_that_is_no_good_is_named_in_the_log(status: int, body: str, code: str) -> None:
    logged: list[str] = []
    sink = logger.add(
        lambda line: logged.append(str(line)), level="ERROR", format="{message} {extra}"
    )
    try:
        verdict = ask(status, body)
    finally:
        logger.remove(sink)
    assert verdict.code == code
    [line] = logged
    assert isinstance(verdict, Later)
    assert verdict.about_us
    assert line == f"slack.misconfigured {{'code': '{code}'}}\n"


def test_a_code_is_one_of_slacks_own_words() -> None:
    verdict = ask(200, '{"ok":false,"error":"What she wrote to us"}')
    assert verdict.code == "ok_false"


def test_the_wait_that_slack_asks_for_is_kept() -> None:
    assert ask(429, "", Retry_After="30") == Later("429", "", 30.0)
    assert ask(503, "", Retry_After="Mon, 23 Nov 2026 12:01:30 GMT") == Later("503", "", 90.0)
    assert ask(200, '{"ok":false,"error":"ratelimited"}', Retry_After="7") == Later(
        "ratelimited", '{"ok":false,"error":"ratelimited"}', 7.0
    )


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("soon", None),
        ("-1", None),
        ("1.5", None),
        ("", None),
        ("0", 0.0),
        ("00000000000000000007", 7.0),
        ("99999999999", 1e9),
        ("9" * 5000, 1e9),
        ("120", 120.0),
        ("Mon, 23 Nov 2026 11:00:00 GMT", 0.0),
        ("Mon, 99 Nov 2026 11:00:00 GMT", None),
        ("Mon, 23 Nov 2026 12:00:00 +99999999999", None),
    ],
)
def test_a_senseless_wait_counts_as_none(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(value, NOW) == seconds


@given(st.integers(100, 999), st.binary(max_size=200), st.text(max_size=40))
def test_no_answer_whatsoever_is_without_a_meaning(status: int, body: bytes, wait: str) -> None:
    answer = read_answer(status, {"Retry-After": wait}, body, secrets=[SECRET], now=NOW)
    verdict = judge(answer, by_webhook=True)
    assert isinstance(verdict, Done | Later | Never | Unknown)


@given(st.recursive(st.none() | st.booleans() | st.text(max_size=20), st.lists, max_leaves=5))
def test_no_json_whatsoever_is_without_a_meaning(said: Any) -> None:
    ask(200, orjson.dumps({"ok": said, "error": said}, option=orjson.OPT_PASSTHROUGH_DATETIME))


def test_the_secret_is_not_in_what_is_kept_of_an_answer() -> None:
    verdict = ask(404, f"nothing at /{SECRET} here")
    assert SECRET not in verdict.excerpt
    assert verdict.excerpt == "nothing at /… here"


def test_an_answer_is_kept_short_and_on_one_line() -> None:
    verdict = ask(500, "oh\nno " * 500)
    assert len(verdict.excerpt) == 200
    assert "\n" not in verdict.excerpt


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.slack.com/services/hush",
        "ftp://x/hush",
        "https://",
        "::",
        "http://hooks.slack.com/services/hush",
    ],
)
def test_a_webhook_that_is_no_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValidationError) as refused:
        SlackSettings(webhook_url=SecretStr(url))
    assert "https://" in str(refused.value)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "WEBHOOK_URL is missing, or TOKEN and CHANNEL"),
        ({"token": "xoxb-hush"}, "TOKEN and CHANNEL go together"),
        ({"channel": "C012"}, "TOKEN and CHANNEL go together"),
        (
            {"token": "xoxb-hush", "channel": "C012", "webhook_url": "https://x.example/hush"},
            "give one of them",
        ),
        ({"token": "xoxb hush\n", "channel": "C012"}, "must be a token"),
        ({"token": "xoxb-hush", "channel": "C012", "api_url": "http://x.example/"}, "https://"),
    ],
)
def test_slack_is_reached_in_exactly_one_way(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named) as refused:
        SlackSettings(**given)
    assert "hush" not in str(refused.value)


@given(st.text(max_size=300))
def test_no_description_imitates_the_frame_around_it(description: str) -> None:
    text = payload(outbound_message(description, topic="sales"))["text"]
    first, *quotation, last = text.splitlines()
    assert first == "New request: sales"
    assert all(line.startswith("&gt; ") for line in quotation)
    assert last == f"Request {outbound_message().request_id}"


def test_an_empty_answer_of_the_api_is_unknown_because_its_text_decides() -> None:
    assert isinstance(ask(200, "", by_webhook=False), Unknown)
    assert isinstance(ask(200, "", by_webhook=True), Done)
