"""Who is measured, each a real process with one setting."""

import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.field import Field
from sandbox.server_process import ServerProcess

HERE = Path(__file__).parent
#: mq-bridge and the drawing library live here, away from the product's locked environment.
EQUIPMENT = HERE.parent / ".local" / "benchmarks" / "equipment"
EQUIPMENT_PYTHON = EQUIPMENT / "bin" / "python"


@dataclass(frozen=True)
class Contender:
    """
    command: a Python file or module with its arguments; environment: beside the field's own.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


OURS = Contender("ours", [sys.executable, "-m", "relay", "run"])

#: The same relay; a publish is confirmed at once and nothing is sent.
NULL_PUBLISHER = Contender(
    "ours, null publisher", [sys.executable, "-m", "benchmarks.null_publisher"]
)

NAIVE = Contender("naive loop", [sys.executable, "-m", "benchmarks.naive"])


def mq_bridge(batch_size: int, *, reads_existing: bool = False) -> Contender:
    """reads_existing: it first reads what is in the collection, as our resync does."""
    return Contender(
        f"mq-bridge batch_size={batch_size}",
        [str(EQUIPMENT_PYTHON), str(HERE / "mq_bridge_route.py")],
        {
            "BATCH_SIZE": str(batch_size),
            "CONSUME": "capture_all" if reads_existing else "capture_new",
        },
    )


@contextmanager
def running(contender: Contender, field: Field) -> Iterator[ServerProcess]:
    """The contender at work on this field; asked to stop at the end, and never outliving us."""
    process = ServerProcess(
        contender.name,
        contender.command,
        field.folder / f"{field.name}.log",
        field.environment | dict(contender.environment),
    )
    process.launch()
    try:
        yield process
    finally:
        process.stop(deadline_seconds=15)


def bring_equipment(say: Callable[[str], None]) -> None:
    """Install what only the benchmark needs, after saying so; once a checkout."""
    wanted = (HERE / "requirements.txt").read_text()
    installed = EQUIPMENT / "installed.txt"
    if installed.exists() and installed.read_text() == wanted:
        return
    say(f"Installing mq-bridge and matplotlib into {EQUIPMENT} (for the benchmark only) ...")
    venv.create(EQUIPMENT, clear=True, with_pip=True)
    subprocess.run(
        [EQUIPMENT_PYTHON, "-m", "pip", "install", "-qq", "-r", HERE / "requirements.txt"],
        check=True,
    )
    installed.write_text(wanted)
