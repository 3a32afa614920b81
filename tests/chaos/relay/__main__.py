"""`python -m tests.chaos.relay`: a campaign on servers of its own."""

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
from tests.chaos.relay.blows import OPLOG_THAT_ROLLS
from tests.chaos.relay.campaign import Result, run_campaign
from tests.chaos.relay.faulty import FAULTS
from tests.chaos.relay.plan import Round, draw_plan
from tests.support.outbox_world import OutboxWorld

NODES_COUNT = 3

commands = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@commands.command()
def campaign(
    *,
    rounds: Rounds = 200,
    seed: Seed = None,
    first: First = 1,
    fault: Annotated[
        str | None, typer.Option(help="switch a fault in: " + ", ".join(FAULTS))
    ] = None,
) -> None:
    """Kill, freeze and stop relays and servers under load, and see whether anything is lost."""
    if fault is not None and fault not in FAULTS:
        raise typer.BadParameter(f"choose one of {', '.join(FAULTS)}", param_hint="--fault")
    seed = begin(seed, first, rounds)
    command = ("relay", "run") if fault is None else ("tests.chaos.relay.faulty", fault, "run")
    began = time.monotonic()
    with own_folder("relay") as folder:
        with own_servers(
            folder, mongo_nodes=NODES_COUNT, mongo_arguments=OPLOG_THAT_ROLLS
        ) as servers:
            result = play(draw_plan(seed, rounds, first=first), servers, folder, command)
        typer.echo(f"{result}, {time.monotonic() - began:.0f} s")
        failed = first + result.rounds - 1
        again = (
            f"Again: make chaos SEED={seed} ROUNDS={failed}; that round alone:"
            f" make chaos SEED={seed} FIRST={failed} ROUNDS=1"
        )
        exit_on_faults(result.faults, failed_round=failed, again=again, folder=folder)
    typer.echo("PASSED: nothing lost, nothing invented, each key in order, repeats bounded")


def play(plan: list[Round], servers: Servers, folder: Path, command: tuple[str, ...]) -> Result:
    world = OutboxWorld(servers.mongo.url, "chaos", servers.rabbit.url)
    try:
        return run_campaign(
            plan, world, servers.mongo, servers.rabbit, folder, command=command, say=typer.echo
        )
    finally:
        world.close()


if __name__ == "__main__":
    commands()
