"""Options in the servers' URLs that weaken what the product promises are refused at boot."""

from pathlib import Path
from urllib.parse import quote

import pytest

from runtime.settings import MongoSettings, RabbitSettings, SettingsTable, read_settings

MISSING = "/nowhere/ca.pem"


def problems_of(table: type[SettingsTable], monkeypatch: pytest.MonkeyPatch, **given: str) -> str:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    read = read_settings(table)
    return "\n".join(read) if isinstance(read, list) else ""


@pytest.mark.parametrize(
    "option", ["tlsInsecure", "tlsAllowInvalidCertificates", "tlsAllowInvalidHostnames"]
)
@pytest.mark.parametrize("scheme", ["mongodb", "mongodb+srv"])
def test_unchecked_certificates_are_refused_unless_a_setting_allows_them(
    monkeypatch: pytest.MonkeyPatch, scheme: str, option: str
) -> None:
    url = f"{scheme}://db.example.org/?tls=true&{option}=true"
    problem = problems_of(MongoSettings, monkeypatch, MONGODB_URL=url)
    assert problem.startswith(f"MONGODB_URL: {option} disables the check of MongoDB's certificate")
    harmless = url.replace("=true", "=false").replace("tls=false", "tls=true")
    assert not problems_of(MongoSettings, monkeypatch, MONGODB_URL=harmless)
    assert not problems_of(
        MongoSettings, monkeypatch, MONGODB_URL=url, MONGODB_ALLOW_INSECURE_TLS="true"
    )


@pytest.mark.parametrize("option", ["tlsCAFile", "tlsCertificateKeyFile"])
def test_a_certificate_file_that_cannot_be_used_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    text = tmp_path / "text.pem"
    text.write_text("not a certificate")
    for path, reason in (
        (MISSING, "No such file or directory"),
        (str(tmp_path), "cannot be read"),
        (str(text), "PEM format"),
    ):
        url = f"mongodb://db.example.org/?tls=true&{option}={quote(path, safe='')}"
        problem = problems_of(MongoSettings, monkeypatch, MONGODB_URL=url)
        assert problem.startswith(f"MONGODB_URL: {option}: {path} ")
        assert reason in problem
        assert len(problem.splitlines()) == 1


@pytest.mark.parametrize(
    "option",
    [
        *("readPreference=secondary", "readpreference=primaryPreferred", "readPreference=nearest"),
        "journal=false",
    ],
)
def test_options_that_weaken_reads_or_writes_are_refused(
    monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    url = f"mongodb://db.example.org/?replicaSet=rs0&{option}"
    problem = problems_of(MongoSettings, monkeypatch, MONGODB_URL=url)
    assert problem.startswith(f"MONGODB_URL: {option.partition('=')[0]} must be ")


def test_harmless_options_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in (
        *("", "?", "?readPreference=primary&journal=true", "?replicaSet=rs0&authSource=admin"),
        "?tls=true&tlsInsecure=false",
    ):
        url = f"mongodb://db.example.org/{options}"
        assert not problems_of(MongoSettings, monkeypatch, MONGODB_URL=url)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (f"{{'cafile': '{MISSING}'}}", f"cafile: {MISSING} cannot be read"),
        (f"{{'ca_certs': '{MISSING}'}}", f"ca_certs: {MISSING} cannot be read"),
        (f"{{'certfile': '{MISSING}'}}", f"certfile: {MISSING} cannot be read"),
        ("{'protocol': 2}", "ssl_options must not choose a protocol"),
        ("verify", "ssl_options is not a Python dictionary"),
        ("5", "ssl_options is not a Python dictionary"),
    ],
)
def test_tls_options_of_rabbitmq_are_checked_too(
    monkeypatch: pytest.MonkeyPatch, options: str, problem: str
) -> None:
    url = f"amqps://broker.example.org/?ssl_options={quote(options)}"
    assert problem in problems_of(RabbitSettings, monkeypatch, RABBITMQ_URL=url)
