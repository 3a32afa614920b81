"""`python -m relay run`"""

import asyncio
import sys

import typer

from relay.relay import run as run_relay
from relay.settings import RelaySettings
from runtime.logs import set_up_logs
from runtime.mongo import UnsuitableServer
from runtime.rabbit import BrokerRefused
from runtime.settings import load_settings
from runtime.shutdown import Stop

commands = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@commands.callback()
def relay() -> None:
    """Publish what is appended to an outbox in MongoDB to RabbitMQ."""


@commands.command()
def run() -> None:
    """Lead or stand by until SIGTERM or Ctrl-C."""
    settings = load_settings(RelaySettings, "relay")
    set_up_logs("relay", level=settings.log_level, format=settings.log_format)

    async def live() -> None:
        stop = Stop()
        stop.on_signals()
        await run_relay(settings, stop)

    try:
        asyncio.run(live())
    except (UnsuitableServer, BrokerRefused) as refusal:
        sys.exit(f"relay does not start: {refusal}")


if __name__ == "__main__":
    commands()
