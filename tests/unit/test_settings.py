"""Settings: documented as they are, checked at boot, every problem at once, no secret shown."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.exit_codes import ExitCode
from runtime.settings import (
    MongoSettings,
    RabbitSettings,
    SettingsTable,
    read_settings,
    split_amqp_urls,
    variable_name,
)
from tests.support.processes import bare_environment
from tools.settings_pages import (
    ENV_EXAMPLE,
    SETTINGS_PAGE,
    all_settings,
    demanded_by_production,
    env_example,
    process_tables,
    settings_of,
    settings_page,
)

LINE = re.compile(r"^(#?)([A-Z][A-Z0-9_]*)=(.*)$", re.MULTILINE)

#: What a test may fill the required settings in with.
GOOD_VALUES = {
    "MONGODB_URL": "mongodb://127.0.0.1/?replicaSet=rs0",
    "RABBITMQ_URL": "amqp://127.0.0.1/",
    "RABBITMQ_MANAGEMENT_URL": "http://127.0.0.1:15672",
    "API_KEYS": "9c1185a5c5e9fc54612808977ee8f548",
    "SLACK_WEBHOOK_URL": "https://hooks.slack.com/services/T/B/X",
    "EMAIL_SMTP_HOST": "127.0.0.1",
    "EMAIL_SENDER": "assistance@example.org",
    "EMAIL_RECIPIENTS": "team@example.org",
}

SECRET = "hunter2-and-more"

#: Three mistakes of each process, and the names that its refusal must list.
MISTAKES: dict[str, tuple[tuple[str, ...], dict[str, str], set[str]]] = {
    "service": (
        ("service", "run"),
        {
            "MONGODB_URL": f"postgres://{SECRET}",
            "API_KEYS": f"{GOOD_VALUES['API_KEYS']},{SECRET[:8]}",
            "API_PORT": "70000",
        },
        {"MONGODB_URL", "API_KEYS.key-2", "API_PORT"},
    ),
    "relay": (
        ("relay", "run"),
        {"MONGODB_URL": f"mysql://{SECRET}", "RELAY_WINDOW_MESSAGES": "0"},
        {"MONGODB_URL", "RABBITMQ_URL", "RELAY_WINDOW_MESSAGES"},
    ),
    "worker-slack": (
        ("consumers", "run", "slack"),
        {
            "MONGODB_URL": f"mongodb+{SECRET}",
            "RABBITMQ_URL": "amqp://127.0.0.1/",
            "RETRY_DELAYS_SECONDS": "soon",
            "SLACK_WEBHOOK_URL": f"ftp://{SECRET}",
        },
        {"MONGODB_URL", "RETRY_DELAYS_SECONDS", "SLACK_WEBHOOK_URL"},
    ),
    "worker-email": (
        ("consumers", "run", "email"),
        {**GOOD_VALUES, "EMAIL_SENDER": f"{SECRET}@", "EMAIL_RECIPIENTS": "", "CALL_TRIES": "9"},
        {"EMAIL_SENDER", "EMAIL_RECIPIENTS", "CALL_TRIES"},
    ),
    "dead-letters": (
        ("consumers", "run", "dead-letters"),
        {"RABBITMQ_URL": f"http://{SECRET}", "LOG_LEVEL": "loud"},
        {"MONGODB_URL", "RABBITMQ_URL", "LOG_LEVEL"},
    ),
    "reconciler": (
        ("consumers", "run", "reconciler"),
        {"RECONCILER_INTERVAL_SECONDS": "0", "LOG_FORMAT": SECRET},
        {"MONGODB_URL", "RECONCILER_INTERVAL_SECONDS", "LOG_FORMAT"},
    ),
    "topology": (
        ("consumers", "topology"),
        {"DESTINATIONS": f"[{SECRET}", "DELIVERY_LIMIT": "none"},
        {"RABBITMQ_URL", "DESTINATIONS", "DELIVERY_LIMIT"},
    ),
}


def test_the_example_environment_is_as_the_tables_are() -> None:
    assert ENV_EXAMPLE.read_text() == env_example(), "run: python -m tools.settings_pages"


def test_the_settings_page_is_as_the_tables_are() -> None:
    assert SETTINGS_PAGE.read_text() == settings_page(), "run: python -m tools.settings_pages"


def test_the_example_names_every_setting_once() -> None:
    names = [name for _, name, _ in LINE.findall(ENV_EXAMPLE.read_text())]

    assert sorted(names) == sorted(all_settings().keys() | set(demanded_by_production()))


def test_the_example_leaves_what_is_required_open_and_holds_no_secret() -> None:
    lines = LINE.findall(ENV_EXAMPLE.read_text())
    required = {
        name for name, variants in all_settings().items() if any(one.required for one in variants)
    }

    open_lines = {name for commented, name, _ in lines if not commented}
    assert open_lines == required | set(demanded_by_production())
    assert not [name for commented, name, value in lines if value and not commented]


@pytest.mark.parametrize("process", process_tables())
def test_the_defaults_that_the_example_shows_are_those_of_the_code(process: str) -> None:
    shown = {
        name: value
        for commented, name, value in LINE.findall(ENV_EXAMPLE.read_text())
        # it has a default for each process that reads it, and the example one line
        if commented and len(all_settings()[name]) == 1
    }
    for table in process_tables()[process]:
        with _environment(GOOD_VALUES):
            by_default = read_settings(table)
        with _environment(shown | GOOD_VALUES):
            as_shown = read_settings(table)
        assert isinstance(by_default, SettingsTable)
        assert as_shown == by_default


@pytest.mark.parametrize("process", process_tables())
def test_every_setting_says_what_it_means(process: str) -> None:
    settings = settings_of(process_tables()[process]).values()

    assert not [setting.name for setting in settings if not setting.meaning]


@pytest.mark.parametrize("process", process_tables())
def test_no_secret_has_a_default(process: str) -> None:
    settings = settings_of(process_tables()[process])
    secret_names = {
        variable_name(table, name)
        for table in process_tables()[process]
        for name, field in table.model_fields.items()
        if "SecretStr" in str(field.annotation)
    }

    assert secret_names or process == "secrets"  # which makes them
    assert not [name for name in secret_names if settings[name].default]


@pytest.mark.parametrize("process", MISTAKES)
def test_a_process_names_all_its_wrong_settings_and_no_value_and_does_not_start(
    process: str, tmp_path: Path
) -> None:
    arguments, environment, wrong = MISTAKES[process]

    exit_code, output = _run(arguments, environment, tmp_path)

    title, *problems = output.splitlines()
    assert exit_code == ExitCode.CONFIGURATION
    assert title == f"{process} does not start: {len(wrong)} settings are wrong"
    assert {re.split(r"[: ]", problem.strip(), maxsplit=1)[0] for problem in problems} == wrong
    assert len(problems) == len(wrong)
    assert SECRET[:8] not in output


def test_a_setting_may_stand_in_a_file_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("RELAY_WINDOW_MESSAGES=0\nRABBITMQ_URL=amqp://127.0.0.1/\n")

    exit_code, output = _run(
        ("relay", "run"), {"MONGODB_URL": GOOD_VALUES["MONGODB_URL"]}, tmp_path
    )

    assert exit_code == ExitCode.CONFIGURATION
    assert output.startswith("relay does not start: 1 setting is wrong\n  RELAY_WINDOW_MESSAGES:")


@pytest.mark.parametrize("password", ["pa/ssw0rd", "12/ssw0rd", "pa?ssw0rd"])
@pytest.mark.parametrize(
    ("table", "variable", "url"),
    [
        (MongoSettings, "MONGODB_URL", "mongodb://user:{}@db.example.org/"),
        (MongoSettings, "MONGODB_URL", "mongodb+srv://user:{}@db.example.org/"),
        (RabbitSettings, "RABBITMQ_URL", "amqp://user:{}@mq.example.org/"),
    ],
)
def test_a_password_that_spoils_its_url_is_a_wrong_setting_and_is_not_repeated(
    table: type[SettingsTable], variable: str, url: str, password: str
) -> None:
    with _environment({variable: url.format(password)}):
        problems = read_settings(table)

    (problem,) = problems if isinstance(problems, list) else [""]
    assert problem.startswith(f"{variable}: is not a valid ")
    assert problem.endswith(" URL; escape @ : / % in the password")
    assert "ssw0rd" not in problem


@pytest.mark.parametrize(
    ("table", "variable", "url"),
    [
        (MongoSettings, "MONGODB_URL", "mongodb://a:1,b:2/?replicaSet=rs0&unknownOption=1"),
        (MongoSettings, "MONGODB_URL", "mongodb://user:p%40ss%2F@a/admin?authSource=admin"),
        # without asking DNS, where this name cannot be
        (MongoSettings, "MONGODB_URL", "mongodb+srv://user:p%40ss@db.example.invalid/?w=majority"),
        (RabbitSettings, "RABBITMQ_URL", "amqps://user:p%40ss%2F@a:5671/%2Fdemo"),
        (RabbitSettings, "RABBITMQ_URL", "amqp://[::1]:5672"),
    ],
)
def test_a_url_that_a_driver_understands_is_taken(
    table: type[SettingsTable], variable: str, url: str
) -> None:
    with _environment({variable: url}):
        assert isinstance(read_settings(table), SettingsTable)


def _run(
    arguments: tuple[str, ...], environment: Mapping[str, str], directory: Path
) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-m", *arguments],
        env=bare_environment() | dict(environment),
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
        check=False,
    )
    return ended.returncode, ended.stdout


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Nothing but these variables, whatever the tests' own environment holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("/")  # a checkout may hold a `.env`
        for name in set(os.environ) & {*all_settings()}:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


NODES = "amqp://u:a,b@one/v,amqps://u:a,b@two:5671/v , amqp://u:a,b@three/v"


def test_several_nodes_of_a_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RABBITMQ_URL", NODES)
    settings = read_settings(RabbitSettings)
    assert not isinstance(settings, list)
    assert split_amqp_urls(settings.rabbitmq_url.get_secret_value()) == [
        "amqp://u:a,b@one/v",
        "amqps://u:a,b@two:5671/v",
        "amqp://u:a,b@three/v",
    ]


def test_nodes_with_different_virtual_hosts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RABBITMQ_URL", "amqp://u:secret@one/v,amqp://u:secret@two/w")
    [problem] = read_settings(RabbitSettings)
    assert problem == "RABBITMQ_URL: its URLs must all name the same virtual host"
