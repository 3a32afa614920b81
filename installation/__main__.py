"""`python -m installation secrets | mongodb | rabbitmq | check`"""

import asyncio
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from pymongo.errors import PyMongoError

from installation import mongodb as mongodb_step
from installation import rabbitmq as rabbitmq_step
from installation.secret_files import (
    KEPT,
    MissingSecrets,
    keep_secrets,
    secret_files,
    write_secret_file,
)
from installation.settings import (
    BrokerSettings,
    CheckSettings,
    DatabaseSettings,
    MissingPasswords,
    SecretsFolder,
    SecretsSettings,
    file_of,
    find_passwords,
)
from installation.users import mongodb_roles
from runtime.logs import set_up_logs
from runtime.mongo import DatabaseError, explain_error
from runtime.rabbit import BrokerError
from runtime.settings import load_settings, refuse_settings

commands = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@commands.callback()
def installation() -> None:
    """Prepare MongoDB and RabbitMQ for the processes. Every command may be repeated."""


@commands.command()
def secrets(
    root: Annotated[Path, typer.Argument(help="the folder that gets one folder for each reader")],
    *,
    generate: Annotated[
        bool, typer.Option(help="make secrets that are neither provided nor kept from before")
    ] = True,
    require: Annotated[
        list[str] | None,
        typer.Option(help="a variable, or one of several (A|B), that must have a value"),
    ] = None,
) -> None:
    """Make random secrets once, and write what each process reads into a folder of its own."""
    settings = load_settings(SecretsSettings, "secrets")
    problems = [
        f"{names.replace('|', ' or ')} is missing"
        for names in require or []
        if not any(os.environ.get(name) for name in names.split("|"))
    ]
    values: dict[str, str] = {}
    try:
        values = keep_secrets(settings, root / KEPT, generate=generate)
    except MissingSecrets as missing:
        problems += [
            f"{name} is missing; give it, {name}_FILE, "
            f"or the file {file_of(name)} in PROVIDED_SECRETS_FOLDER"
            for name in missing.variables
        ]
    except OSError as error:
        problems.append(f"{error.filename} cannot be read: {error.strerror}")
    if problems:
        refuse_settings("secrets", problems)
    try:
        files = list(secret_files(settings, values))
        written = sum(write_secret_file(root, file) for file in files)
    except OSError as error:
        sys.exit(f"secrets: {error.filename} cannot be written: {error.strerror}")
    readers = sorted({file.reader for file in files})
    sys.stdout.write(f"secrets: {written} files written, {len(files) - written} kept, ")
    sys.stdout.write(f"for {', '.join(readers)}\n")


@commands.command()
def mongodb() -> None:
    """Create the replica set, roles, users, collections, indexes and validators."""
    settings = load_settings(DatabaseSettings, "mongodb")
    passwords = _passwords("mongodb", list(mongodb_roles()), settings)
    _print("mongodb", _run("mongodb", mongodb_step.install(settings, passwords)))


@commands.command()
def rabbitmq() -> None:
    """Create the broker's users, permissions, exchanges, queues and bindings."""
    settings = load_settings(BrokerSettings, "rabbitmq")
    users = list(rabbitmq_step.permissions_of(settings))
    passwords = _passwords("rabbitmq", users, settings)
    _print("rabbitmq", _run("rabbitmq", rabbitmq_step.install(settings, passwords)))


@commands.command()
def check(
    *,
    note: Annotated[str, typer.Option(help="printed when nothing differs")] = "",
) -> None:
    """Compare both servers with what the commands make. Exit code 1 when something differs."""
    settings = load_settings(CheckSettings, "check")
    mongodb_passwords = _passwords("mongodb", list(mongodb_roles()), settings)
    users = list(rabbitmq_step.permissions_of(settings))
    rabbitmq_passwords = _passwords("rabbitmq", users, settings)

    async def compare() -> list[str]:
        return [
            *await mongodb_step.differences(settings, mongodb_passwords),
            *await rabbitmq_step.differences(settings, rabbitmq_passwords),
        ]

    if differences := _run("check", compare()):
        sys.stderr.writelines(f"{line}\n" for line in differences)
        sys.exit("check: run the commands `installation mongodb` and `installation rabbitmq`")
    sys.stdout.write("check: both servers are as they should be\n")
    if note:
        sys.stdout.write(f"{note.strip()}\n")


def _passwords(server: str, users: list[str], settings: SecretsFolder) -> dict[str, str]:
    try:
        return find_passwords(server, users, settings.secrets_folder)
    except MissingPasswords as missing:
        refuse_settings(
            server,
            [
                f"{name} is missing; give it, {name}_FILE, or SECRETS_FOLDER"
                for name in missing.names
            ],
        )
    except OSError as error:
        refuse_settings(server, [f"{error.filename} cannot be read: {error.strerror}"])


def _run(step: str, work: Coroutine[Any, Any, list[str]]) -> list[str]:
    set_up_logs(f"installation-{step}", level="INFO", format="auto")
    try:
        return asyncio.run(work)
    except (DatabaseError, PyMongoError) as error:
        sys.exit(f"{step}: {explain_error(error)}")
    except BrokerError as error:
        sys.exit(f"{step}: {error}")


def _print(step: str, lines: list[str]) -> None:
    sys.stdout.writelines(f"{step}: {line}\n" for line in lines)


if __name__ == "__main__":
    commands(prog_name="python -m installation")
