"""`python -m tests.chaos.relay`: a campaign on servers of its own."""

import secrets
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sandbox.errors import SandboxError
from sandbox.mongodb import LocalMongo
from sandbox.servers import Servers, find_mongo, find_rabbit
from tests.chaos.relay.blows import OPLOG_THAT_ROLLS
from tests.chaos.relay.campaign import Result, run_campaign
from tests.chaos.relay.faulty import FAULTS
from tests.chaos.relay.plan import draw_plan
from tests.support.outbox_world import OutboxWorld
from tests.support.paths import REPOSITORY

NODES_COUNT = 3
LOCAL = REPOSITORY / ".local" / "chaos"

commands = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@commands.command()
def campaign(
    *,
    rounds: Annotated[int, typer.Option(min=1)] = 200,
    seed: Annotated[int | None, typer.Option(help="the same seed plans the same rounds")] = None,
    first: Annotated[int, typer.Option(min=1, help="the number of the first round")] = 1,
    fault: Annotated[
        str | None, typer.Option(help="switch a fault in: " + ", ".join(FAULTS))
    ] = None,
) -> None:
    """Kill, freeze and stop relays and servers under load, and see whether anything is lost."""
    if fault is not None and fault not in FAULTS:
        raise typer.BadParameter(f"there are {', '.join(FAULTS)}", param_hint="--fault")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    seed = secrets.randbelow(10**6) if seed is None else seed
    typer.echo(f"seed {seed}, rounds {first} to {first + rounds - 1}")
    LOCAL.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=LOCAL, prefix="run-"))
    command = ("relay", "run") if fault is None else ("tests.chaos.relay.faulty", fault, "run")
    began = time.monotonic()
    try:
        result = play(seed, rounds, first, folder, command)
    except (SandboxError, AssertionError) as broken:
        sys.exit(f"The campaign itself broke off: {broken}\nLogs are in {folder}")
    typer.echo(f"{result}, {time.monotonic() - began:.0f} s")
    if result.faults:
        failed = first + result.rounds - 1
        typer.echo(f"FAILED in round {failed}:")
        for line in result.faults:
            typer.echo(f"  {line}")
        typer.echo(
            f"Again: make chaos SEED={seed} ROUNDS={failed}; that round alone:"
            f" make chaos SEED={seed} FIRST={failed} ROUNDS=1. Logs are in {folder}"
        )
        sys.exit(1)
    shutil.rmtree(folder)
    typer.echo("PASSED: nothing lost, nothing invented, each key in order, repeats bounded")


def play(seed: int, rounds: int, first: int, folder: Path, command: tuple[str, ...]) -> Result:
    nothing: dict[str, Any] = {}  # servers to hurt are never those that the environment names
    mongo = find_mongo(folder, nothing, node_count=NODES_COUNT, extra_arguments=OPLOG_THAT_ROLLS)
    if not isinstance(mongo, LocalMongo):
        sys.exit("The campaign needs mongod on this machine: `make setup` brings one on Linux")
    servers = Servers(mongo, find_rabbit(folder, nothing))
    try:
        typer.echo(f"Starting RabbitMQ and MongoDB with {NODES_COUNT} nodes ...")
        servers.launch()
        servers.wait_ready()
        world = OutboxWorld(servers.mongo.url, "chaos", servers.rabbit.url)
        plan = draw_plan(seed, rounds, first=first)
        try:
            return run_campaign(
                plan, world, servers.mongo, servers.rabbit, folder, command=command, say=typer.echo
            )
        finally:
            world.close()
    finally:
        servers.discard()


if __name__ == "__main__":
    commands()
