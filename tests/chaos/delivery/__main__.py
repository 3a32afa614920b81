"""`python -m tests.chaos.delivery`: a campaign on servers of its own."""

import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sandbox.errors import SandboxError
from sandbox.mongodb import LocalMongo
from sandbox.rabbitmq import LocalRabbit
from sandbox.servers import Servers, find_mongo, find_rabbit
from tests.chaos.delivery.blows import end_transactions_soon
from tests.chaos.delivery.campaign import run_campaign
from tests.chaos.delivery.mortal import FAULTS
from tests.chaos.delivery.plan import WORKERS, draw_plan
from tests.chaos.delivery.waits import WAITS, DefaultSystem
from tests.chaos.relay.__main__ import LOCAL
from tests.support.deliveries import Deliveries
from tests.support.third_parties import running_third_parties

commands = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@commands.command()
def campaign(
    *,
    rounds: Annotated[int, typer.Option(min=1)] = 200,
    seed: Annotated[int | None, typer.Option(help="the same seed plans the same rounds")] = None,
    first: Annotated[int, typer.Option(min=1, help="the number of the first round")] = 1,
    fault: Annotated[str, typer.Option(help="switch a fault in: " + ", ".join(FAULTS))] = "none",
    waits: Annotated[
        bool, typer.Option(help="then what takes its time: " + "; ".join(WAITS))
    ] = True,
) -> None:
    """Kill workers between any two of their steps, hurt their servers, and balance the books."""
    if fault not in FAULTS:
        raise typer.BadParameter(f"there are {', '.join(FAULTS)}", param_hint="--fault")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    seed = secrets.randbelow(10**6) if seed is None else seed
    typer.echo(f"seed {seed}, rounds {first} to {first + rounds - 1}")
    LOCAL.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=LOCAL, prefix="delivery-"))
    try:
        with own_servers(folder) as servers:
            play_rounds(seed, rounds, first, fault, servers, folder)
            if waits:
                play_waits(servers, folder)
    except (SandboxError, AssertionError) as broken:
        sys.exit(f"The campaign itself broke off: {broken}\nLogs are in {folder}")
    shutil.rmtree(folder)
    typer.echo("PASSED: nothing lost, nothing failed falsely, every call explained")


@contextmanager
def own_servers(folder: Path) -> Iterator[Servers]:
    nothing: dict[str, Any] = {}  # servers to hurt are never those that the environment names
    servers = Servers(find_mongo(folder, nothing), find_rabbit(folder, nothing))
    if not isinstance(servers.mongo, LocalMongo) or not isinstance(servers.rabbit, LocalRabbit):
        sys.exit("The campaign needs mongod and RabbitMQ on this machine: see `make setup`")
    try:
        typer.echo("Starting RabbitMQ and MongoDB ...")
        servers.launch()
        servers.wait_ready()
        yield servers
    finally:
        servers.discard()


def play_rounds(
    seed: int, rounds: int, first: int, fault: str, servers: Servers, folder: Path
) -> None:
    began = time.monotonic()
    deliveries = Deliveries(servers.mongo.url, "chaos", servers.rabbit.url)
    end_transactions_soon(deliveries.client)
    with deliveries.client, running_third_parties() as third_parties:
        result = run_campaign(
            draw_plan(seed, rounds, first=first),
            deliveries,
            third_parties,
            servers.mongo,
            servers.rabbit,
            folder,
            worker_faults=dict.fromkeys(WORKERS, fault),
            say=typer.echo,
        )
    typer.echo(f"{result}, {time.monotonic() - began:.0f} s")
    if result.faults:
        failed = first + result.rounds - 1
        typer.echo(f"FAILED in round {failed}:")
        for line in result.faults:
            typer.echo(f"  {line}")
        again = f"python -m tests.chaos.delivery --seed {seed} --first {failed} --rounds 1"
        typer.echo(f"That round alone: {again} --no-waits. Logs are in {folder}")
        sys.exit(1)


def play_waits(servers: Servers, folder: Path) -> None:
    for name, wait in WAITS.items():
        typer.echo(f"{name} ...")
        deliveries = Deliveries(servers.mongo.url, f"chaos-{wait.__name__}", servers.rabbit.url)
        own_folder = folder / wait.__name__
        own_folder.mkdir()
        with deliveries.client, running_third_parties() as third_parties:
            system = DefaultSystem(deliveries, third_parties, servers.rabbit, own_folder)
            try:
                typer.echo(f"  {wait(system)}")
            finally:
                system.end()


if __name__ == "__main__":
    commands()
