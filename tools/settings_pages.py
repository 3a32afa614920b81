"""
Writes `.env.example` and `docs/settings.md` from the settings tables and compose.yml:

    python -m tools.settings_pages
"""

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from assistance.routing import DEFAULT_DESTINATIONS
from consumers.channels import find_channel, settings_table
from consumers.settings import (
    DeadLetterSettings,
    ReconcilerSettings,
    WorkerSettings,
    destination_table,
)
from installation.settings import BrokerSettings, DatabaseSettings, SecretsSettings
from relay.settings import RelaySettings
from runtime.settings import SettingsTable, variable_name
from service.settings import ServiceSettings

ROOT = Path(__file__).parent.parent
ENV_EXAMPLE = ROOT / ".env.example"
SETTINGS_PAGE = ROOT / "docs" / "settings.md"
COMPOSE = ROOT / "compose.yml"
PRODUCTION = ROOT / "compose.production.yml"

Tables = tuple[type[SettingsTable], ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """default: as it would stand in `.env`, empty where there is none."""

    name: str
    default: str
    required: bool
    meaning: str


def process_tables() -> dict[str, Tables]:
    """Each process and step, by its name in compose.yml, and the tables that it reads."""
    workers: dict[str, Tables] = {
        destination: (
            WorkerSettings,
            settings_table(find_channel(channel), destination),
            destination_table(destination),
        )
        for destination, channel in yaml.safe_load(DEFAULT_DESTINATIONS).items()
    }
    return {
        "service": (ServiceSettings,),
        "relay": (RelaySettings,),
        **workers,
        "dead-letters": (DeadLetterSettings,),
        "reconciler": (ReconcilerSettings,),
        "secrets": (SecretsSettings,),
        "mongodb-installation": (DatabaseSettings,),
        "rabbitmq-installation": (BrokerSettings,),
    }


def settings_of(tables: Tables) -> dict[str, Setting]:
    settings = (
        _setting(variable_name(table, name), field)
        for table in tables
        for name, field in table.model_fields.items()
    )
    return {setting.name: setting for setting in settings}


@cache
def all_settings() -> dict[str, dict[Setting, list[str]]]:
    """Each setting by its name: as its tables have it, which may differ, and who reads it so."""
    found: dict[str, dict[Setting, list[str]]] = {}
    for process, tables in process_tables().items():
        for name, setting in settings_of(tables).items():
            found.setdefault(name, {}).setdefault(setting, []).append(process)
    return found


def demanded_by_production() -> list[str]:
    """The secrets that compose.production.yml has to be given, beside the processes' settings."""
    secrets = yaml.safe_load(PRODUCTION.read_text())["services"]["secrets"]
    given = [name for name, value in secrets["environment"].items() if value is None]
    return [name for name in given if name not in all_settings()]


def fixed_by_compose() -> set[str]:
    """Settings that compose.yml never takes from `.env`."""
    text = COMPOSE.read_text()
    environments: list[Mapping[str, Any]] = [
        service.get("environment", {}) for service in yaml.safe_load(text)["services"].values()
    ]
    given = {
        name.removesuffix("_FILE")
        for entries in environments
        for name, value in entries.items()
        if value is not None
    }
    return {name for name in given if f"${{{name}:" not in text}


def env_example() -> str:
    return "\n".join(_env_lines()) + "\n"


def _env_lines() -> Iterator[str]:
    settings, fixed = all_settings(), fixed_by_compose()
    yield "# compose.yml needs nothing of this. Copy the file to .env, which git ignores, to change"
    yield "# a setting there, to provide what compose.production.yml demands, or for processes that"
    yield "# are started in this directory: they read .env, too. A line that is commented out shows"
    yield "# the default; docs/settings.md says which process reads what."
    yield ""
    yield "# Demanded by compose.production.yml, here or as files in PROVIDED_SECRETS_FOLDER:"
    yield "# openssl rand -hex 24; for the replica set's key openssl rand -hex 64"
    yield from (f"{name}=" for name in demanded_by_production())
    for name, variants in settings.items():
        yield ""
        for setting, processes in variants.items():
            yield f"# {setting.meaning}" + _told_apart(setting, processes, variants)
        if name in fixed:
            yield "# compose.yml has its own"
        # of several defaults the last is shown; the lines above tell them apart
        if setting.required:
            yield "# required"
            yield f"{name}="
        else:
            yield f"#{name}={setting.default}"


def _told_apart(setting: Setting, processes: list[str], variants: Sized) -> str:
    return f" ({', '.join(processes)}: {setting.default})" if len(variants) > 1 else ""


def settings_page() -> str:
    settings = all_settings()
    fixed = ", ".join(f"`{name}`" for name in sorted(fixed_by_compose() & settings.keys()))
    rows = "\n".join(_row(name, variants) for name, variants in settings.items())
    return PAGE.format(rows=rows, fixed=fixed)


def _row(name: str, variants: Mapping[Setting, list[str]]) -> str:
    readers = [process for processes in variants.values() for process in processes]
    defaults = "; ".join(
        _default_cell(setting) + (f" ({', '.join(processes)})" if len(variants) > 1 else "")
        for setting, processes in variants.items()
    )
    meanings = "; ".join(dict.fromkeys(setting.meaning for setting in variants))
    meanings = meanings.replace("|", "\\|")
    return f"| `{name}` | {defaults} | {', '.join(readers)} | {meanings} |"


PAGE = """\
# Settings

Every setting is an environment variable. A file `.env` in the working directory is read too; the
environment wins. An empty value counts as none. `NAME_FILE` instead of `NAME` names a file that
holds the value, which is how secrets are mounted into a container; giving both is an error.
Each process checks its own settings when it starts: with a wrong one it does not start, names every
problem at once, and exits with code 78. No message repeats a value.

`slack` and `email` are the workers of the two destinations that are there by default. What a
channel needs is read with the destination's name in front: a further destination `slack-emea` of
the channel `slack` reads `SLACK_EMEA_WEBHOOK_URL`. [channels.md](channels.md) has those of
the channel `webhook` too.

`python -m service show` and `python -m service audit` need `MONGODB_URL` only.

`compose.yml` has values of its own for {fixed};
the others it takes from `.env`. `secrets`, `mongodb-installation` and `rabbitmq-installation` are
the steps of `python -m installation`, described in [deploy/README.md](../deploy/README.md).

This page is written by `python -m tools.settings_pages`, and a test holds it to the code.

| name | default | read by | meaning |
|---|---|---|---|
{rows}
"""


def _default_cell(setting: Setting) -> str:
    if setting.required:
        return "**required**"
    return f"`{setting.default}`" if setting.default else "none"


def _setting(name: str, field: FieldInfo) -> Setting:
    default = "" if field.is_required() else _as_written(field.default)
    return Setting(name, default, field.is_required(), field.description or "")


def _as_written(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ",".join(_as_written(item) for item in value)
    if isinstance(value, Enum):
        return str(value.value)
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    ENV_EXAMPLE.write_text(env_example())
    SETTINGS_PAGE.write_text(settings_page())
