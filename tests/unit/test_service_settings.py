"""With wrong settings the API does not start: it lists all that is wrong, without secrets."""

import pytest

from tests.conftest import RunProcess

GOOD_KEY = "0123456789abcdef"


def refusal(run_process: RunProcess, **environment: str) -> str:
    process = run_process("service", "run", environment=environment)
    assert process.wait_exit() == 78
    return process.output()


def test_every_wrong_setting_is_listed_at_once(run_process: RunProcess) -> None:
    output = refusal(
        run_process,
        MONGODB_URL="postgres://user:hunter2@db/",
        API_KEYS="short-one,change-me-before-use",
        API_PORT="eighty",
        API_BODY_LIMIT_BYTES="1",
        API_TRUSTED_PROXIES="127.0.0.1,proxy",
        DESTINATIONS='{"slack": "slack"}',
        ROUTES='{"sales": ["slak"], "pricing": []}',
        LOG_LEVEL="loud",
    )
    assert output.startswith("service does not start: 8 settings are wrong\n")
    for expected in (
        "MONGODB_URL: must start with mongodb://",
        "API_KEYS.key-1: has 9 characters",
        "API_KEYS.key-2: is a placeholder",
        "API_PORT: Input should be a valid integer",
        "API_TRUSTED_PROXIES: names no address or network: 'proxy'",
        "API_BODY_LIMIT_BYTES: Input should be greater than or equal to 2048",
        "ROUTES: topic 'sales' goes to 'slak', which is not a destination; known: slack",
        "topic 'pricing' has no destination",
        "LOG_LEVEL: ",
    ):
        assert expected in output
    assert "hunter2" not in output
    assert "short-one" not in output


@pytest.mark.parametrize("keys", ["short-one", "[]"])
def test_one_wrong_key_is_one_problem(run_process: RunProcess, keys: str) -> None:
    output = refusal(run_process, MONGODB_URL="mongodb://127.0.0.1/", API_KEYS=keys)
    assert output.startswith("service does not start: 1 setting is wrong\n")
    assert len(output.splitlines()) == 2


def test_what_is_missing_is_named_with_its_meaning(run_process: RunProcess) -> None:
    output = refusal(run_process)
    assert "MONGODB_URL is missing (URL of the replica set" in output
    assert "API_KEYS is missing (API keys of the callers" in output


@pytest.mark.parametrize("keys", [" , ", "[]", "[1", '["' + GOOD_KEY + '", 5]'])
def test_keys_that_are_none_are_refused(run_process: RunProcess, keys: str) -> None:
    output = refusal(run_process, MONGODB_URL="mongodb://127.0.0.1/", API_KEYS=keys)
    assert "API_KEYS" in output
    assert GOOD_KEY not in output


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("12345678", "API_KEYS.key-1: has 8 characters; at least 16 are needed"),
        ("ab" * 20, "API_KEYS.key-1: has fewer than 6 different characters"),
        ('{"bot": "12345678"}', "API_KEYS.bot: has 8 characters"),
    ],
)
def test_a_weak_key_is_refused_with_the_setting_that_allows_it(
    run_process: RunProcess, keys: str, problem: str
) -> None:
    text = refusal(run_process, MONGODB_URL="mongodb://127.0.0.1/", API_KEYS=keys)
    assert problem in text
    assert "API_ALLOW_WEAK_KEYS=true" in text
    assert "12345678" not in text


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ('[""]', "API_KEYS.key-1: is empty"),
        ('{"bot": ""}', "API_KEYS.bot: is empty"),
        ('[" 12345678"]', "API_KEYS.key-1: is empty, or has a character that a header"),
        ('["1234\\n5678"]', "API_KEYS.key-1: is empty, or has a character that a header"),
        ("change-me", "API_KEYS.key-1: is a placeholder"),
        ('{"a": "12345678", "b": "12345678"}', "API_KEYS: gives one key two names"),
        ('{"a": "12345678", "a": "87654321"}', "API_KEYS: uses a name twice"),
        ('{"a b": "12345678"}', "API_KEYS.a b"),
        ("{}", "API_KEYS: names no key"),
    ],
)
def test_some_keys_are_refused_although_weak_ones_are_allowed(
    run_process: RunProcess, keys: str, problem: str
) -> None:
    text = refusal(
        run_process,
        MONGODB_URL="mongodb://127.0.0.1/",
        API_KEYS=keys,
        API_ALLOW_WEAK_KEYS="true",
    )
    assert problem in text
    assert "12345678" not in text
