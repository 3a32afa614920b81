"""
Settings: one table a process, checked at boot, every problem named at once.

A process' table is a subclass of the parts below; names are environment variables in upper case,
also read from a file `.env` in the working directory.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

#: sysexits.h: something was wrong with the configuration.
EXIT_CONFIGURATION = 78


def _starts_with(*schemes: str) -> AfterValidator:
    def check(url: SecretStr) -> SecretStr:
        if not url.get_secret_value().startswith(schemes):
            raise ValueError(f"must start with {' or '.join(schemes)}")
        return url

    return AfterValidator(check)


class SettingsTable(BaseSettings):
    """The root of every table; one with an `env_prefix` reads variables that begin with it."""

    model_config = SettingsConfigDict(
        env_file=".env",
        extra="ignore",
        env_ignore_empty=True,
        # fields that hold JSON parse it themselves, so that a broken one is listed with the rest
        enable_decoding=False,
        hide_input_in_errors=True,
    )


class ProcessSettings(SettingsTable):
    log_level: Annotated[str, AfterValidator(str.upper)] = Field(
        default="INFO",
        pattern="(?i)^(debug|info|warning|error)$",
        description="least level that is logged: debug, info, warning or error",
    )
    log_format: str = Field(
        default="auto",
        pattern="^(auto|json|pretty)$",
        description="`json`, `pretty`, or `auto`: pretty in a terminal, JSON elsewhere",
    )


class MongoSettings(ProcessSettings):
    mongodb_url: Annotated[SecretStr, _starts_with("mongodb://", "mongodb+srv://")] = Field(
        description="the replica set, with its credentials: mongodb://user:password@host/?replicaSet=rs0"
    )
    mongodb_database: str = Field(
        default="assistance", min_length=1, description="the database that holds the outbox"
    )


class RabbitSettings(ProcessSettings):
    rabbitmq_url: Annotated[SecretStr, _starts_with("amqp://", "amqps://")] = Field(
        description="the broker, with its credentials and virtual host: amqp://user:password@host:5672/"
    )
    rabbitmq_heartbeat_seconds: int = Field(
        default=5,
        ge=1,
        le=600,
        description="a silent connection is dead after two to three of these",
    )
    events_exchange: str = Field(
        default="events", min_length=1, max_length=255, description="the topic exchange for events"
    )


Settings = TypeVar("Settings", bound=SettingsTable)


def load_settings(table: type[Settings], process: str) -> Settings:
    """The process' settings; ends the process with one line a problem."""
    settings = read_settings(table)
    if isinstance(settings, list):
        refuse_settings(process, settings)
    return settings


def read_settings(table: type[Settings]) -> Settings | list[str]:
    """The settings, or one line a problem; no line repeats a value, which may be secret."""
    try:
        return table()
    except ValidationError as error:
        return [_problem(table, detail) for detail in error.errors(include_input=False)]


def refuse_settings(process: str, problems: Sequence[str]) -> NoReturn:
    count = "1 setting is" if len(problems) == 1 else f"{len(problems)} settings are"
    sys.stderr.write(f"{process} does not start: {count} wrong\n")
    sys.stderr.writelines(f"  {problem}\n" for problem in problems)
    raise SystemExit(EXIT_CONFIGURATION)


def _problem(table: type[SettingsTable], detail: Any) -> str:
    message = str(detail["msg"]).removeprefix("Value error, ").replace("\n", "\n    ")
    if not detail["loc"]:
        return message
    field, *inside = (str(part) for part in detail["loc"])
    name = ".".join([variable_name(table, field), *inside])
    if detail["type"] == "missing":
        known = table.model_fields.get(field)
        meaning = f" ({known.description})" if known and known.description else ""
        return f"{name} is missing{meaning}"
    return f"{name}: {message}"


def variable_name(table: type[SettingsTable], field: str) -> str:
    prefix = table.model_config.get("env_prefix") or ""
    return f"{prefix}{field}".upper()
