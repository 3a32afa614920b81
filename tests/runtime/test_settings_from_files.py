"""`NAME_FILE` names a file that holds the value of `NAME`: how secrets reach a container."""

from pathlib import Path

import pytest

from runtime.settings import MongoSettings, RabbitSettings, SettingsTable, read_settings

URL = "mongodb://relay:a-password@mongodb/?replicaSet=rs0"


class Both(MongoSettings, RabbitSettings):
    """A table with two secrets."""


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MONGODB_URL", "MONGODB_DATABASE", "RABBITMQ_URL"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)


def problems(table: type[SettingsTable]) -> list[str]:
    read = read_settings(table)
    assert isinstance(read, list)
    return read


def test_a_value_is_read_from_the_named_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "url").write_text(f"{URL}\n")
    monkeypatch.setenv("MONGODB_URL_FILE", str(tmp_path / "url"))

    settings = read_settings(MongoSettings)

    assert isinstance(settings, MongoSettings)
    assert settings.mongodb_url.get_secret_value() == URL


def test_the_file_may_be_named_in_the_dotenv_file(tmp_path: Path) -> None:
    (tmp_path / "url").write_text(URL)
    (tmp_path / ".env").write_text(f"MONGODB_URL_FILE={tmp_path / 'url'}\n")

    settings = read_settings(MongoSettings)

    assert isinstance(settings, MongoSettings)
    assert settings.mongodb_url.get_secret_value() == URL


def test_every_wrong_file_is_named_once_and_beside_all_other_problems(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty").write_text("\n")
    monkeypatch.setenv("MONGODB_URL_FILE", str(tmp_path / "missing"))
    monkeypatch.setenv("RABBITMQ_URL_FILE", str(tmp_path / "empty"))
    monkeypatch.setenv("LOG_LEVEL", "loud")

    found = problems(Both)
    monkeypatch.delenv("LOG_LEVEL")

    assert [line for line in found if line.startswith("MONGODB_URL")] == [
        f"MONGODB_URL_FILE: {tmp_path / 'missing'} cannot be read: No such file or directory"
    ]
    assert [line for line in found if line.startswith("RABBITMQ_URL")] == [
        f"RABBITMQ_URL_FILE: {tmp_path / 'empty'} is empty"
    ]
    assert any(line.startswith("LOG_LEVEL") for line in found)


def test_a_value_that_is_given_twice_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "url").write_text(URL)
    monkeypatch.setenv("MONGODB_URL_FILE", str(tmp_path / "url"))
    monkeypatch.setenv("MONGODB_URL", URL)

    assert problems(MongoSettings) == [
        "MONGODB_URL and MONGODB_URL_FILE are both set: remove one of them"
    ]


def test_a_wrong_value_in_a_file_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "url").write_text("postgres://a-password@host")
    monkeypatch.setenv("MONGODB_URL_FILE", str(tmp_path / "url"))

    (problem,) = problems(MongoSettings)

    assert "a-password" not in problem
    assert problem.startswith("MONGODB_URL:")
