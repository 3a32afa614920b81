"""`python -m tests.chaos.delivery`: a campaign on servers of its own."""

import time
from pathlib import Path
from typing import Annotated

import typer

from sandbox.servers import Servers
from tests.chaos.common.command import (
    First,
    Rounds,
    Seed,
    begin,
    exit_on_faults,
    own_folder,
    own_servers,
)
from tests.chaos.delivery.blows import end_transactions_soon
from tests.chaos.delivery.campaign import run_campaign
from tests.chaos.delivery.mortal import FAULTS
from tests.chaos.delivery.plan import WORKERS, draw_plan
from tests.chaos.delivery.waits import WAITS, DefaultSystem
from tests.support.deliveries import Deliveries
from tests.support.third_parties import running_third_parties

commands = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@commands.command()
def campaign(
    *,
    rounds: Rounds = 200,
    seed: Seed = None,
    first: First = 1,
    fault: Annotated[str, typer.Option(help="switch a fault in: " + ", ".join(FAULTS))] = "none",
    waits: Annotated[
        bool, typer.Option(help="then what takes its time: " + "; ".join(WAITS))
    ] = True,
) -> None:
    """Kill workers between any two of their steps, hurt their servers, and balance the books."""
    if fault not in FAULTS:
        raise typer.BadParameter(f"choose one of {', '.join(FAULTS)}", param_hint="--fault")
    seed = begin(seed, first, rounds)
    with own_folder("delivery") as folder, own_servers(folder) as servers:
        play_rounds(seed, rounds, first, fault, servers, folder)
        if waits:
            play_waits(servers, folder)
    typer.echo("PASSED: nothing lost, nothing failed falsely, every call explained")


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
    failed = first + result.rounds - 1
    again = f"python -m tests.chaos.delivery --seed {seed} --first {failed} --rounds 1 --no-waits"
    exit_on_faults(
        result.faults, failed_round=failed, again=f"That round alone: {again}", folder=folder
    )


def play_waits(servers: Servers, folder: Path) -> None:
    for name, wait in WAITS.items():
        typer.echo(f"{name} ...")
        deliveries = Deliveries(servers.mongo.url, f"chaos-{wait.__name__}", servers.rabbit.url)
        wait_folder = folder / wait.__name__
        wait_folder.mkdir()
        with deliveries.client, running_third_parties() as third_parties:
            system = DefaultSystem(deliveries, third_parties, servers.rabbit, wait_folder)
            try:
                typer.echo(f"  {wait(system)}")
            finally:
                system.end()


if __name__ == "__main__":
    commands()
