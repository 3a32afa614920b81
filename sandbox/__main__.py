"""`python -m sandbox demo`, `... up`: the whole system on this machine, for a look."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import typer

from sandbox.demo import DemoFailed, play
from sandbox.errors import SandboxError
from sandbox.secret_files import write_secret
from sandbox.servers import make_present
from sandbox.stack import Stack, open_stack

LOCAL = Path(".local")
#: The settings of the running processes, for a shell or an editor; removed at the end.
ENV_FILE = "up.env"

#: What a shell reports for a process that SIGINT ended.
EXIT_INTERRUPTED = 130

commands = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Folder = Annotated[Path, typer.Option(help="where data, logs and random secrets live")]


@commands.command()
def demo(folder: Folder = LOCAL) -> None:
    """Show the main job in two acts; with a terminal, stay up afterwards."""
    run(folder, acts=True, stays=sys.stdin.isatty())


@commands.command()
def up(folder: Folder = LOCAL) -> None:
    """Run the same system without the acts, until Ctrl-C."""
    run(folder, acts=False, stays=True)


@commands.command()
def servers() -> None:
    """Make sure that MongoDB and RabbitMQ can be started here; install what is missing."""
    try:
        make_present(os.environ)
    except SandboxError as error:
        sys.exit(str(error))


def run(folder: Path, *, acts: bool, stays: bool) -> None:
    """Exits 0 when all that was asked for was shown, 130 when that was interrupted."""
    started = time.monotonic()
    shown = False
    # SIGTERM stops everything in order, as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def say(line: str) -> None:
        print(line, flush=True)

    folder.mkdir(exist_ok=True, mode=0o700)
    try:
        with (
            open_stack(folder.resolve(), say) as stack,
            env_file(stack.folder / ENV_FILE, stack.settings),
        ):
            say(f"Everything is up after {time.monotonic() - started:.0f} s.")
            if acts:
                play(stack, say)
            shown = True
            if stays:
                say(how_to_go_on(stack))
                threading.Event().wait()
    except KeyboardInterrupt:
        say("Stopped.")
        if not shown:
            sys.exit(EXIT_INTERRUPTED)
    except (
        DemoFailed,
        SandboxError,
        subprocess.CalledProcessError,
        httpx.HTTPError,
    ) as failure:
        sys.exit(f"\nFailed: {failure}")


@contextmanager
def env_file(path: Path, settings: Mapping[str, str]) -> Iterator[None]:
    """Keep the settings, with their secrets, in a file that a shell can read."""
    lines = (f"{name}={shlex.quote(value)}\n" for name, value in settings.items())
    write_secret(path, "".join(lines))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def shell_line(path: Path) -> str:
    """Gives a shell the settings of the running system, and this Python as `python`."""
    programs = Path(sys.executable).parent
    return f"set -a; . {shlex.quote(str(path))}; set +a; PATH={shlex.quote(str(programs))}:$PATH"


def how_to_go_on(stack: Stack) -> str:
    api = stack.api.base_url
    return f"""
  API            {api}
  API's pages    {api}/docs
  third parties  {stack.third_parties.base_url}  (what Slack and the mailbox got; make them fail)
  logs           {stack.folder / "logs"}

  curl -s {api}/api/assistances -H 'X-API-KEY: {stack.api_key}' \\
    -H 'Content-Type: application/json' -d '{{"topic": "sales", "description": "Hello"}}'

To run a process or a command of docs/runbook.md against it, first run this in another terminal:

  {shell_line(stack.folder / ENV_FILE)}

Ctrl-C stops everything."""


if __name__ == "__main__":
    commands()
