"""`python -m consumers run slack`, `... run dead-letters`, `... run reconciler`, `... topology`"""

from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Annotated, Any

import typer

from assistance.events import hint_routing_key
from assistance.routing import RoutingTable
from consumers import topology as broker
from consumers.admin import dead_letters_cli, destinations_cli, needs_decision_cli, redrive_cli
from consumers.admin.backlog_cli import overdue, resend
from consumers.admin.cli import with_database
from consumers.channels import DeliveryChannel, UnknownChannel, find_channel, settings_table
from consumers.delivery.worker import run_worker
from consumers.maintenance.dead_letter_consumer import run_dead_letters
from consumers.maintenance.reconciler import Reconciler, run_reconciler, why
from consumers.settings import (
    DeadLetterSettings,
    ReconcilerSettings,
    TopologySettings,
    WorkerSettings,
    destination_table,
    with_own,
)
from runtime.logs import set_up_logs
from runtime.mongo import GivenUp, UnsuitableServer
from runtime.mongo import exit_code_of as exit_code_of_mongodb
from runtime.process import run_process
from runtime.rabbit import BrokerError, BrokerGone, connect
from runtime.rabbit import exit_code_of as exit_code_of_rabbitmq
from runtime.settings import (
    ProcessSettings,
    SettingsTable,
    load_settings,
    read_settings,
    refuse_settings,
    variable_name,
)
from runtime.shutdown import DEFAULT_GRACE_SECONDS, Stop
from runtime.terminal import AsJson, CommandLine, ShowVersion, fail, print_result

commands = CommandLine()
dead_letters_cli.commands.command()(redrive_cli.redrive)
dead_letters_cli.commands.add_typer(redrive_cli.redrives, name="redrives")
commands.add_typer(dead_letters_cli.commands, name="dead-letters")
commands.add_typer(destinations_cli.commands, name="destinations")
commands.add_typer(needs_decision_cli.commands, name="needs-decision")
commands.command()(destinations_cli.routes)
commands.command()(resend)
commands.command()(overdue)

Life = Callable[[Stop], Coroutine[Any, Any, None]]


@commands.callback()
def consumers(*, version: ShowVersion = False) -> None:
    """Deliver requests to third parties, and manage the deliveries."""
    _ = version


@commands.command()
def run(
    who: Annotated[str, typer.Argument(help="a destination, `dead-letters` or `reconciler`")],
    *,
    once: Annotated[bool, typer.Option("--once", help="reconciler: one pass, then stop")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="reconciler: print what one pass would do")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="with --once or --dry-run: print JSON")
    ] = False,
) -> None:
    """Run one consumer until SIGTERM or Ctrl-C."""
    if who == "reconciler":
        run_one_reconciler(once=once, dry_run=dry_run, json=json)
    elif once or dry_run or json:
        raise typer.BadParameter("--once, --dry-run and --json are for the reconciler only")
    elif who == "dead-letters":
        settings = load_settings(DeadLetterSettings, "dead-letters")
        live("dead-letters", settings, lambda stop: run_dead_letters(settings, stop))
    else:
        run_one_worker(who)


@commands.command()
def topology(*, json: AsJson = False) -> None:
    """Declare and print every exchange, queue and binding of the consumers."""
    settings = load_settings(TopologySettings, "topology")

    async def declare(_stop: Stop) -> None:
        connection = await connect(
            settings.rabbitmq_url.get_secret_value(),
            name="topology",
            heartbeat_seconds=settings.rabbitmq_heartbeat_seconds,
        )
        channel = await connection.open_channel()
        for destination in settings.destinations:
            await broker.declare_deliveries(
                channel,
                destination,
                events_exchange=settings.events_exchange,
                delivery_limit=settings.delivery_limit,
            )
        await connection.close()

    live("topology", settings, declare)
    bindings = [
        (settings.events_exchange, hint_routing_key(name), broker.deliveries_queue(name))
        for name in settings.destinations
    ]
    print_result(
        [
            *(
                {"exchange": exchange, "routing_key": key, "queue": queue}
                for exchange, key, queue in bindings
            ),
            {"exchange": broker.DEAD_LETTERS_EXCHANGE, "queue": broker.DEAD_LETTERS_QUEUE},
        ],
        *(f"{exchange} -- {key} --> {queue}" for exchange, key, queue in bindings),
        f"{broker.DEAD_LETTERS_EXCHANGE} --> {broker.DEAD_LETTERS_QUEUE}",
        json=json,
    )


def run_one_reconciler(*, once: bool, dry_run: bool, json: bool) -> None:
    settings = load_settings(ReconcilerSettings, "reconciler")
    if not (once or dry_run):
        live("reconciler", settings, lambda stop: run_reconciler(settings, stop))
    elif dry_run:
        found = with_database(settings, lambda database, stop: Reconciler(database, stop).preview())
        print_result(
            [
                {
                    "request": due.request_id,
                    "destination": due.destination,
                    "step": due.step,
                    "reason": why(due),
                }
                for due in found
            ],
            *(f"{due.request_id} {due.destination} would {due.step} ({why(due)})" for due in found),
            *([] if found else ["nothing is due"]),
            json=json,
        )
    else:
        count = with_database(
            settings, lambda database, stop: Reconciler(database, stop).run_once()
        )
        print_result({"repaired": count}, f"{count} repaired", json=json)


def run_one_worker(destination: str) -> None:
    process = f"worker-{destination}"
    channel = _channel_of(destination, process)
    table = settings_table(channel, destination)
    settings, channel_settings = read_settings(WorkerSettings), read_settings(table)
    own_table = destination_table(destination)
    own = read_settings(own_table)
    problems = [*_problems(settings), *_problems(channel_settings), *_problems(own)]
    if isinstance(settings, list) or isinstance(own, list) or problems:
        refuse_settings(process, problems)
    settings = with_own(settings, own)
    if problem := settings.call_outlasts_stop(variable_name(own_table, "")):
        refuse_settings(process, [problem])

    async def work(stop: Stop) -> None:
        third_party = channel(channel_settings, call_timeout_seconds=settings.call_timeout_seconds)
        await run_worker(settings, destination, own, third_party, stop)

    live(process, settings, work)


def live(process: str, settings: ProcessSettings, life: Life) -> None:
    """Run a process until it ends or is stopped; if it cannot start, say why in one line."""
    grace_seconds = getattr(settings, "shutdown_grace_seconds", DEFAULT_GRACE_SECONDS)
    set_up_logs(process, level=settings.log_level, format=settings.log_format)

    async def until_given_up(stop: Stop) -> None:
        with suppress(GivenUp):
            await life(stop)

    try:
        run_process(until_given_up, grace_seconds=grace_seconds)
    except UnsuitableServer as refusal:
        fail(f"{process} does not start: {refusal}", exit_code_of_mongodb(refusal))
    except BrokerGone as gone:
        why_not = f"RabbitMQ is not reachable ({gone})"
        remedy = "check that it is running and that RABBITMQ_URL is right"
        fail(f"{process} does not start: {why_not}: {remedy}", exit_code_of_rabbitmq(gone))
    except BrokerError as refusal:
        fail(f"{process} does not start: {refusal}", exit_code_of_rabbitmq(refusal))


class _Routes(SettingsTable, RoutingTable):
    """Read first: it names the channel, and so the channel's own table."""


def _channel_of(destination: str, process: str) -> type[DeliveryChannel]:
    routes = read_settings(_Routes)
    if isinstance(routes, list):
        # with broken routes, the channel's table is unknown: report these problems first
        refuse_settings(process, [*_problems(read_settings(WorkerSettings))])
    if destination not in routes.destinations:
        known = ", ".join([*sorted(routes.destinations), "dead-letters", "reconciler"])
        raise typer.BadParameter(f"there is no destination {destination!r}; known: {known}")
    try:
        return find_channel(routes.destinations[destination])
    except UnknownChannel as unknown:
        refuse_settings(process, [f"DESTINATIONS.{destination}: {unknown}"])


def _problems(read: SettingsTable | list[str]) -> list[str]:
    return read if isinstance(read, list) else []


if __name__ == "__main__":
    commands()
