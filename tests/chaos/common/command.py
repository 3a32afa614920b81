"""What both campaigns' commands do: options, servers of their own, and the report."""

import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from sandbox.errors import SandboxError
from sandbox.mongodb import LocalMongo
from sandbox.rabbitmq import LocalRabbit
from sandbox.servers import Servers, find_mongo, find_rabbit
from tests.support.paths import REPOSITORY

FOLDER = REPOSITORY / ".local" / "chaos"

Rounds = Annotated[int, typer.Option(min=1)]
Seed = Annotated[int | None, typer.Option(help="the same seed plans the same rounds")]
First = Annotated[int, typer.Option(min=1, help="the number of the first round")]


def begin(seed: int | None, first: int, rounds: int) -> int:
    """Return the seed, drawn if it is not given; print it, and let SIGTERM end what was started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    seed = secrets.randbelow(10**6) if seed is None else seed
    typer.echo(f"seed {seed}, rounds {first} to {first + rounds - 1}")
    return seed


@contextmanager
def own_folder(name: str) -> Iterator[Path]:
    """A folder for data and logs, removed if the campaign passes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=FOLDER, prefix=f"{name}-"))
    try:
        yield folder
    except (SandboxError, AssertionError) as broken:
        sys.exit(f"The campaign itself broke off: {broken}\nLogs are in {folder}")
    shutil.rmtree(folder)


@contextmanager
def own_servers(
    folder: Path, *, mongo_nodes: int = 1, mongo_arguments: Sequence[str] = ()
) -> Iterator[Servers]:
    """Servers of the campaign's own: it never hurts those that the environment names."""
    mongo = find_mongo(folder, {}, node_count=mongo_nodes, extra_arguments=mongo_arguments)
    servers = Servers(mongo, find_rabbit(folder, {}))
    if not isinstance(servers.mongo, LocalMongo) or not isinstance(servers.rabbit, LocalRabbit):
        sys.exit("The campaign needs mongod and RabbitMQ on this machine: run `make setup`")
    try:
        typer.echo(f"Starting RabbitMQ and MongoDB ({mongo_nodes} nodes) ...")
        servers.launch()
        servers.wait_ready()
        yield servers
    finally:
        servers.discard()


def exit_on_faults(faults: Sequence[str], *, failed_round: int, again: str, folder: Path) -> None:
    """Print each fault and how to repeat its round, and exit with 1; return if there are none."""
    if not faults:
        return
    typer.echo(f"FAILED in round {failed_round}:")
    for line in faults:
        typer.echo(f"  {line}")
    typer.echo(f"{again}. Logs are in {folder}")
    sys.exit(1)
